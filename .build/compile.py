"""Compiles the .pyx files for a wheel or an editable install.

Without a C compiler nothing is built, and the data path runs in Python: installing stays one command everywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.errors import BaseError, CCompilerError

PACKAGE = "cdc_invalidator.compiled"
FOLDER = PACKAGE.replace(".", "/")
MODULES = ("_scan", "_tell")


class Compile(BuildHookInterface[Any]):
    """Hatch's hook: see https://hatch.pypa.io/latest/plugins/build-hook/custom/."""

    def initialize(self, _version: str, build_data: dict[str, Any]) -> None:
        """Build the extension beside its source, and let the wheel take it."""
        if self.target_name != "wheel":
            return
        build = Path(self.root, "build")
        try:
            extensions = cythonize(
                [Extension(f"{PACKAGE}.{name}", [f"{FOLDER}/{name}.pyx"]) for name in MODULES],
                build_dir=str(build),
                quiet=True,
            )
            command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
            command.build_lib, command.build_temp = str(self.root), str(build)
            command.ensure_finalized()
            command.run()
        except (BaseError, CCompilerError, OSError) as error:  # the two have no base in common
            print(f"cdc-invalidator: its compiled part is left out ({error})", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for name in MODULES:
            built = command.get_ext_filename(f"{PACKAGE}.{name}")
            build_data["artifacts"].append(f"/{built}")
