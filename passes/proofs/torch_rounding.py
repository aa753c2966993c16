"""Measure how far rounding alone moves the outputs of a torch model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import fx

from lora_fx.compare import (
    grow,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.graph.rounding import Wide
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Extents, Named
from lora_fx.passes.proofs.graph_choices import move
from lora_fx.passes.proofs.proof_inputs import is_real, outside
from lora_fx.passes.proofs.reference import SEEDS, Run

FEW = 8
"""The size of an output, such as a loss, for which three moves of the weights show too little."""


def own_errors(
    model: CapturedModule,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    run: Run | None = None,
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
    run = run or execution_of(model).flat
    graph = model.graph(False).graph
    exactly: Run = execution_of(model).flat
    if not random_ops(graph):  # in fp64 they draw other numbers
        exactly = _wide(model, graph)

    largest_errors: dict[str, float] = {}
    runs: list[tuple[Named, dict[str, Array]]] = []
    for draw in _draws(model, arrays, sizes):
        try:
            named = draw()
            if outside(model, named):
                continue
            outputs = run(named)
        except (LoraFxError, RuntimeError, TypeError, ValueError, IndexError):
            continue  # it is no run of the proof either
        try:
            exact = exactly(named)
        except (RuntimeError, TypeError, ValueError):
            exactly = execution_of(model).flat
            exact = outputs
        runs.append((named, exact))
        yield grow(largest_errors, outputs, exact)

    moved = copy.deepcopy(model).eval()  # one, moved anew for every seed
    seeds: Iterable[int] = SEEDS
    if any(_has_few_numbers(exact) for _, exact in runs):
        seeds = range(4 * len(SEEDS))
    for seed in seeds:
        move(model, moved, seed)
        for named, exact in runs:
            yield grow(largest_errors, execution_of(moved).flat(named), exact)


def _draws(
    model: CapturedModule, arrays: Named | None, sizes: Sequence[Extents] | None
) -> list[Callable[[], Named]]:
    """Functions that draw inputs: a user's or the example's first, then every size and seed."""
    if sizes is None:
        sizes = execution_of(model).captured.inputs.checks
    example = execution_of(model).in_own_dtype()
    draws: list[Callable[[], Named]] = []
    if arrays is not None:
        draws.append(partial(execution_of(model).sample, sizes[0], arrays))
    elif is_real(example):  # what is drawn need not fit
        draws.append(lambda: example)
    for size in sizes:
        draws += [partial(execution_of(model).sample, size, None, seed) for seed in SEEDS]
    return draws


def _has_few_numbers(outputs: Mapping[str, Array]) -> bool:
    return any(value.size < FEW for value in outputs.values())


def _wide(model: CapturedModule, graph: fx.Graph) -> Run:
    """A model's eval graph in fp64: every float is one, every cast to a narrower one is to fp64.

    A capture of the model in fp64 would cost another, and a model that writes `x.float()` has none.
    """
    run = Wide(model, graph=graph)
    traced = execution_of(model).captured.traced(
        False, execution_of(model).captured.named, execution_of(model).base_dtype
    )

    def exactly(named: Named) -> dict[str, Array]:
        leaves = [run.read(leaf) for leaf in tree_leaves(copied(named))]
        with torch.no_grad(), alike(model):
            outputs = run.run(*leaves, enable_io_processing=False)
        return by_output(tree_unflatten(list(outputs), traced.out_spec))

    return exactly
