"""A live module that reads adapted weights or adds a branch: its class is swapped, nothing else.

The class becomes a subclass of the user's, by the same name, with

    a property for each adapted leaf     every read of `module.leaf` gives W + s·B·A, or a LiveStack
    a forward                            y + B(A x)·s, or reads that differ inside this forward
    a fixed `training`                   batch norms that keep their running statistics
    adapter, load_adapter, report, compile   at the root

The stored Parameter stays in `_parameters` under its name: state_dict, optimizers, `.to()` and
FSDP see what they saw before. What an instance needs lies in one attribute, `_lora_fx`.

The maths of a branch or of W + s·B·A is recorded when an adapter is attached, as a short list of
primitives over the values that a call brings: a Recorder is eager torch as an Emitter. Running it
costs one loop and no layout work, and torch.compile traces through that loop.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.fx.dotted_names import owner
from lora_fx.fx.graph.nodes import reached
from lora_fx.fx.tensors import padding
from lora_fx.fx.trees import tree_map_only
from lora_fx.ir.convolution import Conv, ConvTranspose
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Grouped

INPUTS = 3
"""A call brings the activation or the stored weight, the op's result, and the op of a stack."""


CONVS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PRIMS: Mapping[str, Callable[..., torch.Tensor]] = {
    "matmul": torch.matmul,
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "detach": torch.Tensor.detach,
    "transpose": lambda x, perm: x.permute(perm),
    "reshape": lambda x, shape: x.reshape(shape),
    "repeat": lambda x, times: x.repeat_interleave(times, -1),
    "slice": lambda x, axis, start, stop: x.narrow(axis, start, stop - start),
    "pad": lambda x, before, after: F.pad(x, padding(before, after)),
    "einsum": lambda x, y, equation: torch.einsum(equation, x, y),
    "conv": lambda x, w, **attrs: CONVS[w.dim() - 3](x, w, None, **attrs),
    "conv_transpose": lambda x, w, **attrs: TRANSPOSED[w.dim() - 3](x, w, None, **attrs),
    "through": lambda op, x, w: op(x, w),
    "gather": lambda w, ids, padding_idx=None: F.embedding(ids, w, padding_idx),
    "dropout": lambda x, p: F.dropout(x, p, training=True),
    "cast": lambda x, dtype: x.to(getattr(torch, dtype)),
    "cast_like": lambda x, y: x.to(y.dtype),
}
"""What runs each primitive of lora_fx.ir.emitter.Ops."""


class Value(int):
    """A value of a recording, which is its place in the list of values."""


Step = tuple[str, tuple[int, ...], tuple[tuple[str, Any], ...]]
"""A primitive, the places of what it takes, and its attributes: programs are compared."""


@dataclass(frozen=True)
class Program:
    """Recorded primitives.

    Values are, in order: the INPUTS, the adapter's tensors by dotted name, constants, and the
    result of each step; the last one is the program's.
    """

    tensors: tuple[str, ...]
    constants: tuple[float, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Bound:
    """A program with the modules that hold its tensors, and attributes ready to be passed."""

    places: tuple[tuple[nn.Module, str], ...]
    constants: tuple[float, ...]
    steps: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...]

    def __call__(self, first: torch.Tensor, second: object = None, op: object = None) -> object:
        """Run the program on the values of one call."""
        tensors = [module._parameters[leaf] for module, leaf in self.places]
        values: list[object] = [first, second, op, *tensors, *self.constants]
        for prim, operands, attrs in self.steps:
            values.append(PRIMS[prim](*[values[i] for i in operands], **attrs))
        return values[-1]


def bound(program: Program, root: nn.Module) -> Bound:
    """The program with the modules under `root` that hold its tensors."""
    steps = tuple((prim, operands, dict(attrs)) for prim, operands, attrs in program.steps)
    return Bound(tuple(owner(root, n) for n in program.tensors), program.constants, steps)


@dataclass
class Recorder:
    """An Emitter whose values are places in a recording.

    Args:
        padding: The padding_idx of the site's lookup, which `like` keeps.
    """

    padding: int | None = None
    made: list[tuple[Any, ...]] = field(default_factory=lambda: [("input",)] * INPUTS)

    def _add(self, *entry: object) -> Value:
        self.made.append(entry)
        return Value(len(self.made) - 1)

    def op(self, prim: str, *xs: Any, **attrs: object) -> Value:
        """Record one primitive of the closed set; see lora_fx.ir.emitter.Ops."""
        operands = [x if isinstance(x, Value) else self._add("constant", float(x)) for x in xs]
        fixed = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in attrs.items()))
        return self._add("step", prim, tuple(operands), fixed)

    def like(self, site: Site, x: Value, w: Value) -> Value:
        """Record the site's op; a lookup keeps its padding row, which has no gradient."""
        if site.op == "embedding":
            return self.op("gather", w, x, padding_idx=self.padding)
        if isinstance(site.kind, Grouped):
            return self.op("through", Value(2), x, w)
        if isinstance(site.kind, (Einsum, Conv, ConvTranspose)):
            return site.kind.apply(self, site, x, w)
        return self.op(site.op, x, w)  # with operands of its own: no primitive, so no output form

    def parameter(self, name: str, value: Array, role: Role) -> Value:
        """A tensor of the adapter, found by its name at each call."""
        entry = ("tensor", name)
        return Value(self.made.index(entry)) if entry in self.made else self._add(*entry)

    def program(self, result: Value) -> Program:
        """What leads to `result`; everything else that was recorded is left out.

        Raises:
            LoraFxError: A primitive that PRIMS lacks.
        """
        made = self.made
        needed = reached([int(result)], lambda i: made[i][2] if made[i][0] == "step" else ())
        groups: dict[str, list[int]] = {"input": [], "tensor": [], "constant": [], "step": []}
        for i in sorted({*range(INPUTS), *needed}):
            groups[made[i][0]].append(i)
        at = {i: n for n, i in enumerate(itertools.chain(*groups.values()))}
        steps = []
        for _, prim, read, attrs in (made[i] for i in groups["step"]):
            if prim not in PRIMS:
                raise MistakeError(f"the eager emitter has no primitive {prim!r}")
            steps.append((prim, tuple(at[i] for i in read), attrs))
        tensors, constants = (tuple(made[i][1] for i in groups[k]) for k in ("tensor", "constant"))
        return Program(tensors, constants, tuple(steps))


# A live module, by the class that it is given.


STATE = "_lora_fx"
REGISTRY = "_lora_fx_attached"
METHODS = ("adapter", "load_adapter", "report", "compile")
"""Methods that the root gains, unless the model has something of its own by that name."""
ALWAYS, INSIDE, OUTSIDE = "always", "inside", "outside"


@dataclass
class ActiveAdapter:
    """The switch that all modules of one model share; off gives the base model's numbers.

    Attributes:
        on: Whether the updates count.
        seen: Collects the id of every module whose branch ran, while a proof asks for it.
    """

    on: bool = True
    seen: set[int] | None = None


@dataclass
class Live:
    """What one module of an attached model knows.

    Attributes:
        switch: The switch of the model.
        weights: For each leaf, the program of W + ΔW and which reads it serves: always, or only
            those inside or outside of this module's own forward.
        output: The programs of the branch in eval and in train mode.
        stacks: The same for the products of each leaf that is a stack of matrices.
        formed: Those of these leaves whose W + ΔW something has asked for.
        inside: True while the module's own forward runs, where a weight asks for that.
    """

    switch: ActiveAdapter
    weights: dict[str, tuple[Bound, str]] = field(default_factory=dict)
    output: tuple[Bound, Bound] | None = None
    stacks: dict[str, tuple[Bound, Bound]] = field(default_factory=dict)
    formed: set[str] = field(default_factory=set)
    inside: bool = False
    frozen: bool = False
    gained: tuple[str, ...] = ()


Forward = Callable[..., object]


def _reader(leaf: str) -> property:
    """A property in place of `module.leaf`: the stored parameter with its update."""

    def read(self: nn.Module) -> object:
        w = self._parameters[leaf]
        live: Any = self._lora_fx
        program, where = live.weights[leaf]
        if not live.switch.on or (where != ALWAYS and live.inside != (where == INSIDE)):
            return w
        # what is sharded or made from codes has a type of its own
        if leaf in live.stacks and type(w) is nn.Parameter:
            return LiveStack(w, live, leaf, live.stacks[leaf][int(self.training)])
        return program(w)

    return property(read)


Op = Callable[..., object]
Given = Mapping[str, object]
PRODUCTS = {"linear": 2, "matmul": 2, "__matmul__": 2, "bmm": 2, "mm": 2}
PRODUCTS |= {"grouped_mm": 3, "_grouped_mm": 3, "grouped_mm_fallback": 3}
"""Names of products, and how many arguments they may have for a branch: the third is `offs`."""
METADATA = ("dtype", "device", "shape", "ndim", "dim", "size", "data_ptr")


@dataclass(eq=False)
class LiveStack:
    """What a read of W [experts, …] with an update gives: products with x have its branch beside.

    torch hands over every op that takes one. A product may come after a transpose, or after data
    has picked matrices; whatever else takes a stack gets W + ΔW.

    Attributes:
        stored: W.
        live: What its module knows.
        leaf: Its name there.
        branch: The program of a product's result with the branch in it.
        turned: True after a transpose of the matrices.
        picks: What picked along the first axis.
    """

    stored: torch.Tensor
    live: Live
    leaf: str
    branch: Bound
    turned: bool = False
    picks: tuple[int | torch.Tensor, ...] = ()

    def view(self, w: torch.Tensor) -> torch.Tensor:
        """A tensor [experts, …] as an op reads the stack."""
        for ids in self.picks:
            w = w[ids]
        return w.mT if self.turned else w

    def formed(self) -> torch.Tensor:
        """W + ΔW as an op reads it."""
        self.live.formed.add(self.leaf)
        return self.view(cast(torch.Tensor, self.live.weights[self.leaf][0](self.stored)))

    def transpose(self, *axes: int) -> torch.Tensor | LiveStack:
        """The stack with two axes exchanged."""
        if self.picks or {axis % 3 for axis in axes} != {1, 2}:
            return self.formed().transpose(*axes)
        return replace(self, turned=not self.turned)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor | LiveStack:
        """Matrices of the stack; anything else of W + ΔW."""
        if self.picks or not isinstance(index, (int, torch.Tensor)):
            return self.formed()[index]
        return replace(self, picks=(index,))

    def __getattr__(self, name: str) -> object:
        """What W + ΔW has; what W has too is read there."""
        return getattr(self.view(self.stored) if name in METADATA else self.formed(), name)

    def __len__(self) -> int:
        """How many matrices there are."""
        return len(self.view(self.stored))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Those of W + ΔW."""
        return iter(self.formed())

    def __matmul__(self, x: torch.Tensor) -> object:
        """Every matrix times x."""
        return torch.matmul(self, x)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Op, types: object, args: Sequence[object] = (), kwargs: Given | None = None
    ) -> object:
        """Run an op that takes a stack."""
        given = {k: v for k, v in (kwargs or {}).items() if v is not None}
        stacks = [w for w in args[:2] if isinstance(w, cls)]
        xs = [x for x in args[:2] if isinstance(x, torch.Tensor) and x.dim() > 1]
        extra = {*given} - {"offs"} or len(args) + len(given) > PRODUCTS.get(func.__name__, 0)
        if len(stacks) == len(xs) == 1 and not extra:
            return stacks[0].product(func, xs[0], args, given)
        args, given = tree_map_only(cls, cls.formed, (args, dict(kwargs or {})))
        return func(*args, **given)

    def product(self, func: Op, x: torch.Tensor, args: Sequence[object], given: Given) -> object:
        """The op on W and x with the branch beside it."""
        left, last = args[0] is self, func.__name__ == "linear"

        def op(x: torch.Tensor, w: torch.Tensor) -> object:
            return func(*((w, x) if left else (x, w)), *args[2:], **given)

        def through(x: torch.Tensor, w: torch.Tensor) -> object:
            for ids in self.picks:  # w [experts, in, out] of a factor
                w = w[ids]
            return op(x, w.mT if left or last else w)

        def run(x: torch.Tensor) -> object:
            return self.branch(x, op(x, self.view(self.stored)), through)

        if self.picks and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the copies that data picks, one a row, are made again in backward and not kept
            return checkpoint(run, x, use_reentrant=False)
        return run(x)


FLAT = property(
    lambda self: [getattr(self, n) for n in self._flat_weights_names],
    lambda self, _: self.__dict__.update(_flat_weights=_stored(self)),
)
"""A property in place of the list of weights that torch's recurrent modules hand to their op.

They store that list anew when a weight has changed. Stored parameters are kept and not what was
computed from them, since a computed tensor cannot be deep-copied.
"""


def _stored(module: nn.RNNBase) -> list[nn.Parameter | None]:
    """The parameters of a recurrent module, in the order of its op."""
    return [module._parameters.get(n) for n in module._flat_weights_names]


def _with_branch(plain: Forward) -> Forward:
    @functools.wraps(plain)
    def forward(self: Any, *args: object, **kwargs: object) -> object:
        y = plain(self, *args, **kwargs)
        live = self._lora_fx
        if live.switch.seen is not None:
            live.switch.seen.add(id(self))
        if not live.switch.on:
            return y
        # only modules whose forward takes one argument get a branch (see one_argument)
        x = args[0] if args else next(iter(kwargs.values()))
        return live.output[1 if self.training else 0](x, y)

    return forward


def _with_bracket(plain: Forward) -> Forward:
    @functools.wraps(plain)
    def forward(self: Any, *args: object, **kwargs: object) -> object:
        live = self._lora_fx
        # restored, not cleared: a forward may call itself
        was, live.inside = live.inside, True
        try:
            return plain(self, *args, **kwargs)
        finally:
            live.inside = was

    return forward


def _forwarded(name: str) -> Callable[..., object]:
    def method(self: nn.Module, *args: object, **kwargs: object) -> object:
        return getattr(self.__dict__[REGISTRY], name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"See lora_fx.fx.attach.attachment.Attachment.{name}."
    return method


@functools.cache
def live_class(
    base: type[nn.Module],
    leaves: tuple[str, ...],
    gained: tuple[str, ...] = (),
    *,
    branch: bool,
    bracket: bool,
    frozen: bool,
) -> type[nn.Module]:
    """The subclass of `base`; modules that need the same share it."""
    names: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        **{leaf: _reader(leaf) for leaf in leaves},
        **{name: _forwarded(name) for name in gained},
    }
    if leaves and issubclass(base, nn.RNNBase):
        names["_flat_weights"] = FLAT
    if bracket:
        names["forward"] = _with_bracket(base.forward)
    if branch:
        names["forward"] = _with_branch(names.get("forward", base.forward))
    if frozen:  # what train() and eval() set is kept, and comes back with detach
        names["training"] = property(
            lambda self: False, lambda self, mode: self.__dict__.update(training=mode)
        )
    metaclass: Any = type(base)
    return _metaclass(metaclass)(base.__name__, (base,), names)


@functools.cache
def _metaclass(base: type) -> Callable[..., type[nn.Module]]:
    """A metaclass whose classes refuse to be pickled; copy and deepcopy never ask it."""
    made = type(base.__name__, (base,), {})
    copyreg.pickle(made, _refuse_pickle)
    return made


def _refuse_pickle(live: type) -> str:
    raise LoraFxError(
        f"{live.__name__}: a model with an adapter attached is not pickled whole",
        "torch.save(model.state_dict(), …) and lora_fx.save_adapter(model.adapter(), …); or "
        "lora_fx.detach(model) first",
    )


def swap(module: nn.Module, live: Live) -> type[nn.Module]:
    """Give a module its subclass and its state; returns the new class.

    Raises:
        LoraFxError: A class that cannot be subclassed, or one that computes the leaf itself.
    """
    base: Any = type(module)
    for leaf in live.weights:
        # a property that the class has already would be hidden by ours
        if hasattr(type(inspect.getattr_static(base, leaf, None)), "__set__"):
            raise LoraFxError(
                f"{base.__name__}.{leaf} is computed by the class itself", "use insert instead"
            )
    try:
        new = live_class(
            base,
            tuple(live.weights),
            live.gained,
            branch=live.output is not None,
            bracket=any(where != ALWAYS for _, where in live.weights.values()),
            frozen=live.frozen,
        )
        module.__class__ = new
    except TypeError as e:
        raise LoraFxError(f"{base.__name__} cannot be adapted: {e}", "use insert instead") from e
    module.__dict__[STATE] = live
    return new


def restore(module: nn.Module) -> None:
    """Give a module its own class back, and undo everything else that `swap` did."""
    (module.__class__,) = type(module).__bases__
    module.__dict__.pop(STATE, None)
    if isinstance(module, nn.RNNBase):  # its references are to weights that were computed
        module._flat_weights = flat = _stored(module)
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in flat]
