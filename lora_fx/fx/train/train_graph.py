"""The train program of a module as a flat graph of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.lowering.functional_ops import without_writes
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.onnx_export.flat_graph import flat_program
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.seeded_dropout import seed_dropouts
from lora_fx.fx.trees import tree_unflatten
from lora_fx.inputs import Named
from lora_fx.patching import patched


@dataclass(frozen=True)
class TrainGraph:
    """The train program of a module as a flat graph of tensors, and the loss of what it gives.

    Attributes:
        module: The module that holds the tensors.
        flat: The graph over it.
        names: ONNX names of its inputs, the seed of dropouts last where it has any.
        traced: The trace that it was made from.
        compute: The loss of (output, labels).
        own: Whether the labels are one of the inputs.
        seeded: Whether it takes a seed.
    """

    module: AdaptedModule
    flat: fx.GraphModule
    names: list[str]
    traced: Traced
    compute: Loss
    own: bool
    seeded: bool

    def loss(self, run: fx.Interpreter, inputs: Sequence[Any], labels: Any) -> Tensor:
        """The loss of a run, with its graph."""
        out = run.run(*inputs, enable_io_processing=False)
        return self.compute(tree_unflatten(list(out), self.traced.out_spec), labels)


def train_graph(
    module: AdaptedModule,
    named: Named,
    loss: tuple[Loss, str],
    passes: Sequence[Callable[[FxGraph], object]] = (),
    *,
    unit: bool = False,
) -> TrainGraph:
    """The train program for a call.

    Args:
        module: The module that insert returned.
        named: The arguments, the labels among them where the model takes them.
        loss: The result of loss_function.
        passes: Rewrites that change no number.
        unit: The scale is in b already.

    Raises:
        LoraFxError: An operator draws random numbers in a way that no file can repeat.
    """
    updates = module.updates
    if unit:
        updates = {key: _with_unit_scale(update) for key, update in updates.items()}
    with patched(module, _updates=updates):
        graph = module.graph(True, portable=True, named=named)
    for rewrite in passes:
        rewrite(graph)
    without_writes(graph.graph)
    execution = execution_of(module)
    traced = execution.captured.traced(True, named, execution.base_dtype)
    flat, names, _ = flat_program(module, graph.graph, traced, named=named)

    seeded = seed_dropouts(flat.graph)
    drawing = random_ops(flat.graph)
    if drawing:
        raise LoraFxError(
            "the model draws random numbers in training that a file cannot repeat: "
            f"{', '.join(drawing)}",
            "turn this off in the model; dropout itself works, drawn from the input seed",
        )
    if seeded:
        names = [*names, "seed"]
    flat.recompile()
    compute, labels_argument = loss
    return TrainGraph(module, flat, names, traced, compute, bool(labels_argument), seeded)


def _with_unit_scale(update: LowRank) -> LowRank:
    return replace(update, alpha=alpha_of(1.0, update.rank, update.variant))
