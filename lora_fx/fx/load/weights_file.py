"""The tensors of a file as a module's weights: every name and shape must fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.dtypes import FLOATING
from lora_fx.errors import (
    LoraFxError,
    lead_between,
    one_line,
)
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import TensorInfo, stored
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.tensors import from_numpy
from lora_fx.text import some


def read_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill a module from a file of tensors; every name and shape must fit. Returns notes.

    On the meta device the names and shapes are checked and nothing is read. Tied tensors need
    one of their names; counters of batches seen may be missing, as in older files.
    """
    found = tensors(path)
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(t), name) for name, t in state.items()}
    wanted = {n: (tuple(t.shape), dtype_name(t.dtype)) for n, t in state.items()}
    optional = [n for n in state if n.endswith("num_batches_tracked")]
    notes = check_fit(found, wanted, ties, str(path), optional)
    filled: dict[str, str] = {}
    for name, info in found.items():
        target = state[name]
        if target.is_meta:
            continue
        value = from_numpy(stored(info)).to(target.device, target.dtype)
        other = filled.setdefault(ties[name], name)
        if other != name and not torch.equal(value, target):
            raise LoraFxError(
                f"{path}: {other!r} and {name!r} differ, but are one tensor of the model",
                "untie them in the model, or leave one out of the file",
            )
        with torch.no_grad():
            target.copy_(value)
    return notes


def check_fit(
    found: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    ties: Mapping[str, str],
    where: str,
    optional: Iterable[str] = (),
) -> tuple[str, ...]:
    """Check that `found` is the whole of `wanted` and nothing else.

    Args:
        found: The tensors of the file.
        wanted: Name → (shape, dtype) of the model; tied tensors under every name.
        ties: Every name → the first name of the same tensor; one of them is enough.
        where: The file, for messages.
        optional: Names that may be missing.

    Returns:
        What the dtypes will change: one note for each pair of dtypes that differ.

    Raises:
        LoraFxError: Missing and unexpected names and shapes that differ, all in one line.
    """
    here = {ties.get(name, name) for name in found}
    missing = [n for n in wanted if ties.get(n, n) not in here and n not in set(optional)]
    unexpected = [n for n in found if n not in wanted]
    wrong: dict[str, list[str]] = {"missing": missing, "unexpected": unexpected}
    wrong |= {"of another shape": [], "of another kind": []}
    casts: dict[tuple[str, str], list[str]] = {}
    for name in (n for n in found if n in wanted):
        t, (shape, dtype) = found[name], wanted[name]
        if t.shape != shape:
            said = f"{name} {list(t.shape)} (expected {list(shape)})"
            wrong["of another shape"].append(said)
        if t.dtype != dtype:
            casts.setdefault((t.dtype, dtype), []).append(name)
            if not {t.dtype, dtype} <= {*FLOATING}:
                said = f"{name} {t.dtype} (expected {dtype})"
                wrong["of another kind"].append(said)
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names]
    if problems:
        raise LoraFxError(
            f"{where} does not fit the model: {'; '.join(problems)}", _hint(here, wanted)
        )
    return tuple(f"{where}: cast from {a} to {b}: {_some(n)}" for (a, b), n in casts.items())


def _some(names: list[str]) -> str:
    return some([one_line(n, 100) for n in names])


def _hint(here: set[str], wanted: Mapping[str, object]) -> str:
    """What to do, with the prefix that would make the names fit, if there is one."""
    verb, lead = lead_between(wanted, here)
    said = f"the file's names {verb} the prefix {lead!r}"
    return said if verb else "is it the state_dict of this very model?"
