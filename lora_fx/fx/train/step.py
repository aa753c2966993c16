"""One training step as a graph: the loss, its gradients, and what the optimizer makes of them.

    batch, labels, lr, t, A, B, m, v   →   loss, A', B', m', v'

A [*batch, in, rank] and B [*batch, rank, out] are laid out as mode switch reads them, the scale s
multiplied into B. The optimizer's numbers are those of the module's own b = Bᵀ/s, whose gradient is
s·∂L/∂B: a step is what torch.optim takes on the adapted module. Torch's autograd derives the
backward pass while the train program runs on tensors without values; sizes stay symbols. What the
exporter has no operator for, or a wrong one, comes apart here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.adapter.variant import slots_of, variant_of
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.onnx_names import symbols_of
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.fake_tensors import FakeTensorMode, detect_fake_mode
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import written_by
from lora_fx.fx.graph.nodes import OverTensors, argument, aten_ops, random_ops, value
from lora_fx.fx.interception import enable_python_dispatcher, make_fx
from lora_fx.fx.lowering import Table, signed, without_writes
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.onnx_exporter import decompositions
from lora_fx.fx.operators import decomposition_table
from lora_fx.fx.tensors import named_tensors
from lora_fx.fx.to_onnx import OPSET, SQUEEZES, flat_program, mend_squeeze, translated
from lora_fx.fx.train.loss import Loss, scores_of
from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.onnx.names import give_own_names
from lora_fx.patching import patched

aten = torch.ops.aten
STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("m", "v"), "sgd": ()}
"""Optimizer → what it keeps beside a tensor."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW, as torch has them by default."""


@dataclass(frozen=True)
class Update:
    """What the optimizer does to the tensors that it is given.

    Attributes:
        optimizer: adamw or sgd.
        weight_decay: As torch.optim has it: of the weight for adamw, of its gradient for sgd.
        clip: The longest gradient, as the norm of all together; 0 clips nothing.
    """

    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0

    def __call__(
        self,
        slots: Sequence[Slot],
        held: Sequence[Sequence[Tensor]],
        gradients: Sequence[Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> list[Tensor]:
        """The tensors and states of all slots after a step, flat, in their order."""
        gradients = [g * s.scale for g, s in zip(gradients, slots, strict=True)]
        if self.clip:
            norm = torch.stack([(g * g).sum() for g in gradients]).sum().sqrt()
            share = self.clip / torch.clamp(norm + 1e-6, min=self.clip)
            gradients = [g * share for g in gradients]
        made: list[Tensor] = []
        # in fp32 1 − 0.999 loses 4 digits, and so does a power whose base the exporter has in fp32
        left = [1 - torch.exp(step.double() * math.log(beta)) for beta in BETAS]
        first, second = 1 / left[0], 1 / left[1].sqrt()
        for slot, (w, *state), g in zip(slots, held, gradients, strict=True):
            rate = lr * slot.rate
            if self.optimizer == "sgd":
                made.append(w - rate * (g * slot.scale + w * self.weight_decay))
                continue
            m, v = state
            m = m + (g - m) * (1 - BETAS[0])
            v = v * BETAS[1] + g * g * (1 - BETAS[1])
            size = v.sqrt() * second.float() + EPS
            kept = w * (1 - rate * self.weight_decay)
            made += [kept - (rate * slot.scale * first.float()) * m / size, m, v]
        return made


@dataclass(frozen=True)
class Slot:
    """One trained tensor of a step.

    Attributes:
        name: Its name in the file.
        tensor: Its name in the module, where it is laid out [*batch, rank, in] or
            [*batch, out, rank].
        shape: In the file.
        scale: What multiplies the module's tensor to make the file's.
        rate: What multiplies the learning rate.
        trained: False for one that stays as it is, A of lora-fa.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    scale: float
    rate: float
    trained: bool


def slots_in(updates: Mapping[str, LowRank], names: Mapping[str, tuple[str, str]]) -> list[Slot]:
    """The slots of updates by key, for the names of their A and B in the file."""
    made = []
    for key, u in updates.items():
        rates = variant_of(u).rates(1.0)
        for held, name, scale in zip(slots_of(key, u), names[key], (1.0, u.scale), strict=True):
            *batch, rows, columns = held.value.shape
            shape = (*batch, columns, rows)
            rate = rates.get(held.field, 1.0)
            made.append(Slot(name, held.name, shape, scale, rate, held.trained))
    return made


@dataclass(frozen=True)
class TrainGraph:
    """The train program of a module as a flat graph of tensors, and the loss of what it gives.

    Attributes:
        module: What holds the tensors.
        flat: The graph over it.
        names: ONNX names of its inputs, the seed of dropouts last where it has any.
        traced: What it was made from.
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
        module: What insert returned.
        named: The arguments, the labels among them where the model takes them.
        loss: What loss_function gives.
        passes: Rewrites that change no number.
        unit: The scale is in b already.

    Raises:
        LoraFxError: An operator draws random numbers in a way that no file can repeat.
    """
    updates = module.updates
    if unit:
        updates = {
            k: replace(u, alpha=alpha_of(1.0, u.rank, u.variant)) for k, u in updates.items()
        }
    with patched(module, _updates=updates):
        graph = module.graph(True, portable=True, named=named)
    for rewrite in passes:
        rewrite(graph)
    without_writes(graph.graph)
    execution = execution_of(module)
    traced = execution.captured.traced(True, named, execution.base_dtype)
    flat, names, _ = flat_program(module, graph.graph, traced, named=named)
    seeded = _seed_dropouts(flat.graph)
    if drawn := random_ops(flat.graph):
        raise LoraFxError(
            f"the model draws random numbers in training that no file can repeat: "
            f"{', '.join(drawn)}",
            "turn that off in the model; dropout itself is drawn from the input seed",
        )
    flat.recompile()
    compute, own = loss
    return TrainGraph(module, flat, names + ["seed"] * seeded, traced, compute, bool(own), seeded)


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


# What comes apart before the exporter sees it: all that it has no operator for, and these.


def _table() -> Table:
    return {**decompositions(OPSET), **OWN}


def product(x: Tensor, dim: int | None = None, keepdim: bool = False, **_: object) -> Tensor:
    """The product of a dimension, or of all, by halves."""
    if dim is None:
        x, dim = x.flatten(), 0
    x = x.movedim(dim, 0)
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] * x[half : 2 * half], x[2 * half :]])
    return x.movedim(0, dim) if keepdim else x[0]


def products(x: Tensor, dim: int, **_: object) -> Tensor:
    """The products of all elements up to each, by doubling how far they reach."""
    x, reach = x.movedim(dim, 0), 1
    while reach < len(x):
        x = torch.cat([x[:reach], x[reach:] * x[:-reach]])
        reach *= 2
    return x.movedim(0, dim)


def bags(
    w: Tensor, places: Tensor, starts: Tensor, _: bool = False, mode: int = 0, *more: Any
) -> tuple[Tensor, None, None, None]:
    """The sums, means or maxima of the rows of bags: each from where it starts to the next."""
    rest: list[Any] = [*more[1:], *(None, False, None)[len(more[1:]) :]]
    weights, ends, left_out = rest
    starts = starts[:-1] if ends else starts
    after = torch.arange(places.shape[0], device=w.device) >= starts[:, None]
    inside = after & ~F.pad(after[1:], [0, 0, 0, 1])
    if left_out is not None:
        inside = inside & (places != left_out)
    rows = F.embedding(places, w)
    if weights is not None:
        rows = rows * weights[:, None]
    if mode == 2:
        held = inside.any(1, keepdim=True)
        top = torch.where(inside[..., None], rows, -torch.inf).amax(1)
        return torch.where(held, top, 0.0), None, None, None
    share = inside.to(w.dtype)
    if mode == 1:
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    return share @ rows, None, None, None


def adaptive_maxima(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, None]:
    """The maxima of as many windows as asked for, one axis after the other; no places."""
    return _by_axes(lambda part, axis: part.max(axis)[0], x, sizes), None


def _by_axes(reduce: Callable[[Tensor, int], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """What as many windows as asked for come to, one axis after the other."""
    for axis, n in enumerate(sizes, x.dim() - len(sizes)):
        bounds = [(i * x.shape[axis] // n, -(-(i + 1) * x.shape[axis] // n)) for i in range(n)]
        x = torch.stack([reduce(x.narrow(axis, lo, hi - lo), axis) for lo, hi in bounds], axis)
    return x


def pooled(
    pool: Callable[..., Tensor], x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), *more: Any,
) -> Tensor:  # fmt: skip
    """Windows of three axes as those of two, and then of the third.

    `more` is what the pool of two axes takes: the dilation of a maximum goes by axes as well, and
    a divisor is one of the whole window.
    """
    k, s, p = ([*v] * (3 // len(v)) for v in (kernel, stride or kernel, padding))
    dilated = pool is F.max_pool2d and bool(more)
    d = [*more[0]] * (3 // len(more[0])) if dilated else []
    divisor = None if dilated or len(more) < 3 else more[2]
    rest = [*more[dilated:2], *([1] if divisor else [])]
    planes = pool(x.flatten(-4, -3), k[1:], s[1:], p[1:], *([d[1:]] if d else []), *rest)
    columns = planes.reshape(*x.shape[:-2], -1)
    made = pool(columns, [k[0], 1], [s[0], 1], [p[0], 0], *([[d[0], 1]] if d else []), *rest)
    made = made.reshape(*made.shape[:-1], *planes.shape[-2:])
    return made / divisor if divisor else made


def samples(x: Tensor, *how: Any) -> Tensor:
    """The samples of planes; those of volumes stay one operator."""
    planes: Any = decomposition_table[aten.grid_sampler_2d.default]
    return (planes if x.dim() == 4 else aten.grid_sampler)(x, *how)  # type: ignore[no-any-return]


def distances(a: Tensor, b: Tensor, p: float = 2.0, _: int | None = None) -> Tensor:
    """The distance of every row of a from every row of b; its gradient at 0 is 0."""
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    return norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def scattered(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The elements of the source, in their order, at the places of the mask."""
    x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]
    before = mask.flatten().cumsum(0).reshape(x.shape) - 1
    return torch.where(mask, source.flatten()[before.clamp(min=0)], x)


def windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Tensor.unfold by int64 places: torch's gradient has int32, which ScatterND does not take."""
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = starts[:, None] + torch.arange(size, device=x.device)
    return x.movedim(dim, -1)[..., places].movedim(-2, dim % x.dim())


def nll_loss(x: Tensor, target: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    """The loss of labels, and how many count.

    The exporter's own forgets how many, so that a mean has the gradient of a sum. ONNX counts an
    index below 0 from the end, where torch refuses it: it becomes one that ONNX refuses too.
    """
    ignored = more[2]
    wrong = (target < 0) & (target != ignored)
    apart: Any = decomposition_table[aten.nll_loss_forward.default]
    return apart(x, torch.where(wrong, x.shape[-1], target), *more)  # type: ignore[no-any-return]


def convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, _: object, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution of any kind by convolutions: (∂x, ∂w, ∂bias).

    ∂x is the other kind of convolution of ∂y. ∂w is one in which the batch is summed over as
    channels are, stride and dilation trading places; each group of channels is a group.
    """
    stride, padding, dilation, transposed, _, groups, wanted = attributes
    axes = range(x.dim() - 2)
    dx = dw = db = None
    if wanted[0]:
        rest = [0 for _ in axes]
        if not transposed:  # what the strides left over at the end
            reach = [dilation[i] * (w.shape[i + 2] - 1) + 1 - 2 * padding[i] for i in axes]
            rest = [(x.shape[i + 2] - reach[i]) % stride[i] for i in axes]
        dx = aten.convolution(dy, w, None, stride, padding, dilation, not transposed, rest, groups)
    if wanted[1]:
        wide, slides = (dy, x) if transposed else (x, dy)
        size = wide.shape[2:]
        parts = wide.reshape(wide.shape[0], groups, -1, *size)
        rows = parts.permute(2, 1, 0, *(i + 3 for i in axes)).flatten(1, 2)
        filters = slides.transpose(0, 1)
        none = [0 for _ in axes]
        dw = aten.convolution(rows, filters, None, dilation, padding, stride, False, none, groups)
        for i in axes:
            dw = dw.narrow(i + 2, 0, w.shape[i + 2])
        dw = dw.transpose(0, 1)
    if wanted[2]:
        db = dy.sum([0, *(i + 2 for i in axes)])
    return dx, dw, db


def average_backward(
    dy: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil: bool, counted: bool,
    divisor: int | None,
) -> Tensor:  # fmt: skip
    """The gradient of an average over windows: each gives its share to every place of it."""
    stride = stride or kernel
    ones = torch.ones((1, 1, *kernel), device=x.device)
    places = torch.ones((1, 1, *x.shape[-2:]), device=x.device)
    above, left = padding
    places = torch.constant_pad_nd(places, [left, left, above, above], float(counted))
    # with ceil the last window ends after the padding, and what lies there never counts
    over = [(dy.shape[i - 2] - 1) * stride[i] + kernel[i] - places.shape[i - 2] for i in range(2)]
    rest = [max(-o, 0) if ceil else -o for o in over]
    places = torch.constant_pad_nd(places, [0, over[1], 0, over[0]])
    held = aten.convolution(places, ones, None, stride, [0, 0], [1, 1], False, [0, 0], 1)
    share = dy / (divisor or held)
    planes = share.reshape(-1, 1, *dy.shape[-2:])
    made: Tensor = aten.convolution(planes, ones, None, stride, padding, [1, 1], True, rest, 1)
    return made[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


OWN: Table = {
    aten.nll_loss_forward.default: nll_loss,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d_backward.default: average_backward,
}
"""What comes apart before the exporter sees it: it has no such operator, or a wrong one."""
DIFFERENTIABLE: Table = {
    aten.adaptive_avg_pool1d.default: functools.partial(_by_axes, torch.mean),
    aten.adaptive_avg_pool3d.default: functools.partial(_by_axes, torch.mean),
    **{getattr(aten, f"adaptive_max_pool{d}d").default: adaptive_maxima for d in (1, 2, 3)},
    aten.adaptive_avg_pool2d.default: decomposition_table[aten._adaptive_avg_pool2d.default],
    aten.avg_pool3d.default: functools.partial(pooled, F.avg_pool2d),
    aten.max_pool3d.default: functools.partial(pooled, F.max_pool2d),
    aten.grid_sampler.default: samples,
    aten.cdist.default: distances,
    aten.masked_scatter.default: scattered,
    aten.unfold.default: windows,
    aten.cumprod.default: products,
    **dict.fromkeys(aten_ops("prod prod.dim_int"), product),
    **dict.fromkeys(aten_ops("embedding_bag embedding_bag.padding_idx"), bags),
}
"""What comes apart before autograd sees it: its gradient is an operator that never does."""


# Dropout by an input, seed: what is dropped depends on it, on the place and on which dropout it is,
# by whole numbers below a prime, so that torch and every runtime drop the same.


PRIME = 2**31 - 1


def _seed_dropouts(graph: fx.Graph) -> bool:
    """Let the dropouts of a graph draw by an input; False where it has none."""
    found = [n for n in graph.nodes if _drops(n)]
    if not found:
        return False
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        seed = graph.placeholder("seed")
    seed.meta["val"] = torch.zeros((), dtype=torch.int64)
    for i, node in enumerate(found):
        if node.target is aten.dropout.default:
            node.target, node.args = dropped, (node.args[0], argument(node, "p"), seed, i)
            node.kwargs = {}
            continue
        mask, p = argument(node, "attn_mask"), argument(node, "dropout_p")
        node.kwargs = {n: argument(node, n) for n in ("is_causal", "scale", "enable_gqa")}
        node.target, node.args = attention_with_dropout, (*node.args[:3], mask, p, seed, i)
    return True


def _drops(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return bool(argument(node, "train")) and argument(node, "p") > 0
    attention = node.target is aten.scaled_dot_product_attention.default
    return attention and bool(argument(node, "dropout_p"))


def dropped(x: Tensor, p: float, seed: Tensor, which: int) -> Tensor:
    """Dropout of x: a share p of it is zero, the rest is divided by 1 − p."""
    n = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    salt = (seed % PRIME * 48271 + which * 69621 + 1) % PRIME
    h = (n % PRIME * 16807 + salt) % PRIME
    for add in (12345, 271828, 314159):  # a square is what no line of places keeps in order
        h = (h * h + salt + add) % PRIME
    return torch.where(h >= int(p * PRIME), x / (1 - p), 0.0)


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seed: Tensor, which: int,
    **named: Any,
) -> Tensor:  # fmt: skip
    """Attention whose weights are dropped."""
    if named.get("enable_gqa"):
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (named.get("scale") or q.shape[-1] ** -0.5)
    if named.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    if mask is not None:
        scores = scores + mask
    # a row that is masked out, as of padding on the left, is 0 as in torch, not NaN
    return dropped(aten._safe_softmax(scores, -1), p, seed, which) @ v
