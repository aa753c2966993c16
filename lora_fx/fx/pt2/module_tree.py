"""The modules that hold the tensors of a file's programs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_fx.fx.graph.nodes import scopes_of
from lora_fx.fx.module.module import scope_class
from lora_fx.fx.pt2.program import LoadedProgram
from lora_fx.fx.tensors import owner


def tree_of(programs: Sequence[LoadedProgram], skip: frozenset[str] = frozenset()) -> nn.Module:
    """The modules that hold the tensors of a file's programs, under their names.

    Args:
        programs: Their tensors are joined; one tensor under two names stays one.
        skip: Names to leave out (an adapter's).
    """
    # the first node that was made in a module says its class
    nodes = (n for loaded in reversed(programs) for n in reversed(loaded.program.graph.nodes))
    classes = {"": "Program", **{path: cls for n in nodes for path, cls in scopes_of(n).items()}}

    def scope(path: str) -> nn.Module:
        name = classes.get(path, "")
        made: nn.Module = scope_class(name if name.isidentifier() else "Scope")()
        return made

    root = scope("")
    for loaded in programs:
        volatile = loaded.program.graph_signature.non_persistent_buffers
        for name, t in loaded.state.items():
            if name in skip:
                continue
            module, leaf = owner(root, name, create=scope)
            if leaf in module._parameters or leaf in module._buffers:
                continue
            if isinstance(t, nn.Parameter):
                module.register_parameter(leaf, t)
            else:
                module.register_buffer(leaf, t, persistent=name not in volatile)
    for module in root.modules():
        digits = [n.isdigit() for n in module._modules]
        if type(module).__name__ == "Scope" and digits and all(digits):
            module.__class__ = scope_class("ModuleList")
    return root
