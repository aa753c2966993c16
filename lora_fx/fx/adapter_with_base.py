"""Turn an adapter's changes of whole tensors into whole tensors of a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.residual import on_base
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.fx.tensors import to_numpy


def with_base(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with the whole tensors that its changes of biases and its trained rows make.

    An update of a base from which its start took a part becomes one of the base as it is.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    entries = dict(adapter.entries)
    for key, entry in adapter.entries.items():
        if key not in tensors:
            continue
        if isinstance(entry, LowRank) and entry.mutated:
            stored = to_numpy(tensors[key])
            if adapter.metadata.get("fan_in_fan_out"):
                stored = stored.T
            entries[key] = on_base(stored, entry, repr(key))
        elif isinstance(entry, ReplacedRows):
            value = to_numpy(tensors[key]).astype(np.float32)
            value[list(entry.index)] = entry.value
            entries[key] = Full(value, tied=True)  # one name alone has a tensor of its own here
        elif isinstance(entry, Dense):
            value = to_numpy(tensors[key]).astype(np.float32)
            if value.ndim == 1 and value.shape == entry.value.shape:
                entries[key] = Full(value + np.float32(entry.scale) * entry.value, tied=True)
    return replace(adapter, entries=entries)
