"""Rule files: pure, without a driver, a socket or an event loop."""
