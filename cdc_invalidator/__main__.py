"""``python -m cdc_invalidator`` is the command ``cdc-invalidator``."""

from cdc_invalidator.cli import main

main()
