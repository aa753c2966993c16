"""A live module that reads adapted weights or adds a branch: its class is swapped, nothing else.

The class becomes a subclass of the user's, by the same name, with

    a property for each adapted leaf     every read of `module.leaf` gives W + s·B·A, or a LiveStack
    a forward                            y + B(A x)·s, or reads that differ inside this forward
    a fixed `training`                   batch norms that keep their running statistics
    adapter, load_adapter, report, compile   at the root

The stored Parameter stays in `_parameters` under its name: state_dict, optimizers, `.to()` and
FSDP see what they saw before. What an instance needs lies in one attribute, `_lora_fx`.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.live_stack import LiveStack
from lora_fx.fx.attach.live_state import Live

STATE = "_lora_fx"
REGISTRY = "_lora_fx_attached"
METHODS = ("adapter", "load_adapter", "report", "compile")
"""Methods that the root gets, unless the model already has an attribute of that name."""
ALWAYS, INSIDE, OUTSIDE = "always", "inside", "outside"


Forward = Callable[..., object]


def _reader(leaf: str) -> property:
    """A property in place of `module.leaf`: the stored parameter with its update."""

    def read(self: nn.Module) -> object:
        stored = self._parameters[leaf]
        live: Any = self._lora_fx
        program, where = live.weights[leaf]
        if not live.switch.on or (where != ALWAYS and live.inside != (where == INSIDE)):
            return stored
        # what is sharded or made from codes has a type of its own
        if leaf in live.stacks and type(stored) is nn.Parameter:
            return LiveStack(stored, live, leaf, live.stacks[leaf][int(self.training)])
        return program(stored)

    return property(read)


FLAT = property(
    lambda self: [getattr(self, name) for name in self._flat_weights_names],
    lambda self, _: self.__dict__.update(_flat_weights=_stored(self)),
)
"""A property in place of the list of weights that torch's recurrent modules hand to their op.

They store that list anew when a weight has changed. Stored parameters are kept and not what was
computed from them, since a computed tensor cannot be deep-copied.
"""


def _stored(module: nn.RNNBase) -> list[nn.Parameter | None]:
    """The parameters of a recurrent module, in the order of its op."""
    return [module._parameters.get(name) for name in module._flat_weights_names]


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
        was_inside = live.inside
        live.inside = True
        try:
            return plain(self, *args, **kwargs)
        finally:
            live.inside = was_inside

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
    metaclass = type(base.__name__, (base,), {})
    copyreg.pickle(metaclass, _refuse_pickle)
    return metaclass


def _refuse_pickle(live: type) -> str:
    raise LoraFxError(
        f"{live.__name__}: a model with an attached adapter cannot be pickled whole",
        "save the two parts with torch.save(model.state_dict(), …) and "
        "lora_fx.save_adapter(model.adapter(), …); or call lora_fx.detach(model) first",
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
                f"{base.__name__}.{leaf} is computed by the class itself",
                "use lora_fx.insert instead",
            )
    try:
        subclass = live_class(
            base,
            tuple(live.weights),
            live.gained,
            branch=live.output is not None,
            bracket=any(where != ALWAYS for _, where in live.weights.values()),
            frozen=live.frozen,
        )
        module.__class__ = subclass
    except TypeError as e:
        raise LoraFxError(
            f"{base.__name__} cannot be adapted: {e}", "use lora_fx.insert instead"
        ) from e
    module.__dict__[STATE] = live
    return subclass


def restore(module: nn.Module) -> None:
    """Give a module its own class back, and undo everything else that `swap` did."""
    (module.__class__,) = type(module).__bases__
    module.__dict__.pop(STATE, None)
    if isinstance(module, nn.RNNBase):  # its references are to weights that were computed
        weights = _stored(module)
        module._flat_weights = weights
        module._flat_weight_refs = [
            None if weight is None else weakref.ref(weight) for weight in weights
        ]
