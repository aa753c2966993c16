"""How far rounding moves a torch model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import fx

from lora_fx.compare import (
    grow,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import alike, copied
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.graph.rounding import Wide
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Extents, Named
from lora_fx.passes.proofs.graph_choices import move
from lora_fx.passes.proofs.proof_inputs import is_real, outside
from lora_fx.passes.proofs.reference import SEEDS

FEW = 8
"""Numbers of an output, a loss, of which three moves of the weights tell too little."""


def own_errors(
    model: CapturedModule,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    run: Callable[[Named], dict[str, Array]] | None = None,
) -> Iterator[dict[str, float]]:
    """Per output, how far rounding moves a model's values: the largest so far of several inputs.

    It is the rel of its fp32 values to its own in fp64, and of those with every weight moved by
    half a unit of its last place, which is what a fold does. One input may round well by chance, a
    user's too, so every size is drawn with every seed. Where no fp64 run is possible, the moved
    weights alone tell.

    Args:
        model: Whose rounding it is.
        arrays: A user's inputs, which come first.
        sizes: Instead of those of the capture.
        run: Runs the model, and may know the outputs from before.
    """
    run = run or model.flat
    sizes = model.captured.inputs.checks if sizes is None else sizes
    example = model._in_own_dtype()
    calls: list[Callable[[], Named]]
    calls = [partial(model.sample, size, None, seed) for size in sizes for seed in SEEDS]
    if arrays is not None:
        calls.insert(0, partial(model.sample, sizes[0], arrays))
    elif is_real(example):  # what is drawn need not fit
        calls.insert(0, lambda: example)
    worst: dict[str, float] = {}
    graph = model.graph(False).graph
    exactly = model.flat if random_ops(graph) else _wide(model, graph)  # fp64 draws other numbers
    runs: list[tuple[Named, dict[str, Array]]] = []
    for call in calls:
        try:
            named = call()
            if outside(model, named):
                continue
            ours = run(named)
        except (LoraFxError, RuntimeError, TypeError, ValueError, IndexError):
            continue  # it is no run of the proof either
        try:
            exact = exactly(named)
        except (RuntimeError, TypeError, ValueError):
            exactly, exact = model.flat, ours
        runs.append((named, exact))
        yield grow(worst, ours, exact)
    moved = copy.deepcopy(model).eval()  # one, moved anew for every seed
    few = any(v.size < FEW for _, values in runs for v in values.values())
    for seed in range(4 * len(SEEDS)) if few else SEEDS:
        move(model, moved, seed)
        for named, values in runs:
            yield grow(worst, moved.flat(named), values)


def _wide(model: CapturedModule, graph: fx.Graph) -> Callable[[Named], dict[str, Array]]:
    """A model's eval graph in fp64: every float is one, every cast to a narrower one is to fp64.

    A capture of the model in fp64 would cost another, and a model that writes `x.float()` has none.
    """
    run = Wide(model, graph=graph)
    traced = model.captured.traced(False, model.captured.named, model.base_dtype)

    def exactly(named: Named) -> dict[str, Array]:
        leaves = [run.read(x) for x in tree_leaves(copied(named))]
        with torch.no_grad(), alike(model):
            out = run.run(*leaves, enable_io_processing=False)
        return by_output(tree_unflatten(list(out), traced.out_spec))

    return exactly
