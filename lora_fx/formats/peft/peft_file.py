"""The tensors of one adapter file, each checked as it is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.files.tensor_files import is_float
from lora_fx.formats.checked_file import Arrays, File
from lora_fx.text import JsonView


@dataclass(frozen=True, kw_only=True)
class PeftFile(File):
    """One file and its config.

    Attributes:
        tensors: All of the file's, by name.
        config: adapter_config.json.
        config_file: Name of the config, for messages.
    """

    tensors: Arrays
    config: JsonView
    config_file: str

    def factor(self, name: str) -> Array:
        """A or B as an fp32 master, two axes or more."""
        array = self.tensors[name]
        if array.size == 0 or array.ndim < 2:
            raise self.error(
                name,
                f"has shape {list(array.shape)}; expected two or more sizes, none of them 0",
                "if it was saved under ZeRO-3 or FSDP, gather the shards and save it again",
            )
        return self.master(name, array)

    def numbers(self, name: str, size: int) -> Array:
        """The vector of a name."""
        return self.vector(name, self.tensors[name], size)

    def full(self, name: str) -> Full:
        """A whole tensor; narrow floats become fp32, other dtypes stay."""
        value = self.tensors[name]
        if is_float(value):
            self.check_finite(name, value)
            if value.dtype.itemsize < 4:
                value = value.astype(np.float32)
        return Full(value)

    def add(self, entries: dict[str, Entry], key: str, value: Entry, name: str) -> None:
        """Put an entry under its key; a second one is an error."""
        if key in entries:
            raise self.error(
                name,
                f"is a second entry for {key!r}; expected one",
                "the file was edited; save the adapter again",
            )
        entries[key] = value
