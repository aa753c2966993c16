"""The record of what insert added to a module, for lora-fx itself and not for users.

These are no members of the module: there they would be attributes of the user's model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.fx.module.adapted import AdaptedModule, Inserter
from lora_fx.fx.module.adapted_report import Effect
from lora_fx.fx.module.tree_adapter import changes_weight, factor_pairs
from lora_fx.patching import patched
from lora_fx.targets.found import Found


class Insertion:
    """The branches of an adapted module, and what is known about them."""

    def __init__(self, module: AdaptedModule) -> None:
        self._module = module

    @property
    def found(self) -> Found:
        """The model's targets."""
        return self._module._found

    @property
    def also_train(self) -> tuple[str, ...]:
        """The first names of the tensors that are trained whole."""
        return self._module._also

    @property
    def invoked(self) -> tuple[str, tuple[int, ...]]:
        """The argument with token ids and the tokens that invoke an aLoRA; empty for others."""
        return self._module._invoked

    @property
    def effect(self) -> Effect | None:
        """The result of the proof of effect; None before the proof."""
        return self._module._effect

    @effect.setter
    def effect(self, effect: Effect) -> None:
        self._module._effect = effect

    @property
    def copies(self) -> tuple[AdaptedModule, ...]:
        """The module and its copies; see `AdaptedModule.copies`."""
        return self._module.copies

    @copies.setter
    def copies(self, copies: tuple[AdaptedModule, ...]) -> None:
        self._module._copies = copies

    def say(self, *notes: str) -> None:
        """Add notes to the report, each once."""
        self._module._notes = tuple(dict.fromkeys((*self._module.notes, *notes)))

    def slots(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the trained tensors a and b in the branches of the active adapter, by key.

        Updates of a variant that makes a and b of other tensors are left out; see `tensors` of the
        module.
        """
        return factor_pairs(self._module.tensors())

    def changes_anything(self) -> bool:
        """Return False if every update is zero, as after insert, and no tensor is whole."""
        if self.also_train:
            return True
        updates = self._module.updates
        return any(
            changes_weight(updates[key], by_field)
            for key, by_field in self._module.tensors().items()
        )

    def check_base(self, adapter: Adapter) -> None:
        """Add a note to the report if an adapter says that it was trained on other weights."""
        self._module._sampled.check(adapter.metadata, self._module)

    def inserting(
        self, inserter: Inserter
    ) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return a maker of blocks in which another pass inserts branches, for few runs."""
        module = self._module
        programs = replace(module._programs, codes={}, compiled={}, blocks=False, few=True)
        return partial(patched, module, _inserter=inserter, _fast=None, _programs=programs)


def insertion_of(module: AdaptedModule) -> Insertion:
    """Return the record of what insert added to the module."""
    return Insertion(module)
