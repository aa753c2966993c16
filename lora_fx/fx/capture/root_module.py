"""The module that a capture traces: a model without wrappers, or a function as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError, type_of
from lora_fx.fx.capture.call import Signature, without_cache

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""torch's wrapper classes → the name of the wrapped module in them."""


def wrappers(model: object) -> Iterator[Any]:
    """Yield a model and the models that it wraps, the innermost last.

    A wrapper puts `_orig_mod.` or `module.` before every name, which is none of the model's.
    """
    yield model
    if isinstance(model, nn.Module) and type(model).__module__.startswith("torch."):
        inner_name = WRAPPERS.get(type(model).__name__, "")
        inner = model._modules.get(inner_name)
        if inner is not None:
            yield from wrappers(inner)


def unwrapped(model: object) -> Any:
    """Return the model inside torch.compile's or a parallel wrapper; other objects unchanged."""
    return [*wrappers(model)][-1]


def as_module(model: object) -> nn.Module:
    """Return the module whose forward a capture traces: the model, or a module that calls it.

    A bound method of a module becomes that module with this method as its forward. A function
    becomes a module that owns the modules and parameters its closure and globals name.
    """
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type):
        raise LoraFxError(
            f"the class {model.__name__} is not a model",
            f"pass an instance of it: {model.__name__}(…)",
        )
    if not callable(model):
        hint = "pass an nn.Module, or a function of tensors"
        if isinstance(model, (str, PathLike)):
            hint = (
                "pass load_model(path).module, an nn.Module; export, merge and verify take a "
                "path to .onnx"
            )
        raise LoraFxError(f"{type_of(model)} is not a model", hint)
    return Called(model)


class OverTree(nn.Module):
    """A module with another forward over the tensors and modules of a source.

    Args:
        source: The module whose tree and mode it takes; None for a tree of its own.
    """

    def __init__(self, source: nn.Module | None) -> None:
        super().__init__()
        if source is not None:
            for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                self.__dict__[name] = getattr(source, name)
            self.training = source.training


class Called(OverTree):
    """A function as a module, with the modules of its closure and globals as children."""

    def __init__(self, function: Callable[..., Any]) -> None:
        bound_to = getattr(function, "__self__", None)
        source = bound_to if isinstance(bound_to, nn.Module) else None
        super().__init__(source)
        self.function = function
        inner = inspect.unwrap(function)
        if source is not None or not inspect.isfunction(inner):
            return
        variables = inspect.getclosurevars(inner)
        for name, variable in {**variables.globals, **variables.nonlocals}.items():
            if isinstance(variable, nn.Module):
                self.add_module(name, variable)
            elif isinstance(variable, nn.Parameter):
                self.register_parameter(name, variable)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


class RootModule(OverTree):
    """A model that takes its arguments as one dict.

    Args:
        source: The model.
        signature: That of its forward.
        forward: The function that is called.

    Attributes:
        source: Gives the model.
        left_out: Gives the names of the outputs of the last run that are no tensors.
    """

    def __init__(self, source: nn.Module, signature: Signature, forward: Any) -> None:
        super().__init__(source)
        left_out = list[str]()

        def call(named: dict[str, Any]) -> Any:
            left_out.clear()
            return without_cache(signature.call(forward, named), left_out)

        # Functions, since torch.export puts back what lists and tuples of a module held.
        self._call: Callable[[dict[str, Any]], Any] = call
        self.source: Callable[[], nn.Module] = lambda: source
        self.left_out: Callable[[], list[str]] = lambda: left_out

    def forward(self, named: dict[str, Any]) -> Any:
        """Call the user's forward with its arguments by name."""
        return self._call(named)
