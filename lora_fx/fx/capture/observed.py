"""What is observed while a model is traced, since the graph that comes out has not got it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.errors import CaptureError
from lora_fx.patching import patched


class _Drawn(float):
    """A random number that Python compares, drawn so that nothing is left out."""

    def item(self) -> float:
        """The number, as a tensor gives it."""
        return float(self)


class EveryLayer(TorchFunctionMode):
    """A block in which no layer is dropped at random.

    Args:
        said: Gets a note where one would be.
    """

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; a lone number that is drawn is one that drops nothing."""
        if func is torch.rand and len(args) == 1 and args[0] in ([], ()):
            self.said[:] = ["no layer is dropped in train mode: a graph has all of them"]
            return _Drawn(1.0)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[Callable[[], tuple[tuple[str, ...], tuple[str, ...]]]]:
    """A block that traces a model; gives what has to be said, and what has gradients of its own.

    A train mode that drops whole layers at random drops none: Wav2Vec2, BART and their like draw
    one number a layer and let Python compare it, which no graph can hold. (Stochastic depth by a
    mask draws tensors, and stays.) An export drops autograd functions and hooks, so they are noted.
    What numpy and Python draw would be a constant of the graph.

    Raises:
        CaptureError: Numbers were drawn outside torch.
    """
    said: list[str] = []
    own = [n for n, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    function: Any = torch.autograd.Function
    tensor: Any = torch.Tensor
    apply, hook = function.__dict__["apply"], tensor.register_hook

    def noted(cls: Any, /, *args: object, **kwargs: object) -> Any:
        own.extend([cls.__qualname__] * (not cls.__module__.startswith("torch.")))
        return apply.__func__(cls, *args, **kwargs)

    def hooked(self: object, *args: object) -> object:
        own.append("Tensor.register_hook")
        return hook(self, *args)

    before = _drawn_outside()
    watched = patched(function, apply=classmethod(noted)), patched(tensor, register_hook=hooked)
    with watched[0], watched[1], EveryLayer(said) if model.training else contextlib.nullcontext():
        yield lambda: (tuple(said), tuple(dict.fromkeys(own)))
    if _drawn_outside() != before:
        cure = "draw them by torch"
        if getattr(getattr(model, "config", None), "apply_spec_augment", False):
            cure = "set config.apply_spec_augment = False, since its masks are drawn by numpy"
        raise CaptureError(
            f"cannot capture {type(model).__name__} in {'train' if model.training else 'eval'} "
            "mode: it draws random numbers by numpy or Python, which a graph would keep",
            f"{cure}; lora_fx.attach trains the live model",
        )


@contextlib.contextmanager
def observing_modes(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """A block that traces a model; gives whether the trace may depend on the mode of a module.

    It does where a module was asked for its `training`, which is a property for the time of the
    block, or does what it likes when its mode is set.
    """
    kinds = {type(m) for m in model.modules()}
    read = [k for k in kinds if k.train is not nn.Module.train or hasattr(k, "training")]
    # torch calls modules by proxies over their __dict__
    own = {id(m.__dict__) for m in model.modules()}

    def get(module: nn.Module) -> bool:
        compiled = torch.compiler.is_dynamo_compiling()  # a body, which must not write to a list
        if not compiled and id(module.__dict__) in own:
            read.append(type(module))
        return bool(module.__dict__.get("training", True))

    watched = property(get, lambda module, mode: module.__dict__.update(training=mode))
    with patched(nn.Module, training=watched):
        yield lambda: bool(read)


def _drawn_outside() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(keys).tobytes(), *rest)
