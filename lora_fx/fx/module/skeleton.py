"""The tree that holds a model's tensors, and the weightless copy that holds its code.

The skeleton has the user's names, ties and class names, shares the parameters' storage under
flags of its own, and copies the buffers. The weightless copy is the user's module with every
tensor faked: captures trace it, so the user's module keeps its mode and its statistics, and no
weight is held twice.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.module.checkpointing import checkpointer
from lora_fx.fx.tensors import AdapterTensors


class Scope(nn.Module):
    """One module of the skeleton; only outlined blocks are called."""

    recompute = False
    """Save this block's inputs only, and run it again in backward (torch.utils.checkpoint)."""
    _again = staticmethod(checkpointer({}))

    def __getitem__(self, index: int | str) -> nn.Module:
        """A child by position or name, as Sequential and ModuleDict have it."""
        if isinstance(index, str):
            child = self._modules[index]
        else:
            child = list(self._modules.values())[index]
        assert child is not None
        return child

    def forward(self, program: str, *args: object) -> Any:
        """Run this block's part of a program."""
        programs: Any = getattr(self, "_programs", None)
        if programs is None:
            raise LoraFxError(
                f"{type(self).__name__} is a part of a captured model and cannot be called",
                "call the whole model; its parts hold the tensors",
            )
        code = programs.codes[program, self._path]
        if self.recompute and self.training and torch.is_grad_enabled():
            return self._again(code, self, *args)
        return code(self, *args)


_classes: dict[tuple[str, type], type[Any]] = {}


def scope_class(name: str, base: type[Any] = Scope) -> type[Any]:
    """A subclass of Scope by the name of the user's class, for printing and wrap policies."""
    if (name, base) not in _classes:
        _classes[name, base] = type(name, (base,), {"__module__": __name__})
    return _classes[name, base]


def blocks_of(root: nn.Module) -> dict[str, Scope]:
    """Path → children of the outermost ModuleLists and Sequentials, each module once."""
    blocks: dict[str, Scope] = {}
    for name, m in root.named_modules():
        # by name: tools such as FSDP2 make subclasses, and Sequential became a Scope here
        names = {c.__name__ for c in type(m).__mro__}
        inner = any(name == p or name.startswith(f"{p}.") for p in blocks)
        if inner or not names & {"ModuleList", "Sequential"}:
            continue
        for key, child in m._modules.items():
            if isinstance(child, Scope) and all(child is not b for b in blocks.values()):
                blocks[f"{name}.{key}".lstrip(".")] = child
    return blocks


def skeleton(
    module: nn.Module,
    memo: dict[int, Any],
    root: nn.Module | None = None,
    own: Collection[int] = (),
) -> nn.Module:
    """The tree of `module` without its code.

    Args:
        module: The user's module, or a part of it.
        memo: id of an original → its counterpart; keeps ties and shared modules.
        root: The object to fill, for the top of the tree.
        own: ids of parameters that get a copy of their storage (they will be trained).

    Raises:
        LoraFxError: The top of the tree holds something under a name that `root` has a use for.
    """
    if root is not None:
        _check_free(module, type(root))
    if id(module) in memo:
        done: nn.Module = memo[id(module)]
        return done
    # ModuleList and ModuleDict have no forward to replace, and users index them: they stay
    indexable = type(module) in (nn.ModuleList, nn.ModuleDict)
    new = root
    if new is None:
        new = type(module)() if indexable else scope_class(type(module).__name__)()
    memo[id(module)] = new
    for name, p in module._parameters.items():
        if p is not None and id(p) not in memo:
            # the same storage under a new Parameter: requires_grad is not the user's
            data = p.detach().clone() if id(p) in own else p.detach()
            memo[id(p)] = nn.Parameter(data, requires_grad=id(p) in own)
        new.register_parameter(name, None if p is None else memo[id(p)])
    for name, b in module._buffers.items():
        if b is not None and id(b) not in memo:
            memo[id(b)] = b.detach().clone()  # a train step moves a batch norm's statistics
        keep = name not in module._non_persistent_buffers_set
        new.register_buffer(name, None if b is None else memo[id(b)], persistent=keep)
    for name, child in module._modules.items():
        if isinstance(child, AdapterTensors):
            continue
        new._modules[name] = None if child is None else skeleton(child, memo, own=own)
    new.training = module.training
    return new


def _check_free(module: nn.Module, root: type[nn.Module]) -> None:
    """Raise for a tensor, or a child with tensors, that a method of `root` would hide."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name in dict.fromkeys(n.partition(".")[0] for n, _ in tensors):
        if hasattr(root, name):
            raise LoraFxError(
                f"{type(module).__name__}.{name} holds weights, and {name} is a method of the "
                "module that insert returns",
                "rename it, or lora_fx.attach adapts your own module instead",
            )
