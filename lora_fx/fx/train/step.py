"""One training step as a graph: the loss, its gradients, and the optimizer's update.

    batch, labels, lr, t, A, B, m, v   →   loss, A', B', m', v'

A [*batch, in, rank] and B [*batch, rank, out] are laid out as mode switch reads them, the scale s
multiplied into B. The optimizer's numbers are those of the module's own b = Bᵀ/s, whose gradient is
s·∂L/∂B: a step is what torch.optim takes on the adapted module. Torch's autograd derives the
backward pass while the train program runs on tensors without values; sizes stay symbols. What the
exporter has no operator for, or a wrong one, comes apart here.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.fx.capture.onnx_names import symbols_of
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.fake_tensors import FakeTensorMode, detect_fake_mode
from lora_fx.fx.graph.in_place import written_by
from lora_fx.fx.graph.nodes import OverTensors, value
from lora_fx.fx.lowering.decomposition import Table
from lora_fx.fx.lowering.program_signature import signed
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.onnx_export.portable import SQUEEZES, mend_squeeze
from lora_fx.fx.onnx_export.translation import OPSET, translated
from lora_fx.fx.onnx_exporter import decompositions
from lora_fx.fx.proxy_tracing import make_fx
from lora_fx.fx.python_dispatch import enable_python_dispatcher
from lora_fx.fx.train.differentiable_ops import DIFFERENTIABLE
from lora_fx.fx.train.free_sizes import sizes_stay_free
from lora_fx.fx.train.gradient_ops import OWN
from lora_fx.fx.train.loss import scores_of
from lora_fx.fx.train.optimizer_step import STATES, Slot, Update
from lora_fx.fx.train.train_graph import TrainGraph
from lora_fx.fx.trees import TreeSpec, tree_flatten, tree_unflatten
from lora_fx.onnx.names import give_own_names


@dataclass(frozen=True)
class _Operands:
    """The operands of a step, without values.

    Attributes:
        frozen: Tensors that are not trained, by name.
        batch: The inputs of the train graph.
        labels: The labels, where the model does not take them.
        numbers: The learning rate, and the step, counted from 1.
        matrices: A or B of every slot.
        moments: The optimizer's states of those that are trained, kind by kind.
    """

    frozen: list[Tensor]
    batch: list[Tensor]
    labels: list[Tensor]
    numbers: list[Tensor]
    matrices: list[Tensor]
    moments: list[list[Tensor]]

    def fields(self) -> tuple[Any, ...]:
        """Return all operands, in the order of the file."""
        return self.frozen, self.batch, self.labels, self.numbers, self.matrices, self.moments


def step_of(
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labels: Callable[[Any], Tensor],
    opset: int,
    *,
    repeat: bool,
) -> Any:
    """Trace a step of a train graph, whose B contain the scales, as an onnx_ir.Model.

    Args:
        graph: The train program.
        slots: A and B of every update.
        update: The optimizer's part.
        labels: Makes the labels of these scores where the model does not take them; without values.
        opset: The opset of the file.
        repeat: As in `to_onnx`.

    Raises:
        LoraFxError: A size that should be free is fixed by an operator's gradient, or the exporter
            cannot translate an operator.
    """
    tensors = _tensors_read(graph.flat)
    names = _first_names(tensors)
    trained_tensors = {slot.tensor for slot in slots}
    frozen = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if names[name] == name and name not in trained_tensors
    }

    fakes = _fakes_of(graph.flat.graph)
    operands = _operands(graph, slots, update, labels, frozen, fakes)
    leaves, tree = tree_flatten(operands.fields())
    step = _step(graph, slots, update, names, list(frozen), tree)
    batch = dict(zip(graph.names, operands.batch, strict=True))
    traced = _traced(step, leaves, fakes, sizes_stay_free(fakes, batch, graph.flat.graph))

    inputs = traced.graph.find_nodes(op="placeholder")
    for node, leaf in zip(inputs, leaves, strict=True):
        node.meta["val"] = leaf
    inputs = inputs[len(frozen) :]
    frozen |= _place_constants(traced, inputs[0], fakes)
    results: Any = traced.graph.output_node().args[0]
    traced.graph.output_node().args = (tuple(results),)

    program = signed(traced.graph, inputs, frozen)
    input_names, output_names = _names(graph, slots, update, has_labels=bool(operands.labels))
    model = translated(
        lambda: program, input_names, output_names, set(frozen), opset, repeat=repeat
    )
    requested = execution_of(graph.module).captured.requested
    free = graph.traced.door.free(requested)
    give_own_names(model, named_tensors(graph.module)[0], symbols_of(free))
    return model


def _tensors_read(flat: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that a graph reads, by their names in the module."""
    names = [str(node.target) for node in flat.graph.find_nodes(op="get_attr")]
    return {name: operator.attrgetter(name)(flat) for name in names}


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first name of each tensor by any name, so that a tied tensor has one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _fakes_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode of a graph's inputs, or a new one."""
    inputs = graph.find_nodes(op="placeholder")
    fakes = detect_fake_mode([value(node) for node in inputs])
    if fakes is None:  # a loss may hold tensors that have values
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
    return fakes


def _operands(
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labels: Callable[[Any], Tensor],
    frozen: Mapping[str, Tensor],
    fakes: FakeTensorMode,
) -> _Operands:
    """Make the operands of a step, without values."""
    inputs = graph.flat.graph.find_nodes(op="placeholder")
    frozen_fakes: list[Tensor] = [
        fakes.from_tensor(tensor, static_shapes=True) for tensor in frozen.values()
    ]
    with fakes:
        batch = [_without_values(value(node), fakes) for node in inputs]
        ends: Any = graph.flat.graph.output_node().args[0]
        results = [value(end) if isinstance(end, fx.Node) else end for end in ends]
        out = tree_unflatten(results, graph.traced.out_spec)
        labels_operand = [] if graph.own else [labels(scores_of(out))]
        numbers = [torch.zeros(()), torch.zeros((), dtype=torch.int64)]
        matrices = [torch.zeros(slot.shape) for slot in slots]
        trained = [slot for slot in slots if slot.trained]
        moments = [[torch.zeros(slot.shape) for slot in trained] for _ in STATES[update.optimizer]]
    return _Operands(frozen_fakes, batch, labels_operand, numbers, matrices, moments)


def _step(
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    names: Mapping[str, str],
    frozen_names: Sequence[str],
    tree: TreeSpec,
) -> Callable[..., tuple[Any, ...]]:
    """Return the step as a function of the leaves of its operands.

    Args:
        graph: The train program.
        slots: A and B of every update.
        update: The optimizer's part.
        names: Every tensor that the program reads, with its first name.
        frozen_names: Names of the tensors that are not trained, in their order.
        tree: The tree of the operands' fields, of which the leaves are.
    """
    trained = [slot for slot in slots if slot.trained]

    def step(*leaves: Any) -> tuple[Any, ...]:
        frozen, batch, labels, numbers, matrices, moments = tree_unflatten(leaves, tree)
        lr, count = numbers
        frozen_by_name = dict(zip(frozen_names, frozen, strict=True))
        weights = {
            name: frozen_by_name[first] for name, first in names.items() if first in frozen_by_name
        }
        with torch.enable_grad():
            factors = {
                slot.name: matrix.detach().requires_grad_(slot.trained)
                for slot, matrix in zip(slots, matrices, strict=True)
            }
            for slot in slots:
                weights[slot.tensor] = factors[slot.name].transpose(-1, -2)
            target = batch[graph.names.index("labels")] if graph.own else labels[0]
            loss = graph.loss(_OnTensors(weights, graph.flat.graph), batch, target)
            gradients = torch.autograd.grad(loss, [factors[slot.name] for slot in trained])
        before = [
            (factors[slot.name].detach(), *(moment[i] for moment in moments))
            for i, slot in enumerate(trained)
        ]
        return loss.detach(), *update(trained, before, gradients, lr, count)

    return step


def _traced(
    step: Callable[..., tuple[Any, ...]],
    leaves: Sequence[Any],
    fakes: FakeTensorMode,
    free: contextlib.AbstractContextManager[None],
) -> fx.GraphModule:
    """Trace the step to a graph of operators that the exporter can translate."""
    table: Table = {**decompositions(OPSET), **OWN}
    unfused = torch.backends.mkldnn.flags(enabled=False)  # a fused LSTM has no other form
    attention_apart = sdpa_kernel(SDPBackend.MATH)
    with (
        quiet(),
        torch.no_grad(),
        fakes,
        enable_python_dispatcher(),
        attention_apart,
        unfused,
        free,
    ):
        traced = make_fx(step, decomposition_table=table)(*leaves)
        if any(written_by(node) for node in traced.graph.nodes):
            # functionalize takes neither autograd nor what the exporter's table gives
            written = make_fx(step, decomposition_table=OWN)(*leaves)
            traced = make_fx(functionalize(written), decomposition_table=table)(*leaves)
    for node in list(traced.graph.nodes):
        if node.target in SQUEEZES:
            mend_squeeze(traced.graph, node)
    traced.graph.eliminate_dead_code()
    return traced


def _names(
    graph: TrainGraph, slots: Sequence[Slot], update: Update, *, has_labels: bool
) -> tuple[list[str], list[str]]:
    """Return the names of a step's inputs and outputs in the file."""
    trained = [slot.name for slot in slots if slot.trained]
    states = STATES[update.optimizer]
    inputs = list(graph.names)
    if has_labels:
        inputs.append("labels")
    inputs += ["lr", "step"]
    inputs += [slot.name for slot in slots]
    for state in states:
        inputs += [f"{name}.{state}" for name in trained]

    outputs = ["loss"]
    for name in trained:
        outputs.append(f"{name}.next")
        outputs += [f"{name}.{state}.next" for state in states]
    return inputs, outputs


def _place_constants(
    module: fx.GraphModule, before: fx.Node, fakes: FakeTensorMode
) -> dict[str, Tensor]:
    """Turn tensors that a loss holds, such as class weights, into inputs before a node.

    Returns them by the names that they have in the file.
    """
    inputs: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        attribute = str(node.target)
        if attribute not in inputs:
            tensor: Tensor = getattr(module, attribute).detach()
            name = f"loss.constant_{len(inputs)}"
            constants[name] = tensor
            with module.graph.inserting_before(before):
                placeholder = module.graph.placeholder(name.replace(".", "_"))
            placeholder.meta["val"] = fakes.from_tensor(tensor, static_shapes=True)
            inputs[attribute] = placeholder
        node.replace_all_uses_with(inputs[attribute])
        module.graph.erase_node(node)
    return constants


class _OnTensors(OverTensors):
    """An interpreter over tensors by name that uses ops with a gradient."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(DIFFERENTIABLE.get(target, target), args, kwargs)


def _without_values(val: Any, fakes: FakeTensorMode) -> Tensor:
    """Return the fake tensor of an input: the captured one, or one of the value's sizes."""
    if getattr(val, "fake_mode", None) is fakes:
        return val  # type: ignore[no-any-return]
    return fakes.from_tensor(val, static_shapes=True)
