"""Builds lora-fx-light: the modules that `parts` chooses, inside the package lora_fx_light."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from lora_fx_light import COMMANDS, MODULES  # noqa: E402 (found in this folder)
from parts import parts  # noqa: E402

if not (MODULES / "lora_fx").is_dir():
    sys.exit(f"{MODULES / 'lora_fx'} is not a link: git clone -c core.symlinks=true")

INSIDE = "lora_fx_light.modules"
PARTS = {f"{INSIDE}.{name}": path for name, path in parts(MODULES / "lora_fx", COMMANDS).items()}
PACKAGES = [name for name, path in PARTS.items() if path.name == "__init__.py"]
TEMPLATES = f"{INSIDE}.lora_fx.report.templates"


class BuildParts(build_py):
    """Leaves out the modules of a package that the distribution does not have."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of the modules of a package."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if not package.startswith(INSIDE):
            return found
        chosen = {str(path.resolve()) for path in PARTS.values()}
        return [row for row in found if str(Path(row[2]).resolve()) in chosen]


setup(
    packages=["lora_fx_light", *PACKAGES, TEMPLATES],
    package_data={TEMPLATES: ["*"]},
    cmdclass={"build_py": BuildParts},
)
