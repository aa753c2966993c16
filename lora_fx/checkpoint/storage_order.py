"""Square weights that are stored [in, out], where their shape cannot tell.

One adapter may meet both kinds, as in a model of a BERT encoder and a GPT-2 decoder. So a weight
is decided by its own kind: the same module name in the same part of the model first, then, for
the names that Conv1D layers have, the other such names and the config.
"""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import IN_OUT_EXPERTS
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, ReplacedRows, Rotation
from lora_fx.checkpoint.renaming import Renaming
from lora_fx.checkpoint.tensor_uses import CONV1D_MODELS, CONV1D_NAMES
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView

Votes = dict[tuple[int, str, str], set[bool]]
"""(dimensions, part of the model, module name) → what shapes that can tell say."""


def lookup(entry: Entry) -> bool:
    """True for an update of a table that is looked up."""
    return isinstance(entry, LowRank) and entry.origin.op == "embedding"


def turned_weights(
    adapter: Adapter, rename: Renaming, where: str, notes: list[str]
) -> frozenset[str]:
    """Names of square weights that are stored [in, out].

    Raises:
        LoraFxError: fan_in_fan_out, where the model has no such layer.
    """
    votes: Votes = {}
    square, tensors = list[str](), rename.tensors
    for key, entry in adapter.entries.items():
        name = rename(base_name(key))
        info = tensors.get(name)
        if info is None or isinstance(entry, (Full, ReplacedRows, Rotation)) or lookup(entry):
            continue
        if entry.layout is not None or len(info.shape) < 2 or info.dtype == "int8":
            continue  # whoever quantises a layer to int8 stores it [out, in], Conv1D too
        sides, matrix = (entry.shape[-2], entry.shape[-1]), info.shape[-2:]
        if sides[0] == sides[1] == matrix[0] == matrix[1]:
            square.append(name)
        elif matrix in (sides, sides[::-1]):
            votes.setdefault(_kind(name, info), set()).add(matrix == sides[::-1])
    flag = bool(adapter.metadata.get("fan_in_fan_out"))
    kinds = model_types(rename.config)
    seen = set().union(*(v for k, v in votes.items() if k[0] == 2))
    linear = seen == {False} or (not seen and bool(kinds))
    if flag and square and linear and not kinds & CONV1D_MODELS:
        raise LoraFxError(
            f"{where}: the adapter has fan_in_fan_out, but the model's weights are [out, in]; "
            f"{square[0]!r} is square, so that its shape cannot tell",
            "set fan_in_fan_out to false in adapter_config.json if the model's layers are Linear",
        )
    flat = [n for n in square if len(tensors[n].shape) == 2]
    if flat and not votes and not flag and not kinds:
        notes.append(
            f"{where}: nothing says how square weights are stored, {flat[0]} among them; taken as "
            "[out, in]"
        )
    return frozenset(n for n in square if _turned(n, tensors[n], votes, kinds, flag))


def _kind(name: str, info: TensorInfo) -> tuple[int, str, str]:
    module = name.removesuffix(".weight")
    return len(info.shape), name.partition(".")[0], module.rpartition(".")[2]


def _turned(name: str, info: TensorInfo, votes: Votes, kinds: frozenset[str], flag: bool) -> bool:
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
    known = bool(kinds & CONV1D_MODELS)
    return pure or (conv1d if known else flag)


def _named(leaf: str) -> bool:
    return bool(CONV1D_NAMES.search(f"{leaf}.weight"))


def model_types(config: JsonView) -> frozenset[str]:
    """model_type of the model and of its parts."""
    inner = [v for v in config.values() if isinstance(v, dict)]
    types = [c.get("model_type") for c in (config, *inner)]
    return frozenset(t for t in types if isinstance(t, str) and t)
