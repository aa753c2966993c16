"""A captured model that says what its targets read and which gradients reach them.

The captured graph runs node by node (torch.fx.Interpreter). A watched use reads a leaf in place
of its weight, through a copy of the weight's own chain of views, and zeros that require grad are
added to what it makes. So torch.autograd.grad of the loss gives ∂L/∂W and dy = ∂L/∂y exactly, and
only for the uses that are meant. Nothing is hooked, and the model is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import program_key
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.door import Door
from lora_fx.fx.graph.graph import FxGraph, replaced
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import padding
from lora_fx.fx.trees import TreeSpec, tree_leaves, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.ir import convolution, einsum, kinds
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Gather
from lora_fx.text import by_key

Choose = Callable[[FxGraph], Sequence[tuple[Site, tuple[str, ...]]]]
"""The uses of a graph to watch, with the keys of the updates that reach them."""


@dataclass(frozen=True)
class SiteRows:
    """Rows of a batch.

    Attributes:
        value: [*batch, rows, side]; [rows] ids where x is one-hot.
        count: Without those that are padding.
        one_hot: The number of ids; 0 where the rows are there themselves.
        lead: The sizes that rows were made of; empty where they were moved or cut.
    """

    value: Tensor
    count: int
    one_hot: int = 0
    lead: tuple[int, ...] = ()

    def kept(self, mask: Tensor) -> SiteRows:
        """Without the rows that a mask [examples, positions] leaves out, if it is one of these."""
        lead = (tuple(mask.shape), (mask.numel(),))
        if self.lead not in lead or self.value.dim() > 2:
            return self
        value = self.value[mask.reshape(-1) != 0]
        return SiteRows(value, len(value), self.one_hot, self.lead)


Saw = Callable[[Site, tuple[str, ...], SiteRows | None], None]
"""Gets the rows of x when a use runs: an op further on may write over x."""


@dataclass(frozen=True)
class Tap:
    """One watched use in one program: its node, its chain of views, and where its result is."""

    site: Site
    keys: tuple[str, ...]
    node: fx.Node
    chain: tuple[fx.Node, ...]
    output: tuple[fx.Node, ...]
    activation: fx.Node | None


@dataclass
class Run:
    """What one call left behind.

    Attributes:
        leaves: (keys, root of the weight) → the leaf, in the stored shape.
        zeros: The uses whose dy can be had, each with the leaf at its result.
    """

    leaves: dict[tuple[tuple[str, ...], str], Tensor] = field(default_factory=dict)
    zeros: list[Made] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """The result of a use: zeros that were added to it, and what its rows need to know."""

    tap: Tap
    zeros: Tensor
    shape: tuple[int, ...]
    ends: Tensor | None

    def rows(self, dy: Tensor) -> SiteRows | None:
        """Those of dy = ∂L/∂zeros."""
        return rows_of(self.tap.site, dy, self.ends, self.shape)


class Watched(CapturedModule):
    """The model with taps; `last` is what the last call left behind.

    Args:
        captured: The model.
        choose: The uses to watch.
        saw: Called as each of them runs.
        weights: Whether leaves stand for the weights.
        results: Whether zeros are added to the results.
    """

    def __init__(
        self, captured: Captured, choose: Choose, saw: Saw, *, weights: bool, results: bool
    ) -> None:
        super().__init__(captured, blocks=False)
        self.last = Run()
        self._choose, self._saw = choose, saw
        self._weights, self._results = weights, results
        self._watching: dict[object, tuple[fx.Graph, tuple[Tap, ...], Door, TreeSpec]] = {}
        try:
            captured.allows(False)
        except LoraFxError:
            self.train()  # a file with a train program only

    def _run(self, args: Sequence[Any], kwargs: Named) -> Any:
        named = self._programs.captured.signature.bind(args, kwargs)
        leaves = tree_leaves(named)
        key = program_key(named, leaves)
        if key not in self._watching:
            self._watching[key] = self._watch(named)
        graph, taps, door, spec = self._watching[key]
        door.check(leaves)
        self.last = Run()
        run = _Interpreter(self, graph, taps)
        with torch.set_grad_enabled(self._weights or self._results):
            out = run.run(*leaves, enable_io_processing=False)
        return tree_unflatten(list(out), spec)

    def _watch(self, named: Named) -> tuple[fx.Graph, tuple[Tap, ...], Door, TreeSpec]:
        traced = self._programs.captured.traced(self.training, named, self._dtype)
        graph = self._graph(self.training, named)
        taps = []
        for site, keys in self._choose(graph):
            node, chain = graph.places(site)
            known = readable(site)
            output = (graph.output(site),) if known else ()
            x = graph.activation(site) if known else None
            taps.append(Tap(site, keys, node, chain, output, x))
        return graph.graph, tuple(taps), traced.door, traced.out_spec


class _Interpreter(fx.Interpreter):
    """Runs a graph with taps."""

    def __init__(self, root: Watched, graph: fx.Graph, taps: Sequence[Tap]) -> None:
        super().__init__(root, graph=graph)
        self.last, self.saw = root.last, root._saw
        self.at = by_key((t.node, t) for t in taps)
        self.along = by_key((n, t) for t in taps if root._weights for n in t.chain)
        self.after = by_key((n, t) for t in taps if root._results for n in t.output)
        self.leaves: dict[tuple[tuple[str, ...], str], dict[fx.Node, Any]] = {}
        self.shapes: dict[Tap, tuple[tuple[int, ...], Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node; where a watched weight passes, its leaf beside it."""
        for tap in self.at.get(n, ()):
            if tap.activation is not None:
                x, site = self.env[tap.activation], tap.site
                grouped = isinstance(site.kind, kinds.Grouped)
                ends: Any = map_arg(n.args[2], lambda m: self.env[m]) if grouped else None
                self.shapes[tap] = tuple(x.shape), ends
                self.saw(site, tap.keys, rows_of(site, x.detach(), ends))
        value = self._call(n, {}) if self.along and n in self.at else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()  # the model's own need no gradient
        for tap in self.along.get(n, ()):
            name = tap.keys, tap.chain[0].name
            beside = self.leaves.setdefault(name, {})
            if n is tap.chain[0] and n not in beside:
                beside[n] = self.last.leaves[name] = value.detach().requires_grad_()
            elif n not in beside:
                beside[n] = self._call(n, beside)
        for tap in self.after.get(n, ()):
            zeros = torch.zeros_like(value, requires_grad=True)
            self.last.zeros.append(Made(tap, zeros, *self.shapes[tap]))
            value = value + zeros
        return value

    def _call(self, n: fx.Node, beside: Mapping[fx.Node, Any]) -> Any:
        """The node with other values for some of its inputs, and leaves for watched weights."""
        args, kwargs = map_arg((n.args, n.kwargs), lambda m: beside.get(m, self.env.get(m)))
        for tap in self.at.get(n, ()):
            given = self.leaves[tap.keys, tap.chain[0].name][tap.chain[-1]]
            args = replaced(args, tap.site.slot, given)
        return getattr(self, n.op)(n.target, args, kwargs)


# x and dy of a use as rows: [*batch, rows, in] and [*batch, rows, out] in the axes of its Kind.
#
# With these rows ∂L/∂W = Σ dy xᵀ, whatever the op: a convolution's x is cut into its windows, a
# transposed one's dy; the rows of a grouped op are padded with zeros to the largest group.


DOTS = "ABCDEFGH"


def readable(site: Site) -> bool:
    """True when a use's x and dy can be had as rows; else only its gradient can."""
    known = (einsum.Einsum, kinds.Embedding, kinds.Grouped, convolution.Conv)
    gathered = any(isinstance(s, Gather) for s in site.view.steps)
    return isinstance(site.kind, (*known, convolution.ConvTranspose)) and not gathered


def rows_of(
    site: Site, t: Tensor, ends: Tensor | None, x: Sequence[int] | None = None
) -> SiteRows | None:
    """The rows of a use's x, or of its dy, in the same order; None where sizes are broadcast.

    Args:
        site: The use.
        t: Its activation x, or dy.
        ends: Those of the groups, of a grouped op.
        x: The shape of x, where t is dy.
    """
    kind, out = site.kind, x is not None
    if isinstance(kind, kinds.Embedding):
        rows = t.reshape(-1, math.prod(site.operand[1:])) if out else t.reshape(-1)
        return SiteRows(rows, len(rows), 0 if out else site.operand[0], () if out else t.shape)
    if isinstance(kind, einsum.Einsum):
        axes = kind.axes(site.operand)
        return _einsum(site, t, *((kind.y, axes.out) if out else (kind.x, axes.in_)))
    if isinstance(kind, kinds.Grouped):
        return _grouped(t, ends)
    assert isinstance(kind, convolution.Conv | convolution.ConvTranspose)
    t = t if t.dim() == len(site.operand) else t.unsqueeze(0)  # torch's can go without examples
    if out == isinstance(kind, convolution.ConvTranspose):  # the side that spans the kernel
        t = _windows(site, t, () if x is None else x[2 - len(site.operand) :])
    return _channels(kind.groups, t, site)


def part(rows: Tensor, read: Layout, start: Sequence[int], own: Layout, *, out: bool) -> Tensor:
    """The rows of a part of what a use reads.

    Args:
        rows: [*batch, rows, side] of the use.
        read: The Layout of the use.
        start: Where the part begins, per axis of `read.shape`.
        own: The Layout of the part.
        out: Whether the side is out, else in.
    """
    if own == read:
        return rows
    side = read.out if out else read.in_
    lead, inner = ([read.shape[i] for i in axes] for axes in (read.batch, side))
    split = rows.reshape(*lead, rows.shape[-2], *inner)
    cut = [slice(start[i], start[i] + own.shape[i]) for i in read.batch]
    cut += [slice(None), *(slice(start[i], start[i] + own.shape[i]) for i in side)]
    size = own.out_size if out else own.in_size
    return split[tuple(cut)].reshape(*own.batch_shape, rows.shape[-2], size)


def _einsum(site: Site, t: Tensor, term: str, side: Sequence[int]) -> SiteRows | None:
    kind = site.kind
    assert isinstance(kind, einsum.Einsum)
    batch = kind.axes(site.operand).batch
    spelled = term.replace("...", DOTS[: t.dim() - len(term.replace("...", ""))])
    places = [[spelled.index(kind.w[i]) for i in axes] for axes in (batch, side)]
    every = [*places[0], *places[1]]
    if [t.shape[p] for p in every] != [site.operand[i] for i in (*batch, *side)]:
        return None
    rest = [i for i in range(t.dim()) if i not in every]
    moved = t.permute(*places[0], *rest, *places[1])
    lead = [site.operand[i] for i in batch]
    flat = moved.reshape(*lead, -1, math.prod(site.operand[i] for i in side))
    return SiteRows(flat, flat.shape[-2], lead=tuple(t.shape[i] for i in rest))


def _grouped(t: Tensor, ends: Tensor | None) -> SiteRows:
    """Rows sorted by group as [groups, largest, side]; `ends` are the groups' last rows + 1."""
    assert ends is not None
    stops = ends.tolist()
    parts = [t[a:b] for a, b in zip([0, *stops], stops, strict=False)]
    return SiteRows(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), len(t))


def _channels(groups: int, t: Tensor, site: Site) -> SiteRows:
    """[n, g·c, *spots, *taps] → [g, n·∏spots, c·∏taps]; taps are there after _windows."""
    dims = len(site.operand) - 2
    n, spots, taps = t.shape[0], t.shape[2 : 2 + dims], t.shape[2 + dims :]
    split = t.reshape(n, groups, -1, *spots, *taps)
    end = 3 + dims
    moved = split.permute(1, 0, *range(3, end), 2, *range(end, end + len(taps)))
    flat = moved.reshape(groups, n * math.prod(spots), -1)
    return SiteRows(flat[0] if groups == 1 else flat, flat.shape[1])


def _windows(site: Site, t: Tensor, spots: Sequence[int] = ()) -> Tensor:
    """[n, c, *size] → [n, c, *spots, *kernel]; `spots`: as many windows, whatever the size."""
    kernel, attrs = site.operand[2:], site.attrs
    k = len(kernel)
    # one number is that of every axis
    stride, dilation = ([*attrs[n]] * (k // len(attrs[n])) for n in ("stride", "dilation"))
    reach = [d * (s - 1) + 1 for d, s in zip(dilation, kernel, strict=True)]
    given = attrs["padding"]
    if given == "same":
        before = [(r - 1) // 2 for r in reach]
        after = [r - 1 - b for r, b in zip(reach, before, strict=True)]
    else:
        before = after = [0] * k if given == "valid" else [*given] * (k // len(given))
    if spots:  # of a transposed convolution: a window for every element of its x
        have = [n + b for n, b in zip(t.shape[2:], before, strict=True)]
        need = [(n - 1) * s + r for n, s, r in zip(spots, stride, reach, strict=True)]
        after = [max(0, n - h) for n, h in zip(need, have, strict=True)]
    t = torch.nn.functional.pad(t, padding(before, after))
    for axis in range(k):
        t = t.unfold(2 + axis, reach[axis], stride[axis])
        t = t[..., :: dilation[axis]]
        if spots:
            t = t.narrow(2 + axis, 0, spots[axis])
    return t
