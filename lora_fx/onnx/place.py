"""Places for servers: where a copy of an exported .onnx file goes, and how it is copied."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lora_fx.errors import LoraFxError
from lora_fx.files.copying import reflink
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.load import data_names

MODEL = "model.onnx"


class Place(Protocol):
    """The place of a copy of an .onnx file for a server."""

    def config(self, model: Path) -> object:
        """Return the configuration for the copy; raise if there can be none."""

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Copy an .onnx file, its data and its adapters to this place, next to a main output."""


def copy_model(model: Path, folder: Path) -> list[str]:
    """Copy an .onnx file, as MODEL, and its data into a folder; return their names.

    The copy of the data shares its blocks on disk with the original where the file system can. A
    hard link would share them everywhere, but the onnx package and onnx_ir refuse data that has
    two names, under both of them.

    Raises:
        LoraFxError: The data has the name of a file that is in the folder.
    """
    names = data_names(model)
    shutil.copyfile(model, folder / MODEL)
    for name in names:
        copy = folder / name
        if copy.exists():
            raise LoraFxError(
                f"{model}: its data file cannot be called {name!r}", "rename the file"
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not reflink(model.parent / name, copy):
            shutil.copyfile(model.parent / name, copy)
    return [MODEL, *names]
