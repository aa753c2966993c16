"""The module tree that holds the tensors of a file's programs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_fx.fx.dotted_names import owner
from lora_fx.fx.graph.nodes import scopes_of
from lora_fx.fx.module.module import scope_class
from lora_fx.fx.pt2.program import LoadedProgram


def tree_of(programs: Sequence[LoadedProgram], skip: frozenset[str] = frozenset()) -> nn.Module:
    """Build the module tree that holds the tensors of a file's programs under their names.

    Args:
        programs: Their tensors are joined; one tensor under two names stays one.
        skip: Names to leave out (an adapter's).
    """
    classes = _class_names(programs)

    def scope(path: str) -> nn.Module:
        name = classes.get(path, "")
        if not name.isidentifier():
            name = "Scope"
        module: nn.Module = scope_class(name)()
        return module

    root = scope("")
    for loaded in programs:
        volatile = loaded.program.graph_signature.non_persistent_buffers
        for name, tensor in loaded.state.items():
            if name in skip:
                continue
            module, leaf = owner(root, name, create=scope)
            if leaf in module._parameters or leaf in module._buffers:
                continue
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor, persistent=name not in volatile)

    for module in root.modules():
        if type(module).__name__ == "Scope" and _has_only_numbers(module):
            module.__class__ = scope_class("ModuleList")
    return root


def _class_names(programs: Sequence[LoadedProgram]) -> dict[str, str]:
    """Return the class name of each module by path, from the first node made in the module."""
    classes = {"": "Program"}
    for loaded in reversed(programs):
        for node in reversed(loaded.program.graph.nodes):
            classes.update(scopes_of(node))
    return classes


def _has_only_numbers(module: nn.Module) -> bool:
    """Whether a module has children whose names are all numbers, as a list has."""
    names = list(module._modules)
    return bool(names) and all(name.isdigit() for name in names)
