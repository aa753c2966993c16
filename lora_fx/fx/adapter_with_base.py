"""The conversion of an adapter's changes to whole tensors into the whole tensors of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import check_number, weight_hash
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.residual import on_base
from lora_fx.adapter.starts import matrix
from lora_fx.adapter.whole_values import as_whole_tensors
from lora_fx.dtypes import Array
from lora_fx.fx.tensors import to_numpy
from lora_fx.targets.found import Found


def with_base(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return the adapter with ΔW given whole and trained rows turned into whole tensors.

    An update of a base that its start changed becomes an update of the stored base.
    """
    transposed = bool(adapter.metadata.get("fan_in_fan_out"))
    tensors = dict(model.named_parameters(remove_duplicate=False))

    def read(key: str) -> Array | None:
        return to_numpy(tensors[key]) if key in tensors else None

    entries = as_whole_tensors(adapter.entries, read, transposed=transposed)
    for key, entry in adapter.entries.items():
        if key in tensors and isinstance(entry, LowRank) and entry.mutated:
            stored = to_numpy(tensors[key])
            if transposed:
                stored = stored.T
            entries[key] = on_base(stored, entry, repr(key))
    return replace(adapter, entries=entries)


def check_evaluated(adapter: Adapter, found: Found, read: Callable[[str], Array]) -> None:
    """Raise LoraFxError for updates that were evaluated on another base than a model.

    Args:
        adapter: Bound to the model.
        found: The model's targets.
        read: Gives a stored parameter of the model by name.
    """

    def hash_of(key: str) -> str:
        target = found[key]
        return weight_hash(matrix(target, read(target.parameter.name)))

    check_number(adapter, hash_of)
