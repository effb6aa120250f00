"""Holds a client of any language against the vectors: PYTHONPATH=tests python -m conformance node my-client.js."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from conformance.runner import Broken, Runner, names

from cdc_invalidator.embedded.servers import Valkey


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("command", nargs="+", metavar="WORD", help="the command that starts the client")
    given = parser.parse_args()
    broken = 0
    with Valkey() as valkey, tempfile.TemporaryDirectory() as folder:
        runner = Runner(given.command, valkey.port, Path(folder))
        for name in names():
            try:
                runner.run(name)
            except Broken as failure:
                broken += 1
                print(f"not ok  {name}: {failure}", flush=True)
            else:
                print(f"ok      {name}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
