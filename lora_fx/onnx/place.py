"""Places of servers: where a copy of an exported .onnx file goes, and how it is copied."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lora_fx.errors import LoraFxError
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.load import data_names

MODEL = "model.onnx"


class Place(Protocol):
    """The place of a copy of an .onnx file for a server."""

    def config(self, model: Path) -> object:
        """The configuration that is written with the copy; raises if there can be none."""

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Copy an .onnx file, its data and its adapters to this place, next to a main output."""


def copy_model(model: Path, folder: Path) -> list[str]:
    """Copy an .onnx file, as MODEL, and its data into a folder; returns their names.

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
        shutil.copyfile(model.parent / name, copy)
    return [MODEL, *names]
