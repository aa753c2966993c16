"""A model is the same after a run or a trace as it was before."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lora_fx.patching import patched


@contextlib.contextmanager
def same_dtypes() -> Iterator[None]:
    """A block in which a module that is cast to the dtype that it has stays as it is.

    torch puts new parameters in the place of those of a trace, and fails, since the trace has them.
    """
    apply: Callable[..., Any] = nn.Module._apply

    def changed(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        with torch.no_grad():
            new = fn(tensor)
        return (new.dtype, new.device, new.shape) != (tensor.dtype, tensor.device, tensor.shape)

    def apply_changes(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        if any(changed(t, fn) for t in (*self.parameters(recurse), *self.buffers(recurse))):
            return apply(self, fn, recurse)
        return self

    with patched(nn.Module, _apply=apply_changes):
        yield


_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict)


@contextlib.contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """A block in which torch.export traces a model whose attributes are the same things after it.

    torch.export puts copies of lists and dicts back, one for each module that has them. What
    several modules shared would be apart then: the next trace, or the user's own module, is
    another model.
    """
    own = [
        (m, {name: x for name, x in vars(m).items() if name not in _OF_TORCH})
        for m in model.modules()
    ]
    contents = dict[int, tuple[Any, Any]]()
    for _, attributes in own:
        for x in attributes.values():
            _keep_contents(x, contents)
    try:
        yield
    finally:
        for module, attributes in own:
            vars(module).update(attributes)
        for container, before in contents.values():
            container.clear()
            if isinstance(container, dict):
                container.update(before)
            else:
                container.extend(before)


def _keep_contents(x: Any, kept: dict[int, tuple[Any, Any]]) -> None:
    """Note what lists and dicts hold, and those in them, by their ids."""
    if not (type(x) in _CONTAINERS or isinstance(x, tuple)) or id(x) in kept:
        return
    if not isinstance(x, tuple):
        kept[id(x)] = x, dict(x) if isinstance(x, dict) else list(x)
    for inner in x.values() if isinstance(x, dict) else x:
        _keep_contents(inner, kept)


@contextlib.contextmanager
def as_it_was(model: nn.Module, training: bool | None = False) -> Iterator[None]:
    """A block in which a model runs in a mode; what a run may leave behind is put back after it.

    None is the mode that it is in.

    That is every module's mode, its buffers, in place or replaced, its children, and the tensors
    and plain values among its attributes. Hooks write such (weight_norm's weight), a trace would
    leave fake ones, and BigBird takes other attention from the first short input on.
    """
    # an attached model's frozen norms say False, whatever they are set to
    held = [
        (m, m.__dict__.get("training", m.training), dict(m._buffers), _plain(m))
        for m in model.modules()
    ]
    children = [(m, dict(m._modules)) for m in model.modules() if m._modules]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for m, was, buffers, plain in held:
            m.training = was
            m._buffers.update(buffers)
            m.__dict__.update(plain)
        for m, modules in children:
            m._modules.update(modules)
        with torch.no_grad():
            for b, value in values:
                b.copy_(value)


@contextlib.contextmanager
def alike(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """A block in which a model draws the same random numbers every time, and is as it was after."""
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if there else 0)
    with as_it_was(model, training), torch.random.fork_rng(devices):
        yield


PLAIN = {bool, int, float, str, tuple, type(None)}
"""Types of attributes that a run can only replace."""


def _plain(module: nn.Module) -> dict[str, object]:
    if isinstance(module, LazyModuleMixin):
        return {}  # its first run makes it a module of another class
    return {
        k: v for k, v in module.__dict__.items() if type(v) in PLAIN or isinstance(v, torch.Tensor)
    }
