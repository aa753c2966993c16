"""A training step is torch's: ONNX Runtime's loss, gradients and update at every size.

What it has to equal is the train program, not rewritten, run with autograd and followed by
torch.optim. A and B are drawn, so that every gradient has something to say; the optimizer's states
are of the size of the gradients, but zero at the first size, where m' is the gradient itself. Gates
are widened by what the same step in fp64 tells of the model's own rounding, as for any export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lora_fx.compare import (
    CEILING,
    ORT_TOL,
    Gate,
    Parity,
    compare_fairly,
    rel,
    shapes_of,
    sizes_text,
)
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import alike
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.step import STATES, Slot, TrainGraph, Update
from lora_fx.inputs import Named
from lora_fx.passes.proofs.parity import Wide, arrays_of, feeds_of, leave_out
from lora_fx.passes.proofs.reference import Run
from lora_fx.progress import stage

LR, TAKEN, SEED = 1e-2, 3, 5
"""The rate, the number of the step and the seed at which steps are compared."""
DRAWN = 0.05
"""The deviation of drawn elements of B."""


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
    module: Any = graph.flat
    owner: AdaptedModule = graph.module
    results: list[Parity] = []
    generator = np.random.default_rng(0)
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
        numbers = {"lr": np.array(LR, np.float32)}
        numbers |= {"step": np.array(TAKEN, np.int64), "seed": np.array(SEED, np.int64)}
        if refused := graph.traced.door.refused(pytree.tree_leaves(dict(named))):
            leave_out(owner, shapes, f"another path: {refused.message}")
            continue
        held = {s.name: _drawn(s, attrgetter(s.tensor)(module), generator) for s in slots}
        given = {**feeds, **held, **numbers}
        step = _Torch(graph, owner, slots, update)
        sizes = step.gradients(given)
        for s in (s for s in slots if s.trained) if STATES[update.optimizer] else ():
            size = max(float(np.sqrt(np.mean(sizes[s.name] ** 2))), 1e-6)
            shape = held[s.name].shape
            moved = 0.5 * bool(results) * size
            given[f"{s.name}.m"] = (moved * generator.standard_normal(shape)).astype(np.float32)
            given[f"{s.name}.v"] = (size**2 * generator.uniform(0.5, 1.5, shape)).astype(np.float32)
        expected = step(given)

        def own(
            given: Mapping[str, Array] = given, expected: Mapping[str, Array] = expected
        ) -> Iterator[dict[str, float]]:
            exact = _Torch(graph, owner, slots, update, wide=True)(given)
            yield {n: rel(expected[n], exact[n]) if exact[n].any() else 0.0 for n in exact}

        gates = {n: Gate(ORT_TOL, CEILING) for n in expected}
        with stage(f"comparing a step at {sizes_text(shapes)}"):
            results.append(compare_fairly(run(given), expected, shapes, gates, own, of="step"))
    return results


def _drawn(slot: Slot, tensor: Tensor, generator: np.random.Generator) -> Array:
    """A as the module has it and B drawn, as the file has them."""
    start = np.swapaxes(to_numpy(tensor.detach()), -1, -2) * np.float32(slot.scale)
    drawn = generator.standard_normal(start.shape) * DRAWN
    return np.ascontiguousarray(start if start.any() else drawn, np.float32)


class _Torch:
    """The step by autograd and torch.optim, in fp32 or fp64."""

    def __init__(
        self,
        graph: TrainGraph,
        module: AdaptedModule,
        slots: Sequence[Slot],
        update: Update,
        *,
        wide: bool = False,
    ) -> None:
        self.graph, self.module, self.slots, self.update = graph, module, slots, update
        self.dtype = torch.float64 if wide else torch.float32

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

    def _backward(self, given: Mapping[str, Array]) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of the module by the names of slots, with gradients, and the loss."""
        held = {s.name: (self._own(given[s.name]) / s.scale).requires_grad_(s.trained)
                for s in self.slots}  # fmt: skip
        by_tensor = {s.tensor: held[s.name] for s in self.slots}
        run = _Run(self.graph.flat, by_tensor, wide=self.dtype is torch.float64)
        inputs = [torch.tensor(given[n]) for n in self.graph.names]
        labels = torch.tensor(given["labels"])
        with torch.enable_grad(), alike(self.module):
            loss = self.graph.loss(run, [run.read(x) for x in inputs], run.read(labels))
            loss.backward()  # type: ignore[no-untyped-call]
        return held, loss

    def _own(self, array: Array) -> Tensor:
        """An array of the file as the module lays it out."""
        return from_numpy(np.swapaxes(array, -1, -2).copy()).to(self.dtype)


class _Run(Wide):
    """A train program over tensors of its own by name, in fp32 or fp64."""

    def __init__(
        self, module: fx.GraphModule, tensors: Mapping[str, Tensor], *, wide: bool
    ) -> None:
        super().__init__(module)
        self.tensors, self.wide = tensors, wide

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.tensors:
            return self.tensors[target]
        return super().get_attr(target, args, kwargs)

    def read(self, x: Any) -> Any:
        return super().read(x) if self.wide else x
