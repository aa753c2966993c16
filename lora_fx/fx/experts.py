"""The experts of a mixture, in a form that other runtimes have.

transformers computes experts by one grouped product, which neither ONNX nor plain ATen has where
torch lacks the kernel. Its batched form gathers every row's matrices instead: the same numbers by
common ops. Captures for export use it, by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx, nn

from lora_fx.fx.ops import row_of

GROUPED, BATCHED = "grouped_mm", "batched_mm"


def has_grouped(graph: fx.Graph) -> bool:
    """True when a graph has a grouped product."""
    return any((row := row_of(n)) is not None and row.op == GROUPED for n in graph.nodes)


@contextlib.contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """Within this block transformers' experts run batched; afterwards as before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    name = "_experts_implementation_internal"  # the public setter also reaches into sub-configs
    switched = [c for c in configs.values() if getattr(c, name, None) == GROUPED]
    for c in switched:
        setattr(c, name, BATCHED)
    try:
        yield
    finally:
        for c in switched:
            setattr(c, name, GROUPED)
