"""Square weights that are stored [in, out], where their shape cannot tell.

One model may have both orders, as one of a BERT encoder and a GPT-2 decoder has. So each weight is
decided by itself, by the weights that are most like it and are not square; see `is_stored_in_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import IN_OUT_EXPERTS
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Change, Entry, ReplacedRows, Rotation
from lora_fx.checkpoint.renaming import Renaming
from lora_fx.checkpoint.tensor_uses import CONV1D_MODELS, CONV1D_NAMES
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView


@dataclass(frozen=True)
class WeightKind:
    """Weights that a model stores in the same order.

    Attributes:
        dimensions: How many axes they have.
        part: The first part of their names, such as encoder.
        module: The last part of their modules' names, such as c_attn.
    """

    dimensions: int
    part: str
    module: str


def kind_of(name: str, info: TensorInfo) -> WeightKind:
    """The kind of a weight, by its name and shape."""
    part, _, _ = name.partition(".")
    _, _, module = name.removesuffix(".weight").rpartition(".")
    return WeightKind(len(info.shape), part, module)


@dataclass(frozen=True)
class Evidence:
    """The evidence of how the weights of a checkpoint are stored.

    Attributes:
        votes: Kind → the orders that adapted weights of it have, as far as their shapes tell:
            True for [in, out], False for [out, in].
        model_types: model_type of the model and of its parts.
        fan_in_fan_out: What the adapter's config says of its layers.
    """

    votes: Mapping[WeightKind, set[bool]]
    model_types: frozenset[str]
    fan_in_fan_out: bool

    def orders(self, accepts: Callable[[WeightKind], bool]) -> set[bool]:
        """The orders that weights of all accepted kinds have."""
        orders: set[bool] = set()
        for kind, votes in self.votes.items():
            if accepts(kind):
                orders |= votes
        return orders


def is_stored_in_out(name: str, info: TensorInfo, evidence: Evidence) -> bool:
    """Whether a square weight is stored [in, out], as GPT-2's Conv1D stores it, and not [out, in].

    The first of these that has an answer decides:
    1. adapted weights of its kind whose shapes leave no choice;
    2. of a stack of matrices: such weights of all stacks, else the model's type;
    3. of one matrix: such weights in its part of the model, if they and it both have names of
       Conv1D layers, or neither has;
    4. the model's type: all layers of these models are Conv1D, or those with Conv1D's names;
    5. the adapter's own `fan_in_fan_out`.
    """
    kind = kind_of(name, info)
    order = by_same_kind(kind, evidence)
    if order is None and kind.dimensions != 2:
        order = by_other_stacks(kind, evidence)
        if order is None:
            order = bool(evidence.model_types & IN_OUT_EXPERTS)
    if order is None:
        order = by_same_part(name, kind, evidence)
    if order is None:
        order = by_model_type(name, evidence.model_types)
    if order is None:
        order = evidence.fan_in_fan_out
    return order


def by_same_kind(kind: WeightKind, evidence: Evidence) -> bool | None:
    """The storage order of all adapted weights of a kind; None if there are none or they differ."""
    return _only(evidence.votes.get(kind, set()))


def by_other_stacks(kind: WeightKind, evidence: Evidence) -> bool | None:
    """The order of all adapted weights of as many dimensions; None as in `by_same_kind`."""
    return _only(evidence.orders(lambda other: other.dimensions == kind.dimensions))


def by_same_part(name: str, kind: WeightKind, evidence: Evidence) -> bool | None:
    """The order of the matrices in one part of the model; None as in `by_same_kind`.

    Those with names of Conv1D layers tell nothing of the others, and the other way round.
    """
    has_conv1d_name = is_conv1d_name(name)

    def is_near(other: WeightKind) -> bool:
        if other.dimensions != kind.dimensions or other.part != kind.part:
            return False
        return is_conv1d_name(f"{other.module}.weight") == has_conv1d_name

    return _only(evidence.orders(is_near))


def by_model_type(name: str, types: frozenset[str]) -> bool | None:
    """The order of a model's layers by its types; None where they tell nothing."""
    if types and types <= CONV1D_MODELS:  # all parts of the model have such layers
        return True
    if types & CONV1D_MODELS:
        return is_conv1d_name(name)
    return None


def _only(orders: set[bool]) -> bool | None:
    """The only order in the list; None if it has none or both."""
    if len(orders) != 1:
        return None
    return next(iter(orders))


def is_conv1d_name(name: str) -> bool:
    """True for the name of a weight that Conv1D layers of the GPT-2 family have."""
    return bool(CONV1D_NAMES.search(name))


def is_lookup(entry: Entry) -> bool:
    """True for an update of a table that is looked up."""
    return isinstance(entry, LowRank) and entry.origin.op == "embedding"


def in_out_weights(
    adapter: Adapter, rename: Renaming, where: str, notes: list[str]
) -> frozenset[str]:
    """Names of square weights that are stored [in, out].

    Args:
        adapter: Its updates.
        rename: Their names in the checkpoint.
        where: The checkpoint, for messages.
        notes: Gets a note if the storage order is unknown.

    Raises:
        LoraFxError: fan_in_fan_out, where the model has no such layer.
    """
    square, votes = _by_shapes(adapter, rename)
    fan_in_fan_out = bool(adapter.metadata.get("fan_in_fan_out"))
    evidence = Evidence(votes, model_types(rename.config), fan_in_fan_out)

    if square and fan_in_fan_out and _has_linear_layers_only(evidence):
        raise LoraFxError(
            f"{where}: the adapter has fan_in_fan_out, but the model stores weights [out, in]; "
            f"{square[0]!r} is square, so its shape cannot decide",
            "set fan_in_fan_out to false in adapter_config.json if the model's layers are Linear",
        )

    tensors = rename.tensors
    matrices = [name for name in square if len(tensors[name].shape) == 2]
    if matrices and not (votes or fan_in_fan_out or evidence.model_types):
        notes.append(
            f"{where}: the order in which square weights such as {matrices[0]} are stored is "
            "unknown; read as [out, in]"
        )
    return frozenset(name for name in square if is_stored_in_out(name, tensors[name], evidence))


def _by_shapes(adapter: Adapter, rename: Renaming) -> tuple[list[str], dict[WeightKind, set[bool]]]:
    """(square weights, orders that the shapes of the other weights show) of an adapter."""
    square: list[str] = []
    votes: dict[WeightKind, set[bool]] = {}
    for key, entry in adapter.entries.items():
        name = rename(base_name(key))
        info = rename.tensors.get(name)
        if info is None or not _has_doubtful_order(entry, info):
            continue

        *_, out, in_ = entry.shape
        stored = info.shape[-2:]
        if stored == (out, in_) == (in_, out):
            square.append(name)
        elif stored == (out, in_):
            votes.setdefault(kind_of(name, info), set()).add(False)
        elif stored == (in_, out):
            votes.setdefault(kind_of(name, info), set()).add(True)
    return square, votes


def _has_doubtful_order(entry: Entry, info: TensorInfo) -> TypeGuard[Change]:
    """Whether an update [out, in] fits a tensor in both storage orders."""
    if isinstance(entry, (Full, ReplacedRows, Rotation)) or is_lookup(entry):
        return False
    if entry.layout is not None or len(info.shape) < 2:
        return False
    return info.dtype != "int8"  # whoever quantises a layer to int8 stores it [out, in], Conv1D too


def _has_linear_layers_only(evidence: Evidence) -> bool:
    """Whether no matrix of the model is stored [in, out], as far as is known."""
    if evidence.model_types & CONV1D_MODELS:
        return False
    orders = evidence.orders(lambda kind: kind.dimensions == 2)
    if not orders:
        return bool(evidence.model_types)
    return orders == {False}


def model_types(config: JsonView) -> frozenset[str]:
    """model_type of the model and of its parts."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    types = [section.get("model_type") for section in (config, *inner)]
    return frozenset(kind for kind in types if isinstance(kind, str) and kind)
