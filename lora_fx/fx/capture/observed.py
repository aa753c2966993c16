"""The observation of a model during a trace, whose graph loses hooks, modes and random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.errors import CaptureError
from lora_fx.fx.capture.finite_numbers import FiniteNumbers
from lora_fx.patching import patched

NO_DROP = "layer drop is off in train mode: a graph contains every layer"


class _DrawnNumber(float):
    """A drawn random number that Python compares, with a value that drops nothing."""

    def item(self) -> float:
        """Return the number, as a tensor's `item` does."""
        return float(self)


class EveryLayer(TorchFunctionMode):
    """A block in which no layer is dropped at random.

    Args:
        notes: Gets a note where one would be.
    """

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; a single drawn number becomes one that drops nothing."""
        if func is torch.rand and len(args) == 1 and args[0] in ([], ()):
            if NO_DROP not in self.notes:
                self.notes.append(NO_DROP)
            return _DrawnNumber(1.0)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Observed:
    """The observations of one trace.

    Attributes:
        notes: Notes for the user.
        own_gradients: Names, each once, of code whose gradient may differ from that of its
            forward: modules with backward hooks, autograd functions, hooks of tensors.
    """

    notes: list[str] = field(default_factory=list)
    own_gradients: list[str] = field(default_factory=list)


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[Observed]:
    """A block that traces a model; it yields observations, which are complete after the block.

    A train mode that drops whole layers at random drops none: Wav2Vec2, BART and their like draw
    one number a layer and let Python compare it, which no graph can hold. (Stochastic depth by a
    mask draws tensors, and stays.) An export drops autograd functions and hooks, so they are noted.
    What numpy and Python draw would be a constant of the graph. Branches on whether numbers are
    finite go where finite ones go.

    Raises:
        CaptureError: Numbers were drawn outside torch.
    """
    observed = Observed()
    own_gradients = observed.own_gradients
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            own_gradients.append(name)

    function_class: Any = torch.autograd.Function
    tensor_class: Any = torch.Tensor
    apply = function_class.__dict__["apply"]
    register_hook = tensor_class.register_hook

    def noted_apply(cls: Any, /, *args: object, **kwargs: object) -> Any:
        if not cls.__module__.startswith("torch."):
            own_gradients.append(cls.__qualname__)
        return apply.__get__(None, cls)(*args, **kwargs)

    def noted_hook(self: object, *args: object) -> object:
        own_gradients.append("Tensor.register_hook")
        return register_hook(self, *args)

    functions_noted = patched(function_class, apply=classmethod(noted_apply))
    hooks_noted = patched(tensor_class, register_hook=noted_hook)
    layers = EveryLayer(observed.notes) if model.training else contextlib.nullcontext()
    state_before = _random_state_outside_torch()
    with functions_noted, hooks_noted, layers, FiniteNumbers(observed.notes):
        yield observed
    own_gradients[:] = dict.fromkeys(own_gradients)
    if _random_state_outside_torch() != state_before:
        raise _drawn_outside_torch(model)


def _random_state_outside_torch() -> tuple[object, ...]:
    name, keys, *position = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(keys).tobytes(), *position)


def _drawn_outside_torch(model: nn.Module) -> CaptureError:
    mode = "train" if model.training else "eval"
    cure = "draw them with torch"
    if getattr(getattr(model, "config", None), "apply_spec_augment", False):
        cure = "set config.apply_spec_augment = False, since numpy draws its masks"
    return CaptureError(
        f"cannot capture {type(model).__name__} in {mode} mode: it draws random numbers with "
        "numpy or Python, and a graph would repeat the same ones",
        f"{cure}; or use lora_fx.attach, which trains the live model",
    )


@contextlib.contextmanager
def observing_modes(model: nn.Module) -> Iterator[list[type]]:
    """A block that traces a model; it yields the classes whose modules may depend on their mode.

    The list is complete after the block. A module may depend on its mode where it was asked for
    its `training`, which is a property for the time of the block, or where it does what it likes
    when its mode is set.
    """
    mode_readers: list[type] = []
    for kind in {type(module) for module in model.modules()}:
        if kind.train is not nn.Module.train or hasattr(kind, "training"):
            mode_readers.append(kind)
    # torch calls modules by proxies over their __dict__
    dict_ids = {id(module.__dict__) for module in model.modules()}

    def get(module: nn.Module) -> bool:
        # a body that is compiled must not write to a list
        if not torch.compiler.is_dynamo_compiling() and id(module.__dict__) in dict_ids:
            mode_readers.append(type(module))
        return bool(module.__dict__.get("training", True))

    def put(module: nn.Module, mode: object) -> None:
        module.__dict__.update(training=mode)

    with patched(nn.Module, training=property(get, put)):
        yield mode_readers
