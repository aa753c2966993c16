"""Graph runs in fp64, or with moved weights, which show the effect of rounding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx


class Wide(fx.Interpreter):
    """An interpreter that runs a graph in fp64."""

    @functools.cached_property
    def writes(self) -> bool:
        """Whether some op writes into a tensor, which later ops read."""
        schemas = [getattr(node.target, "_schema", None) for node in self.graph.nodes]
        return any(schema is not None and schema.is_mutable for schema in schemas)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor of the model; in fp64 here only if some op writes into tensors."""
        tensor = super().get_attr(target, args, kwargs)
        if self.writes:
            return self.read(tensor)
        return tensor

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on fp64 numbers; an embedding gathers its rows before they become fp64."""
        if target is not torch.ops.aten.embedding.default:
            args = fx.node.map_aggregate(args, self.read)
            kwargs = fx.node.map_aggregate(kwargs, self.read)
        return self.read(super().call_function(target, args, kwargs))

    def read(self, x: Any) -> Any:
        """Return an input or result in fp64; subclasses may override this."""
        return widened(x)


def widened(x: Any) -> Any:
    """Return a float tensor or float dtype as fp64; anything else unchanged."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    return x


def nearby(x: Any, generator: torch.Generator) -> Any:
    """Return a tensor with its floats moved at random by up to a unit of their last place.

    In 32 bits half of them stay, as 1 + ε/2 is 1, and half move: more than rounding alone would.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return (x * (1 + signs * torch.finfo(x.dtype).eps / 2)).to(x.dtype)
