"""The part of lora-fx that works on checkpoints and adapter files, without torch and onnx.

The command `lora-fx-light` runs the modules of this distribution. Python programs get lora_fx by

    from lora_fx_light import lora_fx

which is the whole lora_fx where the distribution lora-fx is installed too, and otherwise the part
that is here. An import of a module that is left out here says what to install.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lora_fx as lora_fx

COMMANDS = ("merge", "convert", "extract", "verify", "doctor")
"""The commands of lora-fx that this distribution has."""
MODULES = Path(__file__).parent / "modules"
"""The folder that lora_fx is in. Both distributions can be installed, since no file is in both."""


class LeftOut:
    """A finder of modules, asked last: it raises for a module of lora-fx that is not here."""

    @staticmethod
    def find_spec(
        name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise for a module of lora-fx; return None for any other.

        Raises:
            LeftOutError: The module is one of lora-fx. Names it, and what to install.
        """
        if not name.startswith("lora_fx."):
            return None
        from lora_fx.errors import LeftOutError

        raise LeftOutError(
            f"this needs torch or ONNX, which lora-fx-light leaves out ({name})",
            "pip install lora-fx, and do the same with lora-fx",
        )


def main() -> None:
    """Run the command line with the modules of this distribution."""
    sys.path.insert(0, str(MODULES))
    sys.meta_path.append(LeftOut)
    from lora_fx.cli.distribution import Distribution
    from lora_fx.cli.run import main

    main(
        distribution=Distribution(
            name="lora-fx-light",
            commands=COMMANDS,
            summary="Merge low-rank adapters into checkpoint files, convert and check them, and "
            "extract them from two checkpoints, tensor by tensor, without torch and ONNX.",
            epilog="Models are Hugging Face folders, hf:ORG/NAME[@REVISION] of the Hub and "
            ".safetensors files. For other models and commands: pip install lora-fx.",
        )
    )


def _whole_or_part() -> ModuleType:
    """Import lora_fx: the whole one if it is installed, and otherwise the part that is here."""
    if find_spec("lora_fx") is None:
        sys.path.append(str(MODULES))
        sys.meta_path.append(LeftOut)
    return import_module("lora_fx")


if not TYPE_CHECKING:  # so that type checkers know no other names

    def __getattr__(name: str) -> ModuleType:
        if name == "lora_fx":
            return _whole_or_part()
        raise AttributeError(f"module 'lora_fx_light' has no attribute {name!r}")
