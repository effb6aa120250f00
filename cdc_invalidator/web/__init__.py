"""What the daemon serves over HTTP: the pages, and the server that answers."""
