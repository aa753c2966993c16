"""One training step as a graph: the loss, its gradients, and what the optimizer makes of them.

    batch, labels, lr, t, A, B, m, v   →   loss, A', B', m', v'

A [*batch, in, rank] and B [*batch, rank, out] are laid out as mode switch reads them, the scale s
multiplied into B. The optimizer's numbers are those of the module's own b = Bᵀ/s, whose gradient is
s·∂L/∂B: a step is what torch.optim takes on the adapted module. Torch's autograd derives the
backward pass while the train program runs on tensors without values; sizes stay symbols. What the
exporter has no operator for, or a wrong one, comes apart here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.fx.capture.call import symbols_of
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
from lora_fx.fx.train.free_sizes import _sizes_kept
from lora_fx.fx.train.gradient_ops import OWN
from lora_fx.fx.train.loss import scores_of
from lora_fx.fx.train.optimizer_step import STATES, Slot, Update
from lora_fx.fx.train.train_graph import TrainGraph
from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.onnx.names import give_own_names

aten = torch.ops.aten


def step_of(
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labels: Callable[[Any], Tensor],
    opset: int,
    *,
    repeat: bool,
) -> Any:
    """Trace a step of a train graph whose scales are in B, as an onnx_ir.Model.

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
    flat, trained = graph.flat, [s for s in slots if s.trained]
    places = flat.graph.find_nodes(op="placeholder")
    fakes = detect_fake_mode([value(n) for n in places])
    if fakes is None:  # a loss may hold tensors that have values
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {str(n.target): operator.attrgetter(str(n.target))(flat)
               for n in flat.graph.find_nodes(op="get_attr")}  # fmt: skip
    own = {s.tensor for s in slots}
    first: dict[int, str] = {}
    names = {n: first.setdefault(id(t), n) for n, t in tensors.items()}  # a tied one is one
    frozen = {n: t.detach() for n, t in tensors.items() if names[n] == n and n not in own}
    given: list[Tensor] = [fakes.from_tensor(t, static_shapes=True) for t in frozen.values()]
    with fakes:
        batch = [_without_values(value(n), fakes) for n in places]
        ends: Any = graph.flat.graph.output_node().args[0]
        out = tree_unflatten([value(n) if isinstance(n, fx.Node) else n for n in ends],
                                    graph.traced.out_spec)  # fmt: skip
        target = [] if graph.own else [labels(scores_of(out))]
        numbers = [torch.zeros(()), torch.zeros((), dtype=torch.int64)]
        held = [torch.zeros(s.shape) for s in slots]
        states = STATES[update.optimizer]
        kept = [[torch.zeros(s.shape) for s in trained] for _ in states]
    leaves, tree = tree_flatten((given, batch, target, numbers, held, kept))

    def step(*leaves: Any) -> tuple[Any, ...]:
        still, inputs, lab, (lr, count), matrices, moments = tree_unflatten(leaves, tree)
        alone = dict(zip(frozen, still, strict=True))
        weights = {n: alone[of] for n, of in names.items() if of in alone}
        with torch.enable_grad():
            learnt = {s.name: w.detach().requires_grad_(s.trained)
                      for s, w in zip(slots, matrices, strict=True)}  # fmt: skip
            weights |= {s.tensor: learnt[s.name].transpose(-1, -2) for s in slots}
            at = inputs[graph.names.index("labels")] if graph.own else lab[0]
            loss = graph.loss(_Held(weights, flat.graph), inputs, at)
            leaves = tuple(learnt[s.name] for s in trained)
            gradients = torch.autograd.grad(loss, leaves)
        before = [(learnt[s.name].detach(), *(m[i] for m in moments))
                  for i, s in enumerate(trained)]  # fmt: skip
        return loss.detach(), *update(trained, before, gradients, lr, count)

    plain = torch.backends.mkldnn.flags(enabled=False)  # a fused LSTM has no other form
    free = _sizes_kept(fakes, dict(zip(graph.names, batch, strict=True)), flat.graph)
    apart = sdpa_kernel(SDPBackend.MATH)
    with quiet(), torch.no_grad(), fakes, enable_python_dispatcher(), apart, plain, free:
        made = make_fx(step, decomposition_table=_table())(*leaves)
        if any(written_by(n) for n in made.graph.nodes):
            # functionalize takes neither autograd nor what the exporter's table gives
            written = make_fx(step, decomposition_table=OWN)(*leaves)
            made = make_fx(functionalize(written), decomposition_table=_table())(*leaves)
    for node in [n for n in made.graph.nodes if n.target in SQUEEZES]:
        mend_squeeze(made.graph, node)
    made.graph.eliminate_dead_code()
    nodes = made.graph.find_nodes(op="placeholder")
    for node, leaf in zip(nodes, leaves, strict=True):
        node.meta["val"] = leaf
    frozen |= _place_constants(made, nodes[len(given)], fakes)
    given_out: Any = made.graph.output_node().args[0]
    made.graph.output_node().args = (tuple(given_out),)
    each = ("", *(f".{s}" for s in states))
    inputs = [*graph.names, *(["labels"] if target else []), "lr", "step"]
    inputs += [s.name for s in slots] + [s.name + e for e in each[1:] for s in trained]
    outputs = ["loss", *(f"{s.name}{e}.next" for s in trained for e in each)]
    program = signed(made.graph, nodes[len(given) :], frozen)
    model = translated(lambda: program, inputs, outputs, set(frozen), opset, repeat=repeat)
    free_sizes = graph.traced.door.free(execution_of(graph.module).captured.requested)
    give_own_names(model, named_tensors(graph.module)[0], symbols_of(free_sizes))
    return model


def _place_constants(
    module: fx.GraphModule, before: fx.Node, fakes: FakeTensorMode
) -> dict[str, Tensor]:
    """Make inputs of the tensors that a loss holds, such as weights of classes, before a node.

    Returns them by the names that they have in the file.
    """
    places: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        attribute = str(node.target)
        if attribute not in places:
            held: Tensor = getattr(module, attribute)
            name = f"loss.constant_{len(places)}"
            constants[name] = held.detach()
            with module.graph.inserting_before(before):
                places[attribute] = module.graph.placeholder(name.replace(".", "_"))
            places[attribute].meta["val"] = fakes.from_tensor(held.detach(), static_shapes=True)
        node.replace_all_uses_with(places[attribute])
        module.graph.erase_node(node)
    return constants


class _Held(OverTensors):
    """A graph run on tensors by name, by ops that have a gradient."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(DIFFERENTIABLE.get(target, target), args, kwargs)


def _without_values(val: Any, fakes: FakeTensorMode) -> Tensor:
    """What stands for an input: as the capture saw it, or of its sizes where none was seen."""
    if getattr(val, "fake_mode", None) is fakes:
        return val  # type: ignore[no-any-return]
    return fakes.from_tensor(val, static_shapes=True)


def _table() -> Table:
    return {**decompositions(OPSET), **OWN}
