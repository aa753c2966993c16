"""Run a graph in fp64, or with weights moved by half a unit, to see the effect of rounding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx


class Wide(fx.Interpreter):
    """A graph in fp64."""

    @functools.cached_property
    def writes(self) -> bool:
        """Whether an op writes into a tensor, which the ops after it read."""
        schemas = [getattr(node.target, "_schema", None) for node in self.graph.nodes]
        return any(schema is not None and schema.is_mutable for schema in schemas)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model: in fp64 for each of its readers, or for all where one writes."""
        tensor = super().get_attr(target, args, kwargs)
        if self.writes:
            return self.read(tensor)
        return tensor

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of an op, on numbers in fp64; an embedding's rows become it when gathered."""
        if target is not torch.ops.aten.embedding.default:
            args = fx.node.map_aggregate(args, self.read)
            kwargs = fx.node.map_aggregate(kwargs, self.read)
        return self.read(super().call_function(target, args, kwargs))

    def read(self, x: Any) -> Any:
        """Implement `Wide.read`; see `widened`."""
        return widened(x)


def widened(x: Any) -> Any:
    """A float as fp64, and a float dtype as fp64; anything else unchanged."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    return x


def nearby(x: Any, generator: torch.Generator) -> Any:
    """A tensor with its floats moved at random by up to a unit of their last place.

    In 32 bits half of them stay, as 1 + ε/2 is 1, and half move: more than rounding alone would.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return x * (1 + signs * torch.finfo(x.dtype).eps / 2)
