"""A model is the same after a run or a trace as it was before."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lora_fx.patching import patched

_IMMUTABLE = {bool, int, float, str, tuple, type(None)}
"""Types of attributes that a run can only replace."""
_ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict)


@dataclass(frozen=True)
class _ModuleState:
    """The mode, buffers, children and plain attributes of one module, which a run may replace."""

    module: nn.Module
    training: bool
    buffers: Mapping[str, torch.Tensor | None]
    children: Mapping[str, nn.Module | None]
    attributes: Mapping[str, object]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        # an attached model's frozen norms say False, whatever they are set to
        training = module.__dict__.get("training", module.training)
        attributes = _replaceable_attributes(module)
        return cls(module, training, dict(module._buffers), dict(module._modules), attributes)

    def restore(self) -> None:
        self.module.training = self.training
        self.module._buffers.update(self.buffers)
        self.module._modules.update(self.children)
        self.module.__dict__.update(self.attributes)


@contextlib.contextmanager
def as_it_was(model: nn.Module, training: bool | None = False) -> Iterator[None]:
    """A block in which a model runs in a mode; it restores all state that a run may change.

    That is every module's mode, its buffers, in place or replaced, its children, and the tensors
    and plain values among its attributes. Hooks write such (weight_norm's weight), a trace would
    leave fake ones, and BigBird takes other attention from the first short input on.

    Args:
        model: The model.
        training: The mode in the block; None leaves every module in the mode that it is in.
    """
    states = [_ModuleState.of(module) for module in model.modules()]
    buffer_values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for state in states:
            state.restore()
        with torch.no_grad():
            for buffer, value in buffer_values:
                buffer.copy_(value)


def _replaceable_attributes(module: nn.Module) -> dict[str, object]:
    if isinstance(module, LazyModuleMixin):
        return {}  # its first run makes it a module of another class
    return {
        name: attribute
        for name, attribute in module.__dict__.items()
        if type(attribute) in _IMMUTABLE or isinstance(attribute, torch.Tensor)
    }


@contextlib.contextmanager
def alike(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """A block in which a model draws the same random numbers every time, and is as it was after."""
    uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if uses_cuda else 0)
    with as_it_was(model, training), torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def same_dtypes() -> Iterator[None]:
    """A block in which a module that is cast to the dtype that it has stays as it is.

    torch puts new parameters in the place of those of a trace, and fails, since the trace has them.
    """
    apply: Callable[..., Any] = nn.Module._apply

    def changed(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        with torch.no_grad():
            result = fn(tensor)
        after = (result.dtype, result.device, result.shape)
        return after != (tensor.dtype, tensor.device, tensor.shape)

    def apply_changes(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        tensors = (*self.parameters(recurse), *self.buffers(recurse))
        if any(changed(tensor, fn) for tensor in tensors):
            return apply(self, fn, recurse)
        return self

    with patched(nn.Module, _apply=apply_changes):
        yield


@contextlib.contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """A block in which torch.export traces a model whose attributes are the same things after it.

    torch.export puts copies of lists and dicts back, one for each module that has them. What
    several modules shared would be apart then: the next trace, or the user's own module, is
    another model.
    """
    attributes_of_modules: list[tuple[nn.Module, dict[str, Any]]] = []
    contents: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        attributes = {
            name: attribute
            for name, attribute in vars(module).items()
            if name not in _ATTRIBUTES_OF_TORCH
        }
        attributes_of_modules.append((module, attributes))
        for attribute in attributes.values():
            _note_contents(attribute, contents)
    try:
        yield
    finally:
        for module, attributes in attributes_of_modules:
            vars(module).update(attributes)
        for container, content in contents.values():
            container.clear()
            if isinstance(container, dict):
                container.update(content)
            else:
                container.extend(content)


def _note_contents(thing: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Note the contents of lists and dicts, also nested ones: id → (the container, its content)."""
    is_container = type(thing) in _CONTAINERS
    if not (is_container or isinstance(thing, tuple)) or id(thing) in contents:
        return
    inner_things: Iterable[Any] = thing
    if isinstance(thing, dict):
        contents[id(thing)] = thing, dict(thing)
        inner_things = thing.values()
    elif is_container:
        contents[id(thing)] = thing, list(thing)
    for inner in inner_things:
        _note_contents(inner, contents)
