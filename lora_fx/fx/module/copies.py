"""Copies of an adapted module that share the base's tensors and the compiled programs.

A copy has its own a and b, its own tensors trained whole, and nothing else of its own. A program
reads the tensors by their names in the module that runs it, so it runs every copy alike.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field, replace

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import frame
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import Programs
from lora_fx.patching import patched


def kind_of(module: AdaptedModule) -> tuple[object, ...]:
    """Return a value that is equal for copies that run the same programs on equal shapes."""
    shapes = tuple(tuple(tensor.shape) for tensor in own_tensors(module).values())
    return id(module._programs), shapes


def shares_programs(module: AdaptedModule, adapter: Adapter) -> bool:
    """Whether a copy of a module with this adapter runs the module's programs."""
    return frame(adapter.lowrank) == frame(module.updates)


def copy_of(module: AdaptedModule, adapter: Adapter) -> AdaptedModule:
    """Return a copy of a module with another adapter; the base's tensors are in both.

    Args:
        module: From insert.
        adapter: In the keys of the module, with its whole tensors or without them: they are then
            the model's own. Ranks may differ; see `shares_programs`.

    Raises:
        LoraFxError: The module's running statistics move in training, so no copy may share them.
    """
    if module._norm_stats == "update":
        raise LoraFxError(
            "norm_stats='update': copies would share running statistics, which each of them moves",
            "use norm_stats='frozen', or insert each copy by itself",
        )
    programs = module._programs
    if not shares_programs(module, adapter):
        programs = programs.anew()
    memo: dict[int, object] = {id(module._programs): programs, id(module._found): module._found}
    own = {id(tensor) for tensor in own_tensors(module).values()}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in own:
            memo[id(tensor)] = tensor
    for name, body in vars(module).items():  # the bodies of higher-order ops, which hold no tensors
        if name.startswith("_body"):
            memo[id(body)] = body
    copied = copy.deepcopy(module, memo)
    copied._put(adapter)
    for sharing in (module, copied):  # a block runs what another copy's call has compiled
        sharing._blocks()
    return copied


def own_tensors(module: AdaptedModule) -> dict[str, nn.Parameter]:
    """Return the tensors that a copy does not share, by name: what trains, and frozen factors."""
    factors = {id(tensor) for tensors in module.tensors().values() for tensor in tensors.values()}
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or id(parameter) in factors
    }


@dataclass
class PlainPrograms:
    """The programs of copies without the rewrites that save memory, which vmap cannot run."""

    _by_programs: dict[int, tuple[Programs, Programs]] = field(default_factory=dict)

    def of(self, module: AdaptedModule) -> contextlib.AbstractContextManager[None]:
        """Return a block in which a module runs these programs."""
        programs = module._programs
        anew = replace(programs.anew(), blocks=False)
        _, plain = self._by_programs.setdefault(id(programs), (programs, anew))
        return patched(module, _fast=None, _programs=plain)
