"""Square weights that are stored [in, out], where their shape cannot tell.

One adapter may meet both kinds, as in a model of a BERT encoder and a GPT-2 decoder. So a weight
is decided by its own kind: the same module name in the same part of the model first, then, for
the names that Conv1D layers have, the other such names and the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Change, Entry, Rows
from lora_fx.checkpoint.layouts import CONV1D_MODELS, CONV1D_NAMES, IN_OUT_EXPERTS
from lora_fx.checkpoint.loaded import STACKED
from lora_fx.checkpoint.renamed import Renaming
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.target import base_name

MARKED_EXPERTS = frozenset(("gpt_oss", "openai_privacy_filter"))
"""model_type of models whose stacks say `is_transposed`, which PEFT goes by."""

Votes = dict[tuple[int, str, str], set[bool]]
"""(dimensions, part of the model, module name) → what shapes that can tell say."""


def lookup(entry: Entry | Change) -> bool:
    """True for an update of a table that is looked up."""
    extra = getattr(entry, "extra", {})
    return bool(extra.get("op") == "embedding")


def turned_weights(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    rename: Renaming,
    where: str,
    notes: list[str],
) -> frozenset[str]:
    """Names of square weights that are stored [in, out].

    Raises:
        LoraFxError: fan_in_fan_out, where the model has no such layer.
    """
    votes: Votes = {}
    square: list[str] = []
    for key, entry in adapter.entries.items():
        name = rename(base_name(key))
        info = tensors.get(name)
        if info is None or isinstance(entry, (Full, Rows)) or lookup(entry):
            continue
        if entry.layout is not None or len(info.shape) < 2 or info.dtype == "int8":
            continue  # whoever quantises a layer to int8 stores it [out, in], Conv1D too
        sides, matrix = (entry.shape[-2], entry.shape[-1]), info.shape[-2:]
        if sides[0] == sides[1] == matrix[0] == matrix[1]:
            square.append(name)
        elif matrix in (sides, sides[::-1]):
            votes.setdefault(_kind(name, info), set()).add(matrix == sides[::-1])
    flag = bool(adapter.metadata.get("fan_in_fan_out"))
    kinds = _model_types(config)
    _check_flag(flag, square, votes, kinds, where)
    flat = [n for n in square if len(tensors[n].shape) == 2]
    if flat and not votes and not flag and not kinds:
        notes.append(
            f"{where}: nothing says how square weights are stored, {flat[0]} among them; taken as "
            "[out, in]"
        )
    return frozenset(n for n in square if _turned(n, tensors[n], votes, kinds, flag=flag))


def stacks_turned(adapter: Adapter, config: Mapping[str, Any]) -> bool | None:
    """How PEFT took the stacks of experts of a model, where its type says.

    PEFT writes in and out but not which of the two comes first in [E, …, …]. Until 0.18 it took
    every stack as [E, in, out], in 0.19 those of modules that say `is_transposed` the other way,
    since 0.20 those alone as [E, in, out].

    Returns:
        True for [E, in, out], False for [E, out, in], None where it is not known.
    """
    kinds = _model_types(config)
    marked = bool(kinds & MARKED_EXPERTS)
    if not marked and not kinds & STACKED:
        return None
    facts = adapter.metadata.get("peft")
    version = str(facts.get("peft_version") or "") if isinstance(facts, Mapping) else ""
    found = re.match(r"0\.(\d+)", version)
    if found is None:  # older, or edited
        return True if marked else None
    minor = int(found[1])
    return minor < 19 or marked != (minor == 19)


def _kind(name: str, info: TensorInfo) -> tuple[int, str, str]:
    module = name.removesuffix(".weight")
    return len(info.shape), name.partition(".")[0], module.rpartition(".")[2]


def _turned(
    name: str, info: TensorInfo, votes: Votes, kinds: frozenset[str], *, flag: bool
) -> bool:
    dims, part, _ = kind = _kind(name, info)
    own = votes.get(kind, set())
    if len(own) == 1:
        return True in own
    same = {k: v for k, v in votes.items() if k[0] == dims}
    if dims != 2:
        every = set().union(*same.values())
        return True in every if len(every) == 1 else bool(kinds & IN_OUT_EXPERTS)
    conv1d = bool(CONV1D_NAMES.search(name))
    near = set().union(*(v for k, v in same.items() if k[1] == part and conv1d == _named(k[2])))
    if len(near) == 1:
        return True in near
    pure = bool(kinds) and kinds <= CONV1D_MODELS  # all parts of the model have such layers
    if pure or (conv1d and kinds & CONV1D_MODELS):
        return True
    return flag and not kinds & CONV1D_MODELS


def _named(leaf: str) -> bool:
    return bool(CONV1D_NAMES.search(f"{leaf}.weight"))


def _check_flag(
    flag: bool, square: list[str], votes: Votes, kinds: frozenset[str], where: str
) -> None:
    seen = set().union(*(v for k, v in votes.items() if k[0] == 2))
    linear = seen == {False} or (not seen and bool(kinds))
    if flag and square and linear and not kinds & CONV1D_MODELS:
        raise LoraFxError(
            f"{where}: the adapter has fan_in_fan_out, but the model's weights are [out, in]; "
            f"{square[0]!r} is square, so that its shape cannot tell",
            "set fan_in_fan_out to false in adapter_config.json if the model's layers are Linear",
        )


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """model_type of the model and of its parts."""
    inner = [v for v in config.values() if isinstance(v, dict)]
    types = [c.get("model_type") for c in (config, *inner)]
    return frozenset(t for t in types if isinstance(t, str) and t)
