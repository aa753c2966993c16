"""The module that insert returns: a CapturedModule with branches and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter, mix
from lora_fx.adapter.factor_tensors import frame, slots_of
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.target_union import Installation, TargetUnion
from lora_fx.adapter.variant import variant_of
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import owner, parameter_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.adapted_report import AdaptedReport, Effect, adapted_report
from lora_fx.fx.module.doubts import decide_doubts
from lora_fx.fx.module.module import CapturedModule, Rewriter, Speedups
from lora_fx.fx.module.module_base import Base
from lora_fx.fx.module.tree_adapter import (
    bound_for_loading,
    compile_ranks,
    current_adapter,
    free_ranks,
    place_factors,
    update_tensors,
    warn_of_compiling,
    write_factors,
    write_full_tensors,
)
from lora_fx.fx.shards import is_any_sharded, refuse_shards, reshard
from lora_fx.fx.tensors import device_of
from lora_fx.fx.token_mask import check_ids, name_of_ids
from lora_fx.probe.carried import without_probe
from lora_fx.targets.found import Found
from lora_fx.text import by_key

Inserter = Callable[[Updates, bool], Rewriter]


DEFAULT = "default"
"""The name of the adapter that insert makes."""


class AdaptedModule(CapturedModule):
    """A model with low-rank branches; only the adapter's tensors require grad.

    Several adapters may be loaded under names; the branches hold the active one, or a mix.
    """

    def __init__(
        self,
        captured: Captured,
        found: Found,
        adapter: Adapter,
        inserter: Inserter,
        *,
        also_train: Sequence[str] = (),
        norm_stats: str = "frozen",
        notes: Sequence[str] = (),
        speedups: Speedups | None = None,
    ) -> None:
        super().__init__(captured, also_train, norm_stats=norm_stats)
        self._fast = speedups
        self._found = found
        self._updates = adapter.lowrank
        self._installed: Updates = self._updates
        self._union: TargetUnion | None = None
        self._inserter = inserter
        self._also = tuple(also_train)
        self._notes = tuple(notes)
        self._metadata = without_probe(adapter.metadata)
        self._invocation = adapter.invocation
        self._stored: dict[str, Adapter] = {}
        self._active: dict[str, float] = {DEFAULT: 1.0}
        self._sampled = Base()
        self._effect: Effect | None = None
        self._copies: tuple[AdaptedModule, ...] = ()
        decide_doubts(self)
        graph = self._graph(False, captured.named)  # registers the adapter's tensors
        if self._invocation:
            check_ids(graph, self._invocation)
            self._invoked = (name_of_ids(graph, captured.named), self._invocation)
        self._sampled.now(self._updates, self)  # while tensors are whole

    def _rewrite(self, graph: FxGraph, training: bool) -> None:
        self._inserter(self._updates, training)(graph)

    def _rewrite_program(self, graph: FxGraph, training: bool) -> None:
        """Insert the branches; those of all targets of the union once the module is compiled."""
        installed = self._updates if self._union is None else self._installed
        self._inserter(installed, training)(graph)

    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the tensors of each update by key and field: a, b, and further ones."""
        return update_tensors(self, self._updates)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return the trained tensors as groups for an optimizer, one for each learning rate.

        Args:
            lr: The rate of a, and of tensors trained whole; LoRA+ trains b faster.
            weight_decay: The weight decay of every group.
        """
        rates: dict[int, float] = {}
        for key, tensors in self.tensors().items():
            rate_of_field = variant_of(self._updates[key]).rates(lr)
            for field, tensor in tensors.items():
                rates[id(tensor)] = rate_of_field.get(field, lr)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = by_key((rates.get(id(parameter), lr), parameter) for parameter in trained)
        return [
            {"params": params, "lr": rate, "weight_decay": weight_decay}
            for rate, params in groups.items()
        ]

    @property
    def copies(self) -> tuple[AdaptedModule, ...]:
        """The adapters that insert(copies=…) made over one base, this one first."""
        return self._copies or (self,)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of insert."""
        return self._notes

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on the branches act; empty where they act on all tokens."""
        return self._invocation

    @property
    def updates(self) -> Updates:
        """Key → the update as inserted, for its rank, alpha and layout; its values may be old."""
        return self._updates

    def adapter(self, name: str | None = None) -> Adapter:
        """Return the active adapter or mix, or a loaded adapter, bound to this model's keys.

        Sharded tensors are gathered, so every process has to call it.
        """
        if name is not None and self._active != {name: 1.0}:
            self._known(name)
            return self._stored[name]
        if not self._active:
            return Adapter({})
        also = dict.fromkeys(self._also)
        return current_adapter(
            self, self._updates, also, self._metadata, self._sampled, self._installed
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(dict.fromkeys((*self._stored, *self._active)))

    @property
    def active(self) -> Mapping[str, float]:
        """The weights of the active adapters by name; empty for the base."""
        return dict(self._active)

    def load_adapter(self, adapter: AdapterLike, name: str | None = None) -> None:
        """Replace the active adapter, or load an adapter or path under a name for `activate`.

        Targets, ranks and alphas become those of `adapter`.

        Raises:
            LoraFxError: A key or a shape that does not fit, or a whole tensor that is not
                among `also_train`.
        """
        adapter = as_adapter(adapter)
        if adapter.invocation != self.invocation:
            raise LoraFxError(
                f"the adapter's invocation tokens are {[*adapter.invocation]}, and the branches "
                f"have {[*self.invocation]}",
                "insert with the adapter: lora_fx.insert(model, …, adapter=…)",
            )
        bound = bound_for_loading(adapter, self._found, self, self._also, "insert")
        if name is not None and self._active != {name: 1.0}:
            self._stored[name] = bound
            self._sampled.check(adapter.metadata, self, f"the adapter {name!r}")
            if self._union is not None:
                self._extend(self._union, bound.lowrank)
            return
        if len(self._active) != 1:
            raise LoraFxError(
                "no adapter or a mix is active: there is no single adapter to replace",
                "give the new adapter a name: load_adapter(adapter, name=…)",
            )
        self._put(bound)
        self._sampled.check(adapter.metadata, self)

    def activate(self, which: str | Mapping[str, float] | None) -> None:
        """Put an adapter, an exact weighted sum of adapters, or no adapter into the branches.

        A change that training made to the adapter so far active is kept under its name. A mix
        is for use: its tensors do not require grad.

        Raises:
            LoraFxError: A name that is not loaded, or whole tensors in a mix.
        """
        weights = {which: 1.0} if isinstance(which, str) else dict(which or {})
        for name in weights:
            self._known(name)
        if list(self._active.values()) == [1.0]:
            (active_name,) = self._active
            self._stored[active_name] = self.adapter()
        self._adapted = bool(weights)
        if weights:
            self._put_weighted(weights)
        self._active = weights

    def _put_weighted(self, weights: Mapping[str, float]) -> None:
        """Put one adapter, or a mix of several, into the branches; a mix does not train."""
        adapters = [(self._stored[name], weight) for name, weight in weights.items()]
        is_plain = list(weights.values()) == [1.0]
        if is_plain:
            self._put(adapters[0][0])
        else:
            self._put(mix(adapters))
        self._let_train(is_plain)

    def _let_train(self, trains: bool) -> None:
        """Let the tensors in the branches train, or not."""
        for key, update in self._installed.items():
            for slot in slots_of(key, update):
                if slot.saved:
                    parameter_of(self, slot.name).requires_grad_(trains and slot.trained)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile as nn.Module does, once for the targets of all loaded adapters.

        Another adapter of any of these targets, of any rank and scale, compiles nothing new. A
        warning says what one that does not fit lacks. `torch.compile(module)` compiles anew for
        other targets and ranks.
        """
        super().compile(*args, **kwargs)
        if not is_any_sharded(self):  # such a model keeps its targets and ranks
            union = self._union or TargetUnion()
            for adapter in self._stored.values():
                union = union.extended(adapter.lowrank)
            self._complete(union.extended(self._updates))
        free_ranks(self, self._installed)
        compile_ranks(self)

    def _complete(self, union: TargetUnion) -> None:
        """Complete the branches of the active adapter to a union of targets."""
        updates = self.adapter().lowrank
        self._union = union
        self._installed = union.installed(updates)
        place_factors(self, self._installed, lambda _: device_of(self))
        if list(self._active.values()) not in ([], [1.0]):  # new tensors belong to the mix too
            self._let_train(False)
        self._generate_again()

    def _extend(self, union: TargetUnion, updates: Updates) -> None:
        """Extend the union by an adapter's targets, and say that it has to be compiled again."""
        extended = union.extended(updates)
        if any(union.slots.get(key) is not slot for key, slot in extended.slots.items()):
            warn_of_compiling(union.misfits(updates))
            self._complete(extended)
            free_ranks(self, self._installed)

    def scale(self, factor: float) -> None:
        """Multiply every low-rank update of the active adapter by a factor."""
        self._put(self.adapter().weighted(factor))

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise LoraFxError(f"no adapter {name!r} is loaded", f"loaded: {list(self.adapters)}")

    @torch.no_grad()
    def _put(self, bound: Adapter) -> None:
        """Put an adapter into the branches; the programs stay if shapes and scales are equal."""
        reshard(self)
        updates_before = self._updates
        updates = bound.lowrank
        installation = Installation.of(self._union, self._updates, updates)
        self._union = installation.union
        installed = installation.updates
        if frame(installed) == frame(self._installed):
            write_factors(self, installed, installation.changed_ranks)
            self._installed = dict(installed)
            self._updates = dict(updates)
        else:
            if self._union is not None:
                warn_of_compiling(installation.misfits)
            self._rebuild(updates, installed)
        originals = dict(self._programs.captured.model.named_parameters())
        write_full_tensors(self, bound, {name: originals[name] for name in self._also})
        for name in self._also:  # a tensor trains whole, or by its low-rank update
            if (name in updates) != (name in updates_before):
                parameter_of(self, name).requires_grad_(name not in updates)
        self._metadata = without_probe(bound.metadata)

    def _rebuild(self, updates: Updates, installed: Updates) -> None:
        """Replace the branches' tensors by tensors of other shapes, and drop the programs."""
        refuse_shards(self)
        for key, update in self._installed.items():
            for slot in slots_of(key, update):
                module, leaf = owner(self, slot.name)
                delattr(module, leaf)
        self._updates = dict(updates)  # the passes read it
        self._installed = dict(installed)
        place_factors(self, installed, lambda _: device_of(self))
        if self._union is None:
            self._programs = self._programs.anew()  # copies of this module may run the old ones
        else:
            free_ranks(self, installed)
            self._generate_again()
        self._graph(False, self._programs.captured.named)

    def report(self) -> AdaptedReport:
        """Report what is adapted, what is trained, and all notes."""
        captured = self._programs.captured
        notes = (*self._notes, *self._sampled.said, *captured.notes)
        report = adapted_report(self, self._updates, self._found, self._also, notes)
        names = self.adapters if len(self.adapters) > 1 else ()
        return replace(report, effect=self._effect, adapters=names, parity=captured.compared)
