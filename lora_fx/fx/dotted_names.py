"""Dotted names of a tree's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import AdapterTensors
from lora_fx.targets.keys import split_region


def owner(
    root: nn.Module, name: str, *, create: Callable[[str], nn.Module] | None = None
) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the leaf; a bracketed region stays in the leaf.

    Args:
        root: The tree.
        name: The dotted name of a tensor.
        create: Path → the module to put there where there is none; without it that is an error.
    """
    dotted, region = split_region(name) if name.endswith("]") else (name, "")
    *path, leaf = dotted.split(".")
    module = root
    for depth, part in enumerate(path, 1):
        child = module._modules.get(part)
        if child is None:
            if create is None:
                raise LoraFxError(
                    f"the model has no module {part!r}, which {name!r} names",
                    "see model.named_modules() for the names",
                )
            if hasattr(module, part):
                raise LoraFxError(f"the name {part!r} of {name!r} is taken", "rename that tensor")
            child = create(".".join(path[:depth]))
            module.add_module(part, child)
        module = child
    return module, leaf + region


def parameter_of(root: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a dotted name.

    Raises:
        LoraFxError: There is none.
    """
    module, leaf = owner(root, name)
    parameter = module._parameters.get(leaf)
    if parameter is None:
        raise LoraFxError(
            f"{name!r} is not a parameter of the model",
            "see model.named_parameters() for the names",
        )
    return parameter


def replace_parameter(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put one parameter in the place of another, under all names that the other has in a tree."""
    for module in root.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def all_tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers under all their names."""
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def named_tensors(root: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({any name: first name}, {first name: other names}) of the tree; adapters' left out."""
    first_by_id: dict[int, str] = {}
    first_names: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    adapters = {name for name, module in root.named_modules() if isinstance(module, AdapterTensors)}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        dotted = name.rpartition("[")[0] if name.endswith("]") else name
        if dotted.rpartition(".")[0] in adapters:
            continue
        first = first_by_id.setdefault(id(parameter), name)
        first_names[name] = first
        aliases.setdefault(first, [])
        if name != first:
            aliases[first].append(name)
    return first_names, aliases
