"""The protocols that let one set of passes serve several IRs: Graph, Emitter and Site.

A pass sees a graph only through these. `lora_fx.fx` and `lora_fx.onnx` implement them;
`lora_fx.ir.numpy_emitter.NumpyEmitter` computes with numpy at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar, cast

from lora_fx.dtypes import Array
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.ir.view import Step, View

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """One use of a weight in a graph.

    Attributes:
        id: The name of the op's node, and a slot where an op has several weights; unique in its
            graph.
        op: The public name of the op: linear, matmul, conv2d, embedding …
        kind: What the contraction is, in no IR.
        parameter: Canonical name of the stored tensor; `PATH.weight~` for a computed weight.
        view: The chain of steps from the stored tensor to the operand.
        operand: Shape of the weight as the op reads it.
        scope: Dotted path of the module whose forward holds the op; empty when unknown.
        module_class: Class name of that module; empty when unknown.
        flops: 2 · multiply-adds of this use at the example's sizes.
        refusal: Why this use cannot be adapted; empty when it can.
        allowed: The refusal is a default: an `include` that names the weight overrides it.
        no_fold: Why W + s·b·a cannot be stored, although a branch can stand beside the op.
        no_grad: The op runs where the model switched gradients off.
        gain: What the op itself multiplies its product by.
        slot: Path to the weight among the op's operands: (1,), or (2, 0) in a list of them.
        parts: (role, first, last + 1) along out, by what the parts of the result are for.
        root: Where the view starts in this graph: what reads or computes the weight.
        behind: Every parameter that a computed weight depends on.
        attrs: What the Kind and the numpy emitter have to know of the op: stride, padding …
    """

    id: str
    op: str
    kind: Kind
    parameter: str
    view: View
    operand: tuple[int, ...]
    scope: str = ""
    module_class: str = ""
    flops: int = 0
    refusal: str = ""
    allowed: bool = False
    no_fold: str = ""
    no_grad: bool = False
    gain: float = 1.0
    behind: tuple[str, ...] = ()
    slot: tuple[int, ...] = ()
    root: str = ""
    parts: tuple[tuple[str, int, int], ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True)
class OtherReader:
    """A reader of a parameter, seen through a view, that is not a product of its sites.

    An update of the parameter does not reach it: insert and fold leave it as it was.
    """

    parameter: str
    op: str
    view: View


class Role(Enum):
    """The purpose of a parameter that an emitter adds."""

    TRAIN = "train"
    FROZEN = "frozen"
    OPTIONAL_INPUT = "optional input"


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: all its names (the first is the canonical one), shape and dtype.

    `format` and `bits` say how it is quantised; the shape is that of the numbers then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    format: str = ""
    bits: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, the canonical one first."""
        return (self.name, *self.aliases)


class Emitter(Ops[V], Protocol[V]):
    """Builds nodes in one IR, at the place where it was made: before or after one site."""

    def like(self, site: Site, x: V, w: V) -> V:
        """The site's own op, attributes kept and bias left out, with other operands."""

    def parameter(self, name: str, value: Array, role: Role) -> V:
        """A new stored tensor, or the one of that name if it exists already."""


@dataclass(frozen=True)
class Deferred:
    """An array that is computed when it is wanted, so that a file can be larger than memory."""

    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[], Array]


class Analysed:
    """Caches the analyses of a graph until the graph is edited."""

    def __init__(self) -> None:
        self._kept: dict[str, object] = {}
        self._named: dict[str, object] = {}

    def kept(self, what: str, compute: Callable[[], T], *, by_name: bool = False) -> T:
        """The result of `compute` for this version of the graph, computed once.

        Args:
            what: A name for the analysis.
            compute: Takes the graph as it is now.
            by_name: The result knows nodes and tensors by their names only, so that it holds for
                clones too, until one of them is edited.
        """
        results = self._named if by_name else self._kept
        if what not in results:
            results[what] = compute()
        return cast(T, results[what])

    def changed(self) -> None:
        """Drop every analysis: whoever edits the graph says so here."""
        self._kept = {}
        self._named = {}

    def share(self, named: dict[str, object]) -> None:
        """Keep analyses by name in this dictionary, which graphs of the same nodes share."""
        self._named = named


class Graph(Protocol[V]):
    """A graph in one IR, as passes see it."""

    def kept(self, what: str, compute: Callable[[], T], *, by_name: bool = False) -> T:
        """The same as `Analysed.kept`."""

    def changed(self) -> None:
        """The same as `Analysed.changed`."""

    @property
    def alone(self) -> bool:
        """True when no other graph reads the same stored tensors."""

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order; nodes that a pass emitted are left out."""

    def other_readers(self) -> Sequence[OtherReader]:
        """The readers of a parameter other than its sites, in execution order, without shapes."""

    def parameters(self) -> Sequence[Parameter]:
        """Every stored parameter, in definition order."""

    def gathered_flops(self) -> Mapping[str, int]:
        """FLOPs of products with rows gathered from a parameter, by its name."""

    def data_flops(self) -> int:
        """FLOPs of the matmuls between activations, at the example's sizes."""

    def adapted(self) -> frozenset[str]:
        """The ids of sites that already carry a branch."""

    def read(self, name: str) -> Array:
        """A stored parameter as an array (bfloat16 through ml_dtypes)."""

    def reader(self, name: str) -> Callable[[], Array]:
        """The parameter's value as it is now, read when it is called."""

    def activation(self, site: Site) -> V:
        """The other operand of the site, as it is now."""

    def kept_activation(self, site: Site) -> V:
        """The activation, as a branch may keep it for backward."""

    def weight(self, site: Site) -> V:
        """The stored parameter that the site reads, as a value of this IR."""

    def output(self, site: Site) -> V:
        """The result of the site's op."""

    def picked(self, site: Site, e: Emitter[V]) -> V:
        """The ids [n] by which data picks the site's matrices from its stack."""

    def zero_points(self, site: Site) -> ZeroPoints | None:
        """Those of the codes [out, in] that the site reads; None where they may not be floats."""

    def put_zeros(self, sites: Sequence[Site], zero: Array) -> str:
        """Let sites of one weight read their codes by other zero points; returns their name."""

    def product(self, site: Site, e: Emitter[V]) -> V | None:
        """The result of the site's op without its bias; None where that cannot be had apart."""

    def emit(self, site: Site, *, before: bool = False) -> Emitter[V]:
        """An emitter that inserts after the site, or before it, and marks its nodes."""

    def replace_output(self, site: Site, y: V) -> None:
        """Let every user of the site's result read y instead."""

    def rebase(self, site: Site, w: V) -> None:
        """Let the site read w [stored shape], through its own view, instead of its weight."""

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when nothing but these sites reads the parameter, its views included."""

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor of the same shape, through their own view."""

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Let `sites` read `value` [stored shape] for parameter `name`.

        When these are all its uses its own constant is replaced, else they get a constant of
        their own. Returns the name that holds the value.
        """

    def clone(self) -> Graph[V]:
        """The same graph in new nodes; tensors are shared."""

    def lint(self) -> None:
        """Raise if the graph is not valid."""


@dataclass(frozen=True)
class Axes:
    """The part that each axis of the operand plays, after `steps` have split it where needed."""

    batch: tuple[int, ...]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Factors(Generic[V]):
    """The two factors as values of an IR, in the layout that the site reads.

    `a` [*batch, rank, in], `b` [*batch, out, rank]; the scale is already in b.
    """

    a: V
    b: V
    rank: int
    layout: Layout


class Kind(Protocol):
    """One kind of contraction, known to every IR; an op table says which op is which kind."""

    @property
    def name(self) -> str:
        """The name in refusals, FLOP counts and file formats, such as linear or conv."""

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """The axes of an operand of this shape that are batch, out and in."""

    @property
    def has_branch(self) -> bool:
        """Whether b·(a·x) can be added to the op's output; else only the weight form exists."""

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """b·(a·x) in the shape of the op's output, where `has_branch` says that there is one."""

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """The shape in which a number a row of W goes with the result; empty where none does."""
