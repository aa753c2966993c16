"""A training step is torch's: ONNX Runtime's loss, gradients and update at every size.

What it has to equal is the train program, not rewritten, run with autograd and followed by
torch.optim. A and B are drawn, so that every gradient has something to say; the optimizer's
states are of the size of the gradients, but zero at the first size, where m' is the gradient
itself. Gates are widened by the model's own rounding, as for any export: that of the same step in
fp64, and of weights moved by half a unit of their last place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from lora_fx.compare import (
    CEILING,
    ORT_TOL,
    Gate,
    Outputs,
    Parity,
    compare_fairly,
    grow,
    shapes_of,
    sizes_text,
)
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import alike
from lora_fx.fx.graph.rounding import Wide, nearby, widened
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.step import STATES, Slot, TrainGraph, Update
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.proofs.proof_inputs import arrays_of, feeds_of, leave_out
from lora_fx.passes.proofs.reference import Run
from lora_fx.progress import stage

LR, TAKEN, SEED = 1e-2, 3, 5
"""The rate, the number of the step and the seed at which steps are compared."""


DRAWN = 0.05
"""The deviation of drawn elements of B."""


MOVES = 12
"""Times that every weight is moved by half a unit of its last place: a loss is one number."""


DRAWS = 3
"""Of A and B. Where rounding turns a ReLU, a gradient is another one: no proof can be had there."""


def prove_step(
    run: Run,
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labelled: Callable[[Named], tuple[Named, Array]],
    arrays: Named | None,
) -> list[Parity]:
    """Compare a step at every size; `run` gives {output: array} of {input: array}.

    Args:
        run: The file in ONNX Runtime.
        graph: The train program, whose scales are the module's own.
        slots: A and B of every update.
        update: The optimizer's part.
        labelled: The whole call of a batch without labels, and its labels.
        arrays: A user's inputs instead of sampled ones.
    """
    results: list[Parity] = []
    owner, generator = graph.module, np.random.default_rng(0)
    for named, _, extra in feeds_of(owner, arrays):
        try:
            named, labels = labelled(named)
        except (IndexError, RuntimeError, ValueError) as e:
            if not extra:
                raise
            leave_out(owner, shapes_of(arrays_of(named)), f"the model does not run there: {e}")
            continue
        feeds = {**arrays_of(named), "labels": labels}
        shapes = shapes_of(feeds)
        if refused := graph.traced.door.refused(tree_leaves(dict(named))):
            leave_out(owner, shapes, f"another path: {refused.message}")
            continue
        step = _Torch(graph, slots, update)
        for draw in range(DRAWS):
            held = {
                s.name: _drawn(s, attrgetter(s.tensor)(graph.flat), generator, draw) for s in slots
            }
            numbers = {"step": np.array(TAKEN, np.int64), "seed": np.array(SEED, np.int64)}
            given = {**feeds, **held, **numbers, "lr": np.array(LR, np.float32)}
            sizes = step.gradients(given)
            for s in (s for s in slots if s.trained) if STATES[update.optimizer] else ():
                size = max(float(np.sqrt(np.mean(sizes[s.name] ** 2))), 1e-6)
                moved = 0.5 * bool(results) * size
                m = moved * generator.standard_normal(held[s.name].shape)
                v = size**2 * generator.uniform(0.5, 1.5, m.shape)
                given |= {f"{s.name}.m": m.astype(np.float32), f"{s.name}.v": v.astype(np.float32)}
            expected, known = step(given), dict[str, float]()
            gates = {n: Gate(ORT_TOL, CEILING) for n in expected}
            own = partial(step.rounding, given, expected, known)
            with stage(f"comparing a step at {sizes_text(shapes)}"):
                found = compare_fairly(run(given), expected, shapes, gates, own, of="step")
            if found.ok or 4 * known.get(found.output, 0.0) < CEILING:
                break
        results.append(found)
    return results


def _drawn(slot: Slot, tensor: Tensor, generator: np.random.Generator, draw: int) -> Array:
    """At first what the module has, B drawn where it is 0; then moved. As the file has them."""
    start = np.swapaxes(to_numpy(tensor.detach()), -1, -2) * np.float32(slot.scale)
    drawn = generator.standard_normal(start.shape) * DRAWN
    moved = start if start.any() and not draw else start + drawn
    return np.ascontiguousarray(moved, np.float32)


@dataclass(frozen=True)
class _Torch:
    """The step by autograd and torch.optim, in fp32 or fp64, or of weights moved by a seed."""

    graph: TrainGraph
    slots: Sequence[Slot]
    update: Update
    wide: bool = False
    seed: int | None = None

    def gradients(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """∂L of the module's own tensors, by the names of slots."""
        held, _ = self._backward(given)
        return {n: to_numpy(w.grad) for n, w in held.items() if w.grad is not None}

    def __call__(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of a step."""
        held, loss = self._backward(given)
        trained = [s for s in self.slots if s.trained]
        adam = self.update.optimizer == "adamw"
        if self.update.clip:
            torch.nn.utils.clip_grad_norm_([held[s.name] for s in trained], self.update.clip)
        groups = [{"params": [held[s.name]], "lr": LR * s.rate} for s in trained]
        kind: Any = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(groups, lr=LR, weight_decay=self.update.weight_decay)
        for s in trained if adam else ():
            moments = {n: self._own(given[f"{s.name}.{x}"])
                       for n, x in (("exp_avg", "m"), ("exp_avg_sq", "v"))}  # fmt: skip
            optimizer.state[held[s.name]] = {"step": torch.tensor(TAKEN - 1.0), **moments}
        optimizer.step()
        made = {"loss": to_numpy(loss.detach())}
        for s in trained:
            w = held[s.name]
            made[f"{s.name}.next"] = np.swapaxes(to_numpy(w.detach()), -1, -2) * s.scale
            for n, x in (("exp_avg", "m"), ("exp_avg_sq", "v")) if adam else ():
                made[f"{s.name}.{x}.next"] = np.swapaxes(to_numpy(optimizer.state[w][n]), -1, -2)
        return made

    def rounding(
        self, given: Outputs, expected: Outputs, known: dict[str, float]
    ) -> Iterator[dict[str, float]]:
        """How far rounding moves each output, written into `known`: at first that of fp32."""
        exact = replace(self, wide=True)(given)
        yield grow(known, expected, exact)
        for seed in range(MOVES):
            yield grow(known, replace(self, seed=seed)(given), exact)

    def _backward(self, given: Mapping[str, Array]) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of the module by the names of slots, with gradients, and the loss."""
        held = {s.name: (self._own(given[s.name]) / s.scale).requires_grad_(s.trained)
                for s in self.slots}  # fmt: skip
        by_tensor = {s.tensor: held[s.name] for s in self.slots}
        run = _Run(self.graph.flat, by_tensor, self.wide, self.seed)
        inputs = [torch.tensor(given[n]) for n in self.graph.names]
        labels = torch.tensor(given["labels"])
        wide = _WideLoss() if self.wide else contextlib.nullcontext()
        with torch.enable_grad(), alike(self.graph.module), wide:
            loss = self.graph.loss(run, [run.read(x) for x in inputs], run.read(labels))
            loss.backward()  # type: ignore[no-untyped-call]
        return held, loss

    def _own(self, array: Array) -> Tensor:
        """An array of the file as the module lays it out."""
        dtype = np.float64 if self.wide else np.float32
        return from_numpy(np.swapaxes(array, -1, -2).astype(dtype))


class _WideLoss(TorchFunctionMode):
    """A loss in fp64: one that takes scores in float32 would round them as the fp32 step does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        args, kwargs = fx.node.map_aggregate((args, dict(kwargs or {})), widened)
        return func(*args, **kwargs)


class _Run(Wide):
    """A train program over tensors of its own by name, in fp32 or fp64."""

    def __init__(
        self, module: fx.GraphModule, tensors: Mapping[str, Tensor], wide: bool, seed: int | None
    ) -> None:
        super().__init__(module)
        self.tensors, self.wide = tensors, wide
        self.moves = None if seed is None else torch.Generator().manual_seed(seed)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.tensors:
            return self.tensors[target]
        held = super().get_attr(target, args, kwargs)
        return nearby(held, self.moves) if self.moves else held

    def read(self, x: Any) -> Any:
        return super().read(x) if self.wide else x
