"""The tensors of one adapter file, each checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import is_float
from lora_fx.formats.base import File
from lora_fx.text import JsonView


@dataclass(frozen=True)
class PeftFile:
    """One file and its config.

    Attributes:
        tensors: All of the file's, by name.
        config: adapter_config.json.
        seen: The tensor file's name, and what should be said to the user; added to while reading.
        config_file: Name of the config, for messages.
    """

    tensors: Mapping[str, Array]
    config: JsonView
    seen: File
    config_file: str

    @property
    def file(self) -> str:
        """Name of the tensor file, for messages."""
        return self.seen.name

    @property
    def notes(self) -> list[str]:
        """What should be said to the user."""
        return self.seen.notes

    def factor(self, name: str) -> Array:
        """A or B as an fp32 master, two axes or more."""
        array = self.tensors[name]
        if array.size == 0 or array.ndim < 2:
            raise LoraFxError(
                f"{self.file}: {name!r} has shape {list(array.shape)}; expected two sizes or more, "
                "none of them 0",
                "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
            )
        return self.seen.master(name, array)

    def vector(self, name: str, size: int) -> Array:
        """A magnitude or a bias as fp32 [size]; PEFT keeps axes of size 1 around it."""
        array = self.tensors[name]
        if array.size != size or size not in array.shape:
            raise LoraFxError(
                f"{self.file}: {name!r} has shape {list(array.shape)}; expected {size} numbers, "
                "one for each row of B",
                "does it come from the same file as B?",
            )
        return self.seen.master(name, array).reshape(-1)

    def full(self, name: str) -> Full:
        """A whole tensor; narrow floats become fp32, other dtypes stay."""
        value = self.tensors[name]
        if is_float(value):
            self.seen.check_finite(name, value)
            if value.dtype.itemsize < 4:
                value = value.astype(np.float32)
        return Full(value)

    def add(self, entries: dict[str, Entry], key: str, value: Entry, name: str) -> None:
        """Put an entry under its key; a second one is an error."""
        if key in entries:
            raise LoraFxError(
                f"{self.file}: {name!r} is a second entry for {key!r}; expected one",
                "the file was edited; save the adapter again",
            )
        entries[key] = value
