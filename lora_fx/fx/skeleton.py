"""The tree that holds a model's tensors, without the model's code.

It has the model's names, ties and class names. Parameters share the model's storage under objects
of their own, and buffers are copies, so whatever is done to the tree leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.fx.codes import HELD
from lora_fx.fx.tensors import AdapterTensors

INDEXABLE = (nn.ModuleList, nn.ModuleDict)
"""Containers that stay unchanged: they have no forward to replace, and users index them."""


@dataclass
class Skeleton:
    """Builds the tree of one model; call `of` with its root.

    Attributes:
        scope: Makes the module that takes the place of one of a class, by the name of that class.
        trained: ids of the parameters that get a copy of their storage, since they will be trained.
        flags: Whether parameters keep their requires_grad; else the trained ones alone have it.
        copies: id of an original → its counterpart; keeps ties and shared modules.
    """

    scope: Callable[[str], nn.Module]
    trained: Collection[int] = ()
    flags: bool = False
    copies: dict[int, Any] = field(default_factory=dict)

    def of(self, module: nn.Module, root: nn.Module | None = None) -> nn.Module:
        """The tree of a module.

        Args:
            module: The user's module, or a part of it.
            root: The object to fill, for the top of the tree.
        """
        if id(module) in self.copies:
            counterpart: nn.Module = self.copies[id(module)]
            return counterpart
        tree = root if root is not None else self._empty(type(module))
        self.copies[id(module)] = tree

        for name, parameter in module._parameters.items():
            tree.register_parameter(name, self._parameter(parameter))
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            tree.register_buffer(name, self._buffer(buffer), persistent=persistent)
        for name, child in module._modules.items():
            if not isinstance(child, AdapterTensors):
                tree._modules[name] = None if child is None else self.of(child)
        tree.training = module.training
        if HELD in module.__dict__:
            tree.__dict__[HELD] = dict(module.__dict__[HELD])
        return tree

    def _empty(self, kind: type[nn.Module]) -> nn.Module:
        """Make the empty module that takes the place of one of a class."""
        if kind in INDEXABLE:
            return kind()
        return self.scope(kind.__name__)

    def _buffer(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        if buffer is None:
            return None
        if id(buffer) not in self.copies:
            # a train step moves a batch norm's statistics
            self.copies[id(buffer)] = buffer.detach().clone()
        copy: torch.Tensor = self.copies[id(buffer)]
        return copy

    def _parameter(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in self.copies:
            trained = id(parameter) in self.trained
            data = parameter.detach()
            # torch lets a tensor of its inference mode require a gradient only in that mode
            with torch.inference_mode(data.is_inference()):
                self.copies[id(parameter)] = nn.Parameter(
                    data.clone() if trained else data,
                    requires_grad=parameter.requires_grad if self.flags else trained,
                )
        copy: nn.Parameter = self.copies[id(parameter)]
        return copy
