"""Recognise the base of an adapter by a sample of the weights that the adapter changes.

metadata["base"] of an adapter is {"version", "dtype", "names", "sample"}. `sample` is the sha256
over the parameters of all low-rank keys, in the order of their `names`: name, shape, and the
first and last 4096 elements of the stored tensor as the model held them. `dtype` is that of the
parameters, or {name: dtype} where they differ. `names` stay when updates are taken out later.

A checkpoint's values are cast to `dtype` before they are hashed, so a bfloat16 file that was
loaded as float32 is the same base.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array, numpy_dtype
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import stored_elements
from lora_fx.targets.keys import base_name
from lora_fx.text import Json, JsonView

VERSION = 1


NAMED = "base_model_name_or_path"
"""The field of an adapter's metadata that names its base, as PEFT writes it."""


FIELD = "base"


ENDS = 4096
"""Elements at each end of a tensor that the sample holds."""


def fingerprint(samples: Iterable[tuple[str, tuple[int, ...], Array]]) -> Json:
    """The fingerprint of a base.

    Args:
        samples: (name, shape, both ends) of every parameter; the ends in the model's dtype, see
            `ends`.
    """
    rows = sorted(samples, key=lambda row: row[0])
    dtypes = {name: str(values.dtype) for name, _, values in rows}
    different = set(dtypes.values())
    dtype = different.pop() if len(different) == 1 else dtypes
    names = [name for name, _, _ in rows]
    return {"version": VERSION, "dtype": dtype, "names": names, "sample": _digest(rows)}


def file_fingerprint(keys: Iterable[str], tensors: Tensors) -> Json:
    """{"base": fingerprint} of a stored checkpoint; empty if it lacks one of the parameters."""
    stored: dict[str, TensorInfo] = {}
    for name in parameters_of(keys):
        info = tensors.get(name)
        if info is None or info.dtype not in FLOATING:
            return {}
        stored[name] = info
    if not stored:
        return {}
    samples = ((name, info.shape, _read(info, info.dtype)) for name, info in stored.items())
    return {FIELD: fingerprint(samples)}


def ends(length: int) -> tuple[slice, slice]:
    """The first and the last elements of a flat tensor; they overlap where it is short."""
    return slice(ENDS), slice(max(0, length - ENDS), length)


def parameters_of(keys: Iterable[str]) -> list[str]:
    """The parameters of low-rank keys that a checkpoint can hold: no computed weights."""
    names = {base_name(key) for key in keys}
    return sorted(name for name in names if not name.endswith("~"))


Sample = tuple[tuple[int, ...], Array]
"""(shape, first and last elements in the requested dtype); see `ends`."""


class Unknown(Exception):
    """A parameter cannot be sampled; the message gives the reason."""


def sample_of(name: str, info: TensorInfo | None, dtype: str) -> Sample:
    """The sample of a parameter's tensor in a checkpoint; raises Unknown."""
    if info is None:
        raise Unknown(f"the checkpoint has no tensor {name!r}")
    if info.dtype not in FLOATING:
        raise Unknown(f"{name!r} is {info.dtype} here and was {dtype} in training")
    return info.shape, _read(info, dtype)


def compared(
    recorded: JsonView | None, sample: Callable[[str, str], Sample]
) -> tuple[bool | None, str]:
    """Compare weights with the record of those that an adapter was trained on.

    Args:
        recorded: metadata["base"] of the adapter.
        sample: (parameter, dtype) → its sample; raises Unknown.

    Returns:
        True, False, or None with the reason.
    """
    if recorded is None:
        return None, "the adapter does not record which weights it was trained on"
    damaged = "the adapter's record of its base is damaged"
    try:
        version = recorded["version"]
        dtype = recorded["dtype"]
        digest = str(recorded["sample"])
        names = sorted(str(name) for name in recorded["names"])
    except (TypeError, LookupError):
        return None, damaged
    if version != VERSION:
        return None, f"the adapter's record of its base has the unknown version {version!r}"
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(names, str(dtype))
    if not names or not all(str(dtypes.get(name)) in FLOATING for name in names):
        return None, damaged

    rows: list[tuple[str, tuple[int, ...], Array]] = []
    try:
        for name in names:
            shape, values = sample(name, str(dtypes[name]))
            rows.append((name, shape, values))
    except Unknown as why:
        return None, str(why)
    return _digest(rows) == digest, ""


def _digest(rows: Iterable[tuple[str, tuple[int, ...], Array]]) -> str:
    """The sha256 over the samples of parameters."""
    digest = hashlib.sha256()
    for name, shape, values in rows:
        digest.update(json.dumps([name, list(shape), str(values.dtype)]).encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def _read(info: TensorInfo, dtype: str) -> Array:
    """Read both ends of a stored tensor, and cast them."""
    first, last = stretches(info, ENDS, (0.0, 1.0))
    return cast(np.concatenate([first[:ENDS], last[-ENDS:]]), dtype)


def stretches(info: TensorInfo, count: int, places: Sequence[float]) -> list[Array]:
    """Read about `count` elements of a tensor at each of some places; 0 is its start, 1 its end.

    Fewer where it is shorter; more of codes, which are read by whole rows.
    """
    read: Callable[[int, int], Array]
    if isinstance(info, CodesInfo):
        size = math.prod(info.shape[:-1])
        count = -(-count // info.shape[-1])
        read = info.weight.rows
    else:
        # by its bytes: the shape of a stack is that of all its matrices, and these are the first's
        size = (info.stop - info.start) // numpy_dtype(info.dtype).itemsize
        read = partial(stored_elements, info)
    count = min(count, size)
    blocks = []
    for place in places:
        start = int(place * (size - count))
        blocks.append(read(start, start + count).reshape(-1))
    return blocks


def cast(values: Array, dtype: str) -> Array:
    """Cast values to a dtype by its name; those beyond its range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(numpy_dtype(dtype))
