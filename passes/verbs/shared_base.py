"""One captured model below several adapters: what differs is built anew, all else is shared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.formats.io import check_real
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.device_memory import check_move
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.copies import copy_of, shares_programs
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.passes.verbs.build import Start, build_module, found_in, start_of
from lora_fx.passes.verbs.options import InsertOptions
from lora_fx.targets.found import Found

CPU = torch.device("cpu")


@dataclass
class SharedBase:
    """A captured model for several adapters: its modules share the weights and the programs.

    The first module of a kind is built and proven as `insert` does it. Later ones of other seeds,
    and of other ranks of the same scale, are copies of it and have its targets.

    Attributes:
        cap: The capture.
        device: The device of the modules.
        recompute: Whether blocks run again in backward, as activation_checkpointing_enable has it.
    """

    cap: Captured
    device: torch.device = CPU
    recompute: bool = False
    _found: Found | None = None
    _templates: list[_Template] = field(default_factory=list)

    @classmethod
    def of(cls, module: AdaptedModule, options: InsertOptions) -> SharedBase:
        """Return the base of a module that insert has just returned for these options."""
        base = cls(execution_of(module).captured)
        base._add(base._start(options), options, module)
        return base

    def module(self, options: InsertOptions) -> AdaptedModule:
        """Return a module with new branches, as `insert` returns it.

        Raises:
            LoraFxError: As for insert.
        """
        start = self._start(options)
        template = self._template(start, options)
        copied = copy_of(template.module, template.adapter_of(start))
        insertion_of(copied).say(*start.notes)
        return copied

    def check(self, options: InsertOptions) -> None:
        """Raise for ranks, targets and variants that do not fit the model, as insert does.

        First values are drawn: those that are computed of weights or data take longer.
        """
        self._start(replace(options, init="kaiming", data=None, loss="ce"))

    def _start(self, options: InsertOptions) -> Start:
        """Return the first values for these options."""
        if self._found is None:
            self._found = found_in(self.cap)
        return start_of(self.cap.model, self.cap, self._found, options)

    def _template(self, start: Start, options: InsertOptions) -> _Template:
        """Return the module of the start's kind, which is built if there is none."""
        kind = _kind(options)
        for template in self._templates:
            if template.kind == kind and template.holds(start):
                return template
        module = build_module(self.cap, options)
        check_real(module.updates)
        check_move(module, self.device)
        module = module.to(self.device)
        if self.recompute:
            module.activation_checkpointing_enable()
        return self._add(start, options, module)

    def _add(self, start: Start, options: InsertOptions, module: AdaptedModule) -> _Template:
        """Remember a module that was built for a start."""
        idle = frozenset(start.adapter.lowrank.keys() - module.updates.keys())
        self._templates.append(_Template(_kind(options), module, start.trained_whole, idle))
        return self._templates[-1]


@dataclass(frozen=True)
class _Template:
    """A module that is never trained, of which copies are.

    Attributes:
        kind: The options that its programs depend on, beside its updates.
        module: The module.
        trained_whole: The tensors that are trained whole.
        idle: Targets that were left out, since no gradient reaches them.
    """

    kind: tuple[object, ...]
    module: AdaptedModule
    trained_whole: tuple[str, ...]
    idle: frozenset[str]

    def adapter_of(self, start: Start) -> Adapter:
        """Return the first values of a module: those of the start, without idle targets."""
        entries = {
            key: entry for key, entry in start.adapter.entries.items() if key not in self.idle
        }
        if start.bound is not None:
            entries |= start.bound.full
        return Adapter(entries, start.adapter.metadata)

    def holds(self, start: Start) -> bool:
        """Whether the programs of this module run a start's adapter."""
        if start.trained_whole != self.trained_whole:
            return False
        return shares_programs(self.module, self.adapter_of(start))


def _kind(options: InsertOptions) -> tuple[object, ...]:
    """Return what a module's programs depend on, beside its updates."""
    return options.dropout, options.norm_stats, options.fast, options.dead
