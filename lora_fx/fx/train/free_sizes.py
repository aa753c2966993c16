"""The check that free sizes stay free while a step is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.errors import LoraFxError
from lora_fx.fx.fake_tensors import FakeTensorMode
from lora_fx.patching import patched

aten = torch.ops.aten
UNROLLED = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""Recurrent ops, whose gradient torch traces for a fixed number of steps."""


@contextlib.contextmanager
def sizes_stay_free(
    fakes: FakeTensorMode, inputs: Mapping[str, Tensor], graph: fx.Graph
) -> Iterator[None]:
    """A block in which no free size of an input may become a number.

    The sizes of a finished capture are closed: torch goes on as if its example's held for all.
    """
    env = fakes.shape_env
    if env is None:
        yield
        return
    assumptions: list[tuple[Any, object]] = []
    with patched(env, _check_frozen=lambda expr, result: assumptions.append((expr, result))):
        yield
    for expr, result in assumptions:
        if not getattr(result, "is_number", False):  # a condition: the proof runs other sizes
            continue
        for name, tensor in inputs.items():
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size.node.expr in expr.free_symbols:
                    raise _fixed_size(name, axis, graph)


def _fixed_size(name: str, axis: int, graph: fx.Graph) -> LoraFxError:
    """Return the error for a free dimension that an operator's gradient fixes."""
    recurrences = sorted({str(node.target) for node in graph.nodes if node.target in UNROLLED})
    operators = ", ".join(recurrences) or "an operator's gradient"
    return LoraFxError(
        f"{name!r}: dimension {axis} is dynamic, but {operators} can train at one size only",
        f"fix it with --static {name}:{axis}; in Python with static=['{name}:{axis}']",
    )
