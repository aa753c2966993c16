"""Sizes that stay free while a step is traced."""

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


@contextlib.contextmanager
def _sizes_kept(
    fakes: FakeTensorMode, inputs: Mapping[str, Tensor], graph: fx.Graph
) -> Iterator[None]:
    """A block in which no free size of an input may become a number.

    The sizes of a finished capture are closed: torch goes on as if its example's held for all.
    """
    env, asked = fakes.shape_env, list[Any]()
    if env is None:
        yield
        return
    with patched(env, _check_frozen=lambda expr, result: asked.append((expr, result))):
        yield
    for expr, result in asked:
        if not getattr(result, "is_number", False):  # a condition: the proof runs other sizes
            continue
        for name, tensor in inputs.items():
            for d, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size.node.expr in expr.free_symbols:
                    found = sorted({str(n.target) for n in graph.nodes if n.target in UNROLLED})
                    what = ", ".join(found) or "an operator's gradient"
                    raise LoraFxError(
                        f"{name!r}: dimension {d} is free, and {what} has a step for one size only",
                        f"--static {name}:{d}; in Python capture(…, static=['{name}:{d}'])",
                    )


UNROLLED = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""Recurrences, whose gradient is one of a number of steps."""
