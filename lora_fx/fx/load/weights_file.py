"""The tensors of a file as a module's weights: every name and shape must fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError, lead_between, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.tensors import from_numpy
from lora_fx.text import some


def read_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill a module from a file of tensors; every name and shape must fit. Returns notes.

    On the meta device the names and shapes are checked and nothing is read. Tied tensors need
    one of their names; counters of batches seen may be missing, as in older files.
    """
    infos = tensors(path)
    state = module.state_dict(keep_vars=True)
    first_names: dict[int, str] = {}
    ties = {name: first_names.setdefault(id(tensor), name) for name, tensor in state.items()}
    expected = {
        name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in state.items()
    }
    optional = [name for name in state if name.endswith("num_batches_tracked")]
    notes = check_fit(infos, expected, ties, str(path), optional)

    filled: dict[str, str] = {}  # first name of a tensor → the name that it was filled from
    for name, info in infos.items():
        target = state[name]
        if target.is_meta:
            continue
        value = from_numpy(stored(info)).to(target.device, target.dtype)
        filled_from = filled.setdefault(ties[name], name)
        if filled_from != name and not torch.equal(value, target):
            raise LoraFxError(
                f"{path}: {filled_from!r} and {name!r} differ, but the model has one tensor for "
                "both",
                "untie them in the model, or leave one of them out of the file",
            )
        with torch.no_grad():
            target.copy_(value)
    return notes


def check_fit(
    infos: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    ties: Mapping[str, str],
    where: str,
    optional: Iterable[str] = (),
) -> tuple[str, ...]:
    """Check that the tensors of a file are all of the expected ones and no others.

    No tensor is read.

    Args:
        infos: The tensors of the file.
        expected: Name → (shape, dtype) of the model; tied tensors under every name.
        ties: Every name → the first name of the same tensor; one of them is enough.
        where: The file, for messages.
        optional: Names that may be missing.

    Returns:
        What the dtypes will change: one note for each pair of dtypes that differ.

    Raises:
        LoraFxError: Missing and unexpected names and shapes that differ, all in one line.
    """
    filled = {ties.get(name, name) for name in infos}
    optional_names = set(optional)
    missing = []
    for name in expected:
        if ties.get(name, name) not in filled and name not in optional_names:
            missing.append(name)
    unexpected = [name for name in infos if name not in expected]

    misshapen = []
    other_kind = []
    casts: dict[tuple[str, str], list[str]] = {}
    for name, info in infos.items():
        if name not in expected:
            continue
        shape, dtype = expected[name]
        if info.shape != shape:
            misshapen.append(f"{name} {list(info.shape)} (expected {list(shape)})")
        if info.dtype != dtype:
            casts.setdefault((info.dtype, dtype), []).append(name)
            if info.dtype not in FLOATING or dtype not in FLOATING:
                other_kind.append(f"{name} {info.dtype} (expected {dtype})")

    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "of another kind": other_kind,
    }
    problems = []
    for fault, names in faults.items():
        if names:
            problems.append(f"{len(names)} {fault}: {_some(names)}")
    if problems:
        raise LoraFxError(
            f"{where} does not fit the model: {'; '.join(problems)}", _hint(filled, expected)
        )
    notes = []
    for (dtype, model_dtype), names in casts.items():
        notes.append(f"{where}: cast from {dtype} to {model_dtype}: {_some(names)}")
    return tuple(notes)


def _some(names: list[str]) -> str:
    return some([one_line(name, 100) for name in names])


def _hint(file_names: set[str], expected: Mapping[str, object]) -> str:
    """The hint, with the prefix that would make the names fit, if there is one."""
    verb, prefix = lead_between(expected, file_names)
    if not verb:
        return "is it the state_dict of this model?"
    return f"the file's names {verb} the prefix {prefix!r}"
