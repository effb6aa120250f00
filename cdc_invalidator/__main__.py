"""The program: ``python -m cdc_invalidator`` and ``cdc-invalidator`` both call `main`."""

from __future__ import annotations

import gc
import os
import sys

from cdc_invalidator import errors
from cdc_invalidator.commands import healthcheck

# Objects that the collector lets pile up before it looks for cycles among them: imports and keys leave hardly any.
YOUNG_OBJECTS = 50_000


def main() -> None:
    """Run a command; the process ends with the exit codes of `errors`."""
    try:
        port = healthcheck.read(sys.argv[1:], os.environ)
        if port is not None:
            healthcheck.check(port)
            return
        gc.set_threshold(YOUNG_OBJECTS, 10, 10)
        if sys.argv[1:2] == ["run"]:
            # It would search twice through what is being imported, for 20 ms; `start.run` enables it.
            gc.disable()
        # Its plug-ins are looked for in every installed distribution, and none is wanted.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        # A probe is answered without it.
        from cdc_invalidator.cli import app  # noqa: PLC0415

        app()
    except errors.InvalidatorError as error:
        print(error, file=sys.stderr)  # noqa: T201  this is the program's voice
        _log_end(str(error), error.exit_code)
        sys.exit(error.exit_code)
    except Exception as error:  # it is a fault of ours, and raised again; the log shall say so too
        # Not its text, which may hold what no log may show.
        _log_end(f"The daemon fails with {type(error).__name__}; the traceback on standard error says where.", 1)
        raise


def _log_end(why: str, exit_code: int) -> None:
    """Write why the daemon ends to its log as well, where that is JSON: who collects lines wants one form."""
    words = sys.argv[1:]
    if words[:1] != ["run"] or any(word.endswith("console") for word in words):
        return
    if os.environ.get("CDC_LOG_FORMAT") != "console":
        from cdc_invalidator import log  # noqa: PLC0415  a probe is answered without it

        log.last_words(why, exit_code)


if __name__ == "__main__":
    main()
