"""The protocols by which one set of passes serves several IRs: Graph, Emitter and Site.

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
        roles: The roles that the data flow agrees with; None where it was not followed.
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
    roles: frozenset[str] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True)
class OtherReader:
    """An op that reads a parameter through a view and is not a product (Site) of the parameter.

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
    """A stored tensor: all its names (the first is canonical), its shape and its dtype.

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
        """All names of the tensor, the canonical one first."""
        return (self.name, *self.aliases)


class Emitter(Ops[V], Protocol[V]):
    """A builder of nodes in one IR, which inserts them before or after one site."""

    def like(self, site: Site, x: V, w: V) -> V:
        """Emit the site's own op with other operands; keep its attributes, leave out the bias."""

    def parameter(self, name: str, value: Array, role: Role) -> V:
        """Add a stored tensor, or return the existing one with this name."""


@dataclass(frozen=True)
class Deferred:
    """An array that is computed on use, so that a file can be larger than memory."""

    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[], Array]


class Analysed:
    """A cache of a graph's analyses, valid until the graph is edited."""

    def __init__(self) -> None:
        self._kept: dict[str, object] = {}
        self._named: dict[str, object] = {}

    def kept(self, what: str, compute: Callable[[], T], *, by_name: bool = False) -> T:
        """Return the result of `compute` for this version of the graph, computed once.

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
        """Drop every analysis; call this after each edit of the graph."""
        self._kept = {}
        self._named = {}

    def share(self, named: dict[str, object]) -> None:
        """Keep analyses by name in this dictionary, which graphs with the same nodes share."""
        self._named = named


class TokenMask(Protocol):
    """Which tokens an adapter acts on, in one IR: those of an aLoRA."""

    def of(self, graph: object, site: Site) -> object:
        """Return the mask in a shape that broadcasts with the result of a site of a graph.

        Raises:
            LoraFxError: The rows of the result are not known to be the tokens.
        """


class Graph(Protocol[V]):
    """A graph in one IR, as passes see it."""

    def kept(self, what: str, compute: Callable[[], T], *, by_name: bool = False) -> T:
        """See `Analysed.kept`."""

    def changed(self) -> None:
        """See `Analysed.changed`."""

    @property
    def alone(self) -> bool:
        """Whether no other graph reads the same stored tensors."""

    def sites(self) -> Sequence[Site]:
        """Return every use of a weight in execution order, except nodes that a pass emitted."""

    def other_readers(self) -> Sequence[OtherReader]:
        """Return the readers of a parameter other than its sites, in execution order."""

    def parameters(self) -> Sequence[Parameter]:
        """Return every stored parameter, in definition order."""

    def gathered_flops(self) -> Mapping[str, int]:
        """Return FLOPs of products with rows gathered from a parameter, by its name."""

    def data_flops(self) -> int:
        """Return the FLOPs of matmuls between activations, at the example's sizes."""

    def adapted(self) -> frozenset[str]:
        """Return the ids of sites that already have a branch."""

    def read(self, name: str) -> Array:
        """Return a stored parameter as an array (bfloat16 through ml_dtypes)."""

    def reader(self, name: str) -> Callable[[], Array]:
        """Return a function that reads the parameter's current value."""

    def activation(self, site: Site) -> V:
        """Return the current value of the site's other operand."""

    def kept_activation(self, site: Site) -> V:
        """Return the activation in the form that a branch may keep for the backward pass."""

    def weight(self, site: Site) -> V:
        """Return the stored parameter that the site reads, as a value of this IR."""

    def output(self, site: Site) -> V:
        """Return the result of the site's op."""

    def picked(self, site: Site, e: Emitter[V]) -> V:
        """Return the ids [n] by which data selects the site's matrices from a stack."""

    def zero_points(self, site: Site) -> ZeroPoints | None:
        """Return the zero points of the site's codes [out, in]; None if they cannot be floats."""

    def put_zeros(self, sites: Sequence[Site], zero: Array) -> str:
        """Let sites of one weight use other zero points for their codes; return the new name."""

    def product(self, site: Site, e: Emitter[V]) -> V | None:
        """Return the result of the site's op without its bias; None if that cannot be separated."""

    def emit(self, site: Site, *, before: bool = False) -> Emitter[V]:
        """Return an emitter that inserts after or before the site, and marks its nodes."""

    def replace_output(self, site: Site, y: V) -> None:
        """Replace the site's result by y for every user."""

    def rebase(self, site: Site, w: V) -> None:
        """Replace the site's weight by w [stored shape], read through the site's own view."""

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """Whether only these sites read the parameter and its views."""

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor of the same shape, through their own views."""

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Let `sites` read `value` [stored shape] instead of parameter `name`.

        When these are all its uses its own constant is replaced, else they get a constant of
        their own. Returns the name that holds the value.
        """

    def clone(self) -> Graph[V]:
        """Return the same graph with new nodes; tensors are shared."""

    def lint(self) -> None:
        """Raise if the graph is not valid."""


@dataclass(frozen=True)
class Axes:
    """The role of each operand axis, after `steps` have split axes where needed."""

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
    """One kind of contraction, the same for every IR; an op table maps ops to kinds."""

    @property
    def name(self) -> str:
        """The name in refusals, FLOP counts and file formats, such as linear or conv."""

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Return which axes of an operand of this shape are batch, out and in."""

    @property
    def has_branch(self) -> bool:
        """Whether b·(a·x) can be added to the op's output; else only the weight form exists."""

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Emit b·(a·x) in the shape of the op's output, if `has_branch`."""

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """Return the shape in which one number a row of W scales the result, or an empty one."""
