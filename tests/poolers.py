"""PgBouncer in front of a PostgreSQL of the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from psycopg.conninfo import conninfo_to_dict
from running import SECONDS
from tools import tool

from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

Mode = Literal["session", "transaction", "statement"]


@contextmanager
def pgbouncer(dsn: str, mode: Mode, *, ignored: str = "") -> Iterator[str]:
    """Run PgBouncer with one session of the server, and give the DSN of the same database through it.

    Args:
        dsn: The database, without the pooler.
        mode: Its pool_mode.
        ignored: Its ignore_startup_parameters.
    """
    binary = tool("pgbouncer")
    to, port = conninfo_to_dict(dsn), free_port()
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    # It refuses to run as root.
    other = ["-u", "nobody"] if os.geteuid() == 0 else []
    try:
        folder.chmod(0o755)
        (folder / "ini").write_text(
            f"[databases]\n{to['dbname']} = host={to['host']} port={to['port']} user={to['user']} "
            f"password={to['password']}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            f"unix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = 1\n"
            f"ignore_startup_parameters = {ignored}\nserver_login_retry = 1\n"
        )
        with subprocess.Popen([binary, "-q", *other, str(folder / "ini")], stderr=subprocess.DEVNULL) as process:
            try:
                _listening(port)
                yield f"postgresql://{to['user']}@127.0.0.1:{port}/{to['dbname']}"
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder)


def _listening(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
