"""The tensors of one adapter file, each checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import finite, is_float


class PeftFile:
    """One file and its config.

    Attributes:
        tensors: All of the file's, by name.
        config: adapter_config.json.
        file: Name of the tensor file, for messages.
        config_file: Name of the config, for messages.
        notes: What should be said to the user; added to while reading.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        file: str,
        config_file: str,
        notes: list[str],
    ) -> None:
        """Keep them; nothing is read yet."""
        self.tensors, self.config, self.notes = tensors, config, notes
        self.file, self.config_file = file, config_file

    def factor(self, name: str) -> Array:
        """A or B as an fp32 master, two axes or more."""
        array = self.tensors[name]
        if array.size == 0 or array.ndim < 2:
            raise LoraFxError(
                f"{self.file}: {name!r} has shape {list(array.shape)}; expected two sizes or more, "
                "none of them 0",
                "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
            )
        return self._master(name)

    def vector(self, name: str, size: int) -> Array:
        """A magnitude or a bias as fp32 [size]; PEFT keeps axes of size 1 around it."""
        array = self.tensors[name]
        if array.size != size or size not in array.shape:
            raise LoraFxError(
                f"{self.file}: {name!r} has shape {list(array.shape)}; expected {size} numbers, "
                "one for each row of B",
                "does it come from the same file as B?",
            )
        return self._master(name).reshape(-1)

    def full(self, name: str) -> Full:
        """A whole tensor; narrow floats become fp32, other dtypes stay."""
        value = self.tensors[name]
        if is_float(value):
            self._check_finite(name)
            if value.dtype.itemsize < 4:
                value = value.astype(np.float32)
        return Full(value)

    def _master(self, name: str) -> Array:
        array = self.tensors[name]
        if not is_float(array):
            raise LoraFxError(
                f"{self.file}: {name!r} has dtype {array.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            )
        self._check_finite(name)
        master = np.ascontiguousarray(array, np.float32)
        if array.dtype == np.float64 and not np.array_equal(master, array):
            self.notes.append(f"{self.file}: {name!r} was rounded from fp64 to fp32")
        return master

    def _check_finite(self, name: str) -> None:
        if not finite(self.tensors[name]):
            raise LoraFxError(
                f"{self.file}: {name!r} has NaN or infinite values; expected finite ones",
                "training may have diverged; use an earlier checkpoint",
            )

    def add(self, entries: dict[str, Entry], key: str, value: Entry, name: str) -> None:
        """Put an entry under its key; a second one is an error."""
        if key in entries:
            raise LoraFxError(
                f"{self.file}: {name!r} is a second entry for {key!r}; expected one",
                "the file was edited; save the adapter again",
            )
        entries[key] = value
