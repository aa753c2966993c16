"""The proof of a training step: ONNX Runtime's loss, gradients and update equal torch's.

The reference is the train program, not rewritten, run with autograd and followed by
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
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.graph.rounding import Wide, nearby, widened
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.optimizer_step import STATES, Slot, Update
from lora_fx.fx.train.train_graph import TrainGraph
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.proofs.proof_inputs import arrays_of, feeds_of, leave_out
from lora_fx.passes.proofs.reference import Run
from lora_fx.progress import stage

LR = 1e-2
"""The learning rate at which steps are compared."""
STEP_NUMBER = 3
"""The number of the step that is compared, counted from 1."""
SEED = 5
"""The seed of the step's dropouts."""
DRAWN = 0.05
"""The standard deviation of the noise in drawn A and B."""
MOVES = 12
"""The number of times that every weight is moved by rounding; a loss, one number, needs many."""
DRAWS = 3
"""The most draws of A and B: if rounding flips a ReLU, a gradient changes and proves nothing."""
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""AdamW's states of a tensor: the name in the file → the name in torch."""


def prove_step(
    run: Run,
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labelled: Callable[[Named], tuple[Named, Array]],
    arrays: Named | None,
) -> list[Parity]:
    """Compare a step at every size; `run` maps {input: array} to {output: array}.

    Args:
        run: The file in ONNX Runtime.
        graph: The train program, whose scales are the module's own.
        slots: A and B of every update.
        update: The optimizer's part.
        labelled: The whole call of a batch without labels, and its labels.
        arrays: A user's inputs instead of sampled ones.
    """
    module = graph.module
    generator = np.random.default_rng(0)
    step = _TorchStep(graph, slots, update)
    results: list[Parity] = []
    for named, _, may_fail in feeds_of(module, arrays):
        try:
            named, labels = labelled(named)
        except (IndexError, RuntimeError, ValueError) as e:
            if not may_fail:
                raise
            leave_out(
                module, shapes_of(arrays_of(named)), f"the model does not run at these sizes: {e}"
            )
            continue
        feeds = {**arrays_of(named), "labels": labels}
        refused = graph.traced.door.refused(tree_leaves(dict(named)))
        if refused:
            leave_out(
                module,
                shapes_of(feeds),
                f"the model takes another path at these sizes: {refused.message}",
            )
            continue
        # at the first size the optimizer's states are zero: m' is the gradient itself
        results.append(_compare(run, step, feeds, generator, moments_are_zero=not results))
    return results


def _compare(
    run: Run,
    step: _TorchStep,
    feeds: Named,
    generator: np.random.Generator,
    *,
    moments_are_zero: bool,
) -> Parity:
    """Compare a step on one batch; draw A and B again if rounding changes a gradient too much."""
    shapes = shapes_of(feeds)
    for draw in range(DRAWS):
        inputs = {**feeds, **_scalars()}
        for slot in step.slots:
            tensor = attrgetter(slot.tensor)(step.graph.flat)
            inputs[slot.name] = _drawn(slot, tensor, generator, draw)
        inputs |= _drawn_moments(step, inputs, generator, moments_are_zero)

        errors: dict[str, float] = {}
        with stage(f"comparing a step at {sizes_text(shapes)}"):
            expected = step(inputs)
            gates = {name: Gate(ORT_TOL, CEILING) for name in expected}
            rounding = partial(step.rounding, inputs, expected, errors)
            parity = compare_fairly(run(inputs), expected, shapes, gates, rounding, of="step")
        if parity.ok or 4 * errors.get(parity.output, 0.0) < CEILING:
            break
    return parity


def _scalars() -> dict[str, Array]:
    """Return the scalar inputs of a step."""
    return {
        "step": np.array(STEP_NUMBER, np.int64),
        "seed": np.array(SEED, np.int64),
        "lr": np.array(LR, np.float32),
    }


def _drawn(slot: Slot, tensor: Tensor, generator: np.random.Generator, draw: int) -> Array:
    """Draw a tensor of an update, in the layout of the file.

    The first draw takes the module's numbers, and random ones for B where it is 0; later draws move
    all of them.
    """
    start = np.swapaxes(to_numpy(tensor.detach()), -1, -2) * np.float32(slot.scale)
    noise = generator.standard_normal(start.shape) * DRAWN
    if start.any() and draw == 0:
        return np.ascontiguousarray(start, np.float32)
    return np.ascontiguousarray(start + noise, np.float32)


def _drawn_moments(
    step: _TorchStep,
    inputs: Mapping[str, Array],
    generator: np.random.Generator,
    moments_are_zero: bool,
) -> dict[str, Array]:
    """Draw the optimizer's states, as large as the gradients; none if the optimizer has none."""
    moments: dict[str, Array] = {}
    if not STATES[step.update.optimizer]:
        return moments
    gradients = step.gradients(inputs)
    for slot in step.trained:
        shape = inputs[slot.name].shape
        size = max(float(np.sqrt(np.mean(gradients[slot.name] ** 2))), 1e-6)
        deviation = 0.0 if moments_are_zero else 0.5 * size
        m = deviation * generator.standard_normal(shape)
        v = size**2 * generator.uniform(0.5, 1.5, shape)
        moments[f"{slot.name}.m"] = m.astype(np.float32)
        moments[f"{slot.name}.v"] = v.astype(np.float32)
    return moments


@dataclass(frozen=True)
class _TorchStep:
    """The step by autograd and torch.optim: in fp32, in fp64, or with weights moved by a seed."""

    graph: TrainGraph
    slots: Sequence[Slot]
    update: Update
    wide: bool = False
    seed: int | None = None

    @property
    def trained(self) -> list[Slot]:
        """The slots whose tensors the optimizer updates."""
        return [slot for slot in self.slots if slot.trained]

    def gradients(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the gradients of the loss for the module's tensors, by slot name."""
        tensors, _ = self._backward(inputs)
        return {
            name: to_numpy(tensor.grad)
            for name, tensor in tensors.items()
            if tensor.grad is not None
        }

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs of a step."""
        tensors, loss = self._backward(inputs)
        if self.update.clip:
            clipped = [tensors[slot.name] for slot in self.trained]
            torch.nn.utils.clip_grad_norm_(clipped, self.update.clip)
        optimizer = self._optimizer(tensors, inputs)
        optimizer.step()

        outputs = {"loss": to_numpy(loss.detach())}
        for slot in self.trained:
            tensor = tensors[slot.name]
            outputs[f"{slot.name}.next"] = _as_in_file(tensor.detach()) * slot.scale
            for name in self._moments:
                moment = optimizer.state[tensor][MOMENTS[name]]
                outputs[f"{slot.name}.{name}.next"] = _as_in_file(moment)
        return outputs

    @property
    def _moments(self) -> Sequence[str]:
        """The names, in the file, of the optimizer's states of a tensor."""
        return list(MOMENTS) if self.update.optimizer == "adamw" else []

    def _optimizer(
        self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Array]
    ) -> torch.optim.Optimizer:
        """Make the optimizer with the states that the inputs give."""
        groups = [{"params": [tensors[slot.name]], "lr": LR * slot.rate} for slot in self.trained]
        kind: Any = torch.optim.AdamW if self.update.optimizer == "adamw" else torch.optim.SGD
        optimizer: torch.optim.Optimizer
        optimizer = kind(groups, lr=LR, weight_decay=self.update.weight_decay)
        if self._moments:
            for slot in self.trained:
                state = {"step": torch.tensor(STEP_NUMBER - 1.0)}
                for name in self._moments:
                    state[MOMENTS[name]] = self._as_in_module(inputs[f"{slot.name}.{name}"])
                optimizer.state[tensors[slot.name]] = state
        return optimizer

    def rounding(
        self, inputs: Outputs, expected: Outputs, errors: dict[str, float]
    ) -> Iterator[dict[str, float]]:
        """Yield the rounding error of each output, and write it into `errors`; fp32 comes first."""
        exact = replace(self, wide=True)(inputs)
        yield grow(errors, expected, exact)
        for seed in range(MOVES):
            yield grow(errors, replace(self, seed=seed)(inputs), exact)

    def _backward(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Tensor], Tensor]:
        """Run backward; return the module's tensors by slot name, with gradients, and the loss."""
        tensors: dict[str, Tensor] = {}
        for slot in self.slots:
            tensor = self._as_in_module(inputs[slot.name]) / slot.scale
            tensors[slot.name] = tensor.requires_grad_(slot.trained)
        by_name_in_module = {slot.tensor: tensors[slot.name] for slot in self.slots}
        run = _TrainRun(self.graph.flat, by_name_in_module, self.wide, self.seed)

        arguments = [run.read(torch.tensor(inputs[name])) for name in self.graph.names]
        labels = run.read(torch.tensor(inputs["labels"]))
        wide = _WideLoss() if self.wide else contextlib.nullcontext()
        with torch.enable_grad(), alike(self.graph.module), wide:
            loss = self.graph.loss(run, arguments, labels)
            loss.backward()  # type: ignore[no-untyped-call]
        return tensors, loss

    def _as_in_module(self, array: Array) -> Tensor:
        """Return an array of the file in the layout of the module."""
        dtype = np.float64 if self.wide else np.float32
        return from_numpy(np.swapaxes(array, -1, -2).astype(dtype))


def _as_in_file(tensor: Tensor) -> Array:
    """Return a tensor of the module in the layout of the file."""
    return np.swapaxes(to_numpy(tensor), -1, -2)


class _WideLoss(TorchFunctionMode):
    """A mode that keeps a loss in fp64, even if the loss casts scores to a narrower dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = fx.node.map_aggregate((args, dict(kwargs or {})), widened)
        return func(*args, **kwargs)


class _TrainRun(Wide):
    """A train program in fp32 or fp64 that reads the given tensors in place of its own."""

    def __init__(
        self, module: fx.GraphModule, tensors: Mapping[str, Tensor], wide: bool, seed: int | None
    ) -> None:
        super().__init__(module)
        self.tensors = tensors
        self.wide = wide
        self.moves = None if seed is None else torch.Generator().manual_seed(seed)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.tensors:
            return self.tensors[target]
        tensor = super().get_attr(target, args, kwargs)
        return nearby(tensor, self.moves) if self.moves else tensor

    def read(self, x: Any) -> Any:
        return super().read(x) if self.wide else x
