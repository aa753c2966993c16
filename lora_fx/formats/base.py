"""What a foreign format has no field for, as JSON in the header of files that lora-fx writes.

The format's own tensors stay as every reader expects them. Under `lora_fx_names` stands, for each
update, the key that it had, its layout, use and variant, so that reading our own file gives back
the adapter that was written. Other readers pass over it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, Kronecker, ReplacedRows, from_json, to_json
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, check_format, one_line, stamp
from lora_fx.files.safetensors import Header, first_bytes, read_header
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import finite, is_float, refuse_other_kinds
from lora_fx.formats.format import FileHead
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView

FIELD = "lora_fx_names"
Arrays = Mapping[str, Array]
"""Tensors by name, or by what they are of a module."""


def describe(adapter: Adapter, names: Mapping[str, str]) -> str:
    """The JSON for an adapter whose key K is called names[K] in the file.

    Raises:
        LoraFxError: Metadata is no JSON.
    """
    rows = {}
    for key, entry in adapter.entries.items():
        if isinstance(entry, (Full, ReplacedRows)):
            continue  # no format that needs these names has them
        numbers = ["use", "variant", "alpha"] if isinstance(entry, LowRank) else []
        numbers += ["scale"] if isinstance(entry, Kronecker) else []
        rows[names[key]] = {"key": key, **to_json(entry, "layout", "extra", *numbers)}
    metadata = {k: v for k, v in adapter.metadata.items() if k != "notes"}
    metadata |= adapter.names.to_json() if adapter.names else {}
    return metadata_text({**stamp(), "names": rows, "metadata": metadata})


def metadata_text(metadata: JsonView) -> str:
    """Metadata as a file's header holds it; raises LoraFxError where it is no JSON."""
    try:
        return json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoraFxError(
            f"the adapter's metadata is no JSON: {one_line(error)}",
            "keep texts, numbers, lists and objects there",
        ) from error


def restore(
    entries: Mapping[str, Entry], header: Mapping[str, str], file: str
) -> tuple[dict[str, Entry], Json, bool]:
    """Entries of a file under the keys that they were written from.

    Returns:
        The entries, the metadata that was written, and True when no key is the file's own name.

    Raises:
        LoraFxError: The JSON is damaged, or says something else than the tensors.
    """
    if FIELD not in header:
        return dict(entries), {}, False
    whole = json_object(header[FIELD], f"{file}: metadata {FIELD}")
    try:
        check_format(whole, f"{file}: metadata {FIELD}")
        rows, metadata = dict(whole["names"]), dict(whole["metadata"])
        result: dict[str, Entry] = {}
        for name, entry in entries.items():
            row = rows.get(name)
            key = name if row is None else str(row["key"])
            if key in result:
                raise ValueError(f"{key!r} is there twice")
            result[key] = entry if row is None else _restored(entry, row)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LoraFxError(
            f"{file}: metadata {FIELD} does not fit the tensors: "
            f"{type(error).__name__} {one_line(error)}",
            f"the file was edited; convert it again, or take {FIELD} out of its header",
        ) from error
    return result, metadata, all(name in rows for name in entries)


def _restored(entry: Entry, row: JsonView) -> Entry:
    assert not isinstance(entry, (Full, ReplacedRows))  # see describe
    made = from_json(entry, row)
    if not math.isclose(made.scale, entry.scale, rel_tol=1e-6):
        raise ValueError(
            f"{row['key']!r} has scale {entry.scale:g}, and {made.scale:g} by the JSON"
        )
    if not holds(made.layout, made.shape):
        raise ValueError(f"{row['key']!r} is {list(made.shape)}, which its layout does not hold")
    return made


def holds(layout: Layout | None, shape: tuple[int, ...]) -> bool:
    """True when a layout is sound and has the sizes of [*batch, out, in], or is not known."""
    if layout is None:
        return True
    axes = sorted(layout.batch + layout.out + layout.in_)
    return (
        axes == list(range(len(layout.shape)))
        and math.prod(layout.shape) == math.prod(layout.stored)
        and (*layout.batch_shape, layout.out_size, layout.in_size) == shape
    )


# Tensors of a foreign file as fp32 masters and numbers, checked on the way in.


@dataclass(frozen=True)
class File:
    """What reading one file needs everywhere: its name for messages, and the notes."""

    name: str
    notes: list[str] = field(default_factory=list)

    def master(self, name: str, array: Array) -> Array:
        """One tensor as contiguous fp32; raises as `check`."""
        self.check(name, array)
        master = np.ascontiguousarray(array, np.float32)
        if array.dtype == np.float64 and not np.array_equal(master, array):
            self.notes.append(f"{self.name}: {name!r} was rounded from fp64 to fp32")
        return master

    def check(self, name: str, array: Array) -> None:
        """Check a tensor of floats.

        Raises:
            LoraFxError: It is empty, no float, or not finite.
        """
        if array.size == 0:
            raise self.error(name, f"has shape {list(array.shape)}; expected no size of 0")
        if not is_float(array):
            raise self.error(
                name,
                f"has dtype {array.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            )
        self.check_finite(name, array)

    def vector(self, name: str, array: Array, size: int) -> Array:
        """A magnitude or a bias as fp32 [size]; PEFT keeps axes of size 1 around it."""
        if array.size != size or size not in array.shape:
            raise self.error(
                name,
                f"has shape {list(array.shape)}; expected {size} numbers, one for each row of B",
                "does it come from the same file as B?",
            )
        return self.master(name, array).reshape(-1)

    def check_finite(self, name: str, array: Array) -> None:
        """Raise for a float tensor that holds NaN or Inf."""
        if not finite(array):
            raise self.error(
                name,
                "has NaN or infinite values; expected finite ones",
                "training may have diverged; use an earlier checkpoint",
            )

    def alpha(self, name: str, array: Array | None) -> float | None:
        """The number in an alpha tensor; None where there is none, which means alpha = rank.

        Raises:
            LoraFxError: Not one finite number, or 0: that is rank to its trainers (kohya, LyCORIS)
                and no effect at all to other readers.
        """
        if array is None:
            return None
        if array.size != 1 or not (is_float(array) or array.dtype.kind in "iu"):
            raise self.error(name, f"is {array.dtype} {list(array.shape)}; expected one number")
        value = float(array.reshape(()))
        if not math.isfinite(value) or value == 0.0:
            raise self.error(
                name,
                f"is {value:g}; expected a finite number that is not 0",
                "some readers take 0 as the rank and some as no effect; write the number you mean",
            )
        return value

    def modules(
        self,
        tensors: Arrays,
        split: Callable[[str], tuple[str, str] | None],
        unknown: Callable[[str], LoraFxError],
    ) -> dict[str, dict[str, Array]]:
        """Tensors by the module that they are of, and by what they are of it.

        Args:
            tensors: By the names of the file.
            split: Name → the two; None for a name of another kind of file.
            unknown: Such a name → the error.
        """
        found: dict[str, dict[str, Array]] = {}
        for name, array in tensors.items():
            at = split(name)
            if at is None:
                raise unknown(name)
            if found.setdefault(at[0], {}).setdefault(at[1], array) is not array:
                raise self.error(name, f"is a second {at[1]} of {at[0]!r}; expected one")
        return found

    def error(self, name: str, what: str, hint: str = "is the file complete?") -> LoraFxError:
        """An error about one tensor."""
        return LoraFxError(f"{self.name}: {name!r} {what}", hint)


def module_and_part(pattern: re.Pattern[str], name: str) -> tuple[str, str] | None:
    """What a pattern's two groups take of a tensor's name; None where it is none of its names."""
    match = pattern.fullmatch(name)
    return (match[1], match[2]) if match else None


def turned_notes(adapter: Adapter, format: str) -> list[str]:
    """A note on weights that are stored [in, out], of which a format has no word."""
    said = f"the model stores weights [in, out], of which readers of {format} know nothing"
    return [said] if adapter.metadata.get("fan_in_fan_out") else []


KEEPS = "save it as peft, which keeps everything"


def refused(what: str, key: str, why: str, hint: str = KEEPS) -> LoraFxError:
    """An error about an update that a kind of file cannot say."""
    return LoraFxError(f"{what} cannot say the update of {key!r}: {why}", hint)


# What a file is, by its header and what lies beside it.


def tensors_head(path: Path) -> FileHead:
    """See a safetensors file, or a pickle within `trusting`.

    Raises:
        LoraFxError: A pickle, a Git LFS pointer, no safetensors file, or a damaged one.
    """
    refuse_other_kinds(path)
    return head_with(read_header(path), first_bytes(path), path)


def head_with(header: Header, head: bytes, path: Path) -> FileHead:
    """What is seen of a file with such a header and such first bytes."""
    return FileHead(
        head,
        names=tuple(header.tensors),
        metadata=header.metadata,
        config=has_config(path),
        elements=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
    )


def has_config(path: Path) -> bool:
    """Whether adapter_config.json lies beside a file."""
    return (path.parent / "adapter_config.json").is_file()


# The tensors of one adapter file, each checked as it is read.


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
                f"has shape {list(array.shape)}; expected two sizes or more, none of them 0",
                "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
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
