"""The layer of a key-value cache that a call of a block may read and fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.fx.capture.snapshot import Snapshot, Token


@dataclass(frozen=True, eq=False)
class CacheLayer:
    """The layer of a filled cache that a call of a block may read and fill.

    Attributes:
        cache: The cache, an argument of the call.
        layers: Those of the cache.
        number: Which of them it is.
        places: (path in the block, attribute) of all that holds the number there.
    """

    cache: Any
    layers: Sequence[Any]
    number: int
    places: frozenset[tuple[str, str]]

    @property
    def layer(self) -> Any:
        """The layer of this number."""
        return self.layers[self.number]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer by the names of its attributes."""
        attributes = vars(self.layer)
        return {name: x for name, x in attributes.items() if isinstance(x, torch.Tensor)}

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store in the layer the tensors that a call puts there."""
        vars(self.layer).update(tensors)

    def kind(self, now: Snapshot) -> Token:
        """Return the layer's state without tensors; calls that are alike have equal states."""
        tensors = self.tensors()
        attributes = vars(self.layer)
        settings = {name: x for name, x in attributes.items() if name not in tensors}
        of_cache = {name: x for name, x in vars(self.cache).items() if name != "layers"}
        return (
            type(self.cache),
            now.token(of_cache),
            len(self.layers),
            type(self.layer),
            now.token(settings),
            tuple(tensors),
        )
