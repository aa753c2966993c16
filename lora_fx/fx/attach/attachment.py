"""The state of a model that an adapter is attached to, and how to undo it.

The forms (which module gets a branch, which leaf reads W + s·B·A) are plain data by module path;
passes/verbs/attach.py decides them from the graph. This file puts them on the user's live modules
and takes them off again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.factors import (
    SIDES,
    asked,
    frame,
    learning,
    relearning,
    slots_of,
)
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.eager_emitter import Program, bound
from lora_fx.fx.attach.live import (
    METHODS,
    REGISTRY,
    ActiveAdapter,
    Live,
    keeps_statistics,
    restore,
    swap,
)
from lora_fx.fx.module.adapted import AdaptedReport, Base, entries_of
from lora_fx.fx.tensors import (
    AdapterTensors,
    from_numpy,
    named_tensors,
    owner,
    parameter_of,
    put,
    settle,
)
from lora_fx.inputs import Named
from lora_fx.targets.found import Found
from lora_fx.targets.target import base_name


class Attachment:
    """An adapter on a live model. `attachment(model)` finds it.

    Args:
        model: The user's module.
        planner: Decides which module gets which form.
        also_train: First names of the tensors that are trained whole.
        frozen_norms: True when batch norms keep their running statistics while training.
        dropout: The probability of dropout on the branches, in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        *,
        also_train: Sequence[str] = (),
        frozen_norms: bool = True,
        notes: Sequence[str] = (),
        metadata: Named | None = None,
    ) -> None:
        self.model = model
        self.planner = planner
        self.switch = ActiveAdapter()
        self.updates: dict[str, LowRank] = {}
        self.by_weight: frozenset[str] = frozenset()
        self.proven: dict[str, str] = {}  # key → use
        self._sampled = Base()
        self.forms: dict[str, Form] = {}
        self.metadata = dict(metadata or {})
        self._also = tuple(also_train)
        self._notes = tuple(notes)
        self._frozen_norms = frozen_norms
        self._swapped: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self._originals = {n: self._parameter(n).detach().clone() for n in self._also}

    # --- on and off ------------------------------------------------------------------------------

    def install(self, updates: Mapping[str, LowRank]) -> None:
        """Put the forms of `updates` on the model; A and B take their values."""
        # first, since it may refuse: then the model is as before
        forms = self.planner.forms(updates, self.by_weight)
        self.remove()
        self.updates, self.forms = dict(updates), forms
        # now, while tensors are whole: FSDP shards them later
        self._sampled.now(self.updates, self._parameter)
        for key, update in self.updates.items():
            computed = "~" in key  # such a weight is where its parameters are
            stored = self.found[key].sites[0].behind[0] if computed else base_name(key)
            device = self._parameter(stored).device
            for slot in slots_of(key, update):
                module, leaf = owner(self.model, slot.name, create=True)
                # fp32 masters, whatever the base's dtype
                tensor = torch.tensor(slot.value, dtype=torch.float32, device=device)
                module.register_parameter(leaf, nn.Parameter(tensor, slot.trained))
        for n in self._flags:
            self._parameter(n).requires_grad_(n in self._also)
        try:
            for module, live in self._lives():
                base = type(module)
                self._swapped.append((module, base, swap(module, live)))
        except LoraFxError:
            self.remove()
            raise

    def _lives(self) -> Iterator[tuple[nn.Module, Live]]:
        def place(name: str) -> tuple[nn.Module, str]:
            return owner(self.model, name)

        lives: dict[int, tuple[nn.Module, Live]] = {}
        for path, form in self.forms.items():
            module = self.model.get_submodule(path)
            weights = {leaf: (bound(p, place), where) for leaf, (p, where) in form.weights.items()}
            output = form.output and (bound(form.output[0], place), bound(form.output[1], place))
            lives[id(module)] = module, Live(self.switch, weights, output)
        for module in self.model.modules() if self._frozen_norms else ():
            if keeps_statistics(module):
                lives.setdefault(id(module), (module, Live(self.switch)))[1].frozen = True
        root = lives.setdefault(id(self.model), (self.model, Live(self.switch)))[1]
        root.gained = tuple(n for n in METHODS if n not in self._taken())
        yield from lives.values()

    def _taken(self) -> set[str]:
        """Names that the model's own tensors, children and attributes have."""
        m = self.model
        return {*m.__dict__, *m._parameters, *m._buffers, *m._modules}

    def remove(self) -> None:
        """Take everything off again, A and B included; flags and trained tensors stay.

        Raises:
            LoraFxError: Another tool has changed a module's class since.
        """
        for module, _, new in self._swapped:
            if type(module) is not new:
                raise LoraFxError(
                    f"a {new.__name__} became {type(module).__name__} by another tool after attach",
                    "undo that first, or save model.adapter() and load the model again",
                )
        for module, base, _ in self._swapped:
            restore(module, base)
        self._swapped.clear()
        for module in list(self.model.modules()):
            for name in SIDES:
                if isinstance(module._modules.get(name), AdapterTensors):
                    del module._modules[name]

    def uninstall(self) -> None:
        """Make the model what it was before attach, bit for bit.

        The flags and the tensors that were trained whole go back too.
        """
        self.remove()
        with torch.no_grad():
            for name, value in self._originals.items():
                self._parameter(name).copy_(value)
        for name, flag in self._flags.items():
            p = self._parameter(name)
            p.requires_grad_(flag)
            if name in self._also:
                p.grad = None

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """A context in which the low-rank updates are off."""
        was, self.switch.on = self.switch.on, False
        try:
            yield
        finally:
            self.switch.on = was

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[str]]:
        """A context that collects the paths of the modules whose branch ran."""
        seen: set[int] = set()
        paths: set[str] = set()
        lives = [m._lora_fx for m, _, _ in self._swapped]
        for live in lives:
            live.seen = seen  # type: ignore[union-attr]
        try:
            yield paths
        finally:
            for live in lives:
                live.seen = None  # type: ignore[union-attr]
            paths |= {p for p in self.forms if id(self.model.get_submodule(p)) in seen}

    # --- what the model gains --------------------------------------------------------------------

    @property
    def found(self) -> Found:
        """The model's targets."""
        return self.planner.found

    def _parameter(self, name: str) -> nn.Parameter:
        return parameter_of(self.model, name)

    def slots(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The trained parameters A and B of every key."""
        held = {key: slots_of(key, u) for key, u in self.updates.items()}
        return {
            key: (self._parameter(s[0].name), self._parameter(s[1].name)) for key, s in held.items()
        }

    @torch.no_grad()
    def fill(self, updates: Mapping[str, LowRank]) -> None:
        """Write the values of `updates`, of the shapes installed, into their parameters."""
        settle(self.model)
        for key in self.updates:
            for slot in slots_of(key, updates[key]):
                put(slot.name, self._parameter(slot.name), torch.from_numpy(np.array(slot.value)))

    def adapter(self) -> Adapter:
        """The adapter as it is now, bound to this model's keys."""
        settle(self.model)
        shapes = {name: tuple(value.shape) for name, value in self._originals.items()}
        entries = entries_of(self.model, self.updates, shapes)
        own = {**learning(self.updates), **self._sampled.now(self.updates, self._parameter)}
        return Adapter(entries, {**self.metadata, **own})

    @torch.no_grad()
    def load_adapter(self, adapter: Adapter) -> None:
        """Replace the adapter; targets, ranks and alphas become those of `adapter`.

        Where only the numbers differ, A and B stay the same objects. Optimizers made before
        another change hold the old A and B: make them again.

        Raises:
            LoraFxError: A key or a shape that does not fit, a target that attach has not
                proven, or a whole tensor that is not among `also_train`.
        """
        found = bind(adapter, self.found)
        updates, metadata = relearning(found.lowrank, found.metadata)
        for key, update in updates.items():
            if self.proven.get(key) != update.use:
                raise LoraFxError(
                    f"{key!r} was not adapted when attach compared the model with its graph",
                    "detach the model, then lora_fx.attach(…, adapter=adapter)",
                )
        names, _ = named_tensors(self.model)
        full = {names[k]: v for k, v in found.full.items()}
        for name in full:
            if name not in self._also:
                raise LoraFxError(
                    f"the adapter holds the whole tensor {name!r}",
                    f"attach with also_train={name!r} before loading it",
                )
        if frame(updates) == frame(self.updates):
            self.fill(updates)
        else:
            self.install(updates)
        for name in self._also:  # what the adapter does not hold goes back to the model's own
            value = from_numpy(full[name].value) if name in full else self._originals[name]
            put(name, self._parameter(name), value)
        self.metadata = metadata
        self.check_base(adapter)

    def check_base(self, adapter: Adapter) -> None:
        """Put a note into the report if an adapter says that it was trained on other weights."""
        self._sampled.check(adapter.metadata, self._parameter)

    def report(self) -> AdaptedReport:
        """What is adapted, in which form, what is trained, and what had to be said."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        rows = tuple((k, *asked(u), self.found[k].flops) for k, u in self.updates.items())
        leaves = [
            f"{path}.{leaf}".lstrip(".")
            for path, f in self.forms.items()
            for leaf in (() if f.output else f.weights)
        ]
        forms = []
        if leaves:
            forms = [f"computed as W + s·B·A at every read: {', '.join(leaves)}"]
            if self.metadata.get("dropout"):
                forms.append("dropout acts on branches only, not where W + s·B·A is computed")
        forms += [
            f"the model has its own {n!r}; use lora_fx.fx.attach.attachment(model).{n}"
            for n in METHODS
            if n in self._taken()
        ]
        notes = (*self._notes, *self._sampled.said, *self.planner.notes, *forms)
        return AdaptedReport(rows, self._also, trained, total - trained, self.found, notes)


def attachment(model: nn.Module) -> Attachment:
    """The Attachment of a model; raises LoraFxError where it has none."""
    found = model.__dict__.get(REGISTRY)
    if not isinstance(found, Attachment):
        raise LoraFxError(
            f"no adapter is attached to this {type(model).__name__}", "lora_fx.attach(model, …)"
        )
    return found


def is_attached(model: object) -> TypeGuard[nn.Module]:
    """True for a model that attach has changed."""
    return isinstance(model, nn.Module) and REGISTRY in model.__dict__


# What each module of an attached model gets, as plain data by module path.


@dataclass
class Form:
    """What one module gets: programs by leaf and where they apply, or a branch."""

    weights: dict[str, tuple[Program, str]] = field(default_factory=dict)
    output: tuple[Program, Program] | None = None


class Planner:
    """Decides the forms of a set of updates; see passes/verbs/attach.py. Copies share it."""

    found: Found
    notes: tuple[str, ...] = ()

    def forms(
        self, updates: Mapping[str, LowRank], by_weight: frozenset[str] = frozenset()
    ) -> dict[str, Form]:
        """The form of every module, by path; modules in `by_weight` get no branch."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, object]) -> Planner:
        """The planner itself: the graph behind it is never changed."""
        return self
