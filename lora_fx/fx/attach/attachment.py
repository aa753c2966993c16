"""The state of a model that an adapter is attached to, and how to undo it.

The forms (which module gets a branch, which leaf reads W + s·B·A) are plain data by module path;
passes/verbs/attach_forms.py decides them from the graph. This file puts them on the user's live
modules and takes them off again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import frame, slots_of
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.target_union import Installation, TargetUnion, empty_slot
from lora_fx.dtypes import factor_dtype
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.live import METHODS, REGISTRY, STATE, restore, swap
from lora_fx.fx.attach.live_state import ActiveAdapter, Live, Watcher
from lora_fx.fx.attach.recording import Bound, Program, bound
from lora_fx.fx.capture.quantised_layers import keep_trainable, let_pack
from lora_fx.fx.capture.root_module import unwrapped
from lora_fx.fx.dotted_names import owner, parameter_of
from lora_fx.fx.module import adapted_report, tree_adapter
from lora_fx.fx.module.adapted_report import AdaptedReport, Effect
from lora_fx.fx.module.module_base import Base
from lora_fx.fx.shards import is_any_sharded
from lora_fx.fx.tensors import AdapterTensors
from lora_fx.inputs import Named
from lora_fx.patching import patched
from lora_fx.probe.carried import without_probe
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name
from lora_fx.text import human


class Attachment:
    """An adapter on a live model; `attachment(model)` returns it.

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
        self.installed: dict[str, LowRank] = {}  # the same, completed once the model is compiled
        self._union: TargetUnion | None = None
        self.by_weight: frozenset[str] = frozenset()
        self.proven: dict[str, str] = {}  # key → use
        self.lost: dict[str, str] = {}  # key of a target that was left out → why
        self._sampled = Base()
        self.forms: dict[str, Form] = {}
        self.effect: Effect | None = None
        self.metadata = without_probe(metadata or {})
        self._also = tuple(also_train)
        self._notes = tuple(notes)
        self._frozen_norms = frozen_norms
        self.ties = contextlib.ExitStack()  # ties again what was untied for the adapter
        self._packs = keep_trainable(model)
        self._swapped: list[tuple[nn.Module, type[nn.Module]]] = []
        self._flags = {
            name: parameter.requires_grad for name, parameter in model.named_parameters()
        }
        self._originals = {
            name: parameter_of(self.model, name).detach().clone() for name in self._also
        }

    # --- on and off ------------------------------------------------------------------------------

    def install(
        self, updates: Updates, installed: Updates | None = None, *, same: bool = False
    ) -> None:
        """Give the model's modules the forms of `updates`; A and B become its parameters.

        Args:
            updates: The updates of the adapter.
            installed: The same, completed to a union of targets.
            same: The adapter is the one that is there: its parameters stay the same objects.
        """
        installed = updates if installed is None else installed
        # first, since it may refuse: then the model is as before
        forms = self.planner.forms(installed, self.by_weight)
        parameters = self._parameters() if same else {}
        self.remove()
        self.updates = dict(updates)
        self.installed = dict(installed)
        self.forms = forms
        # now, while tensors are whole: FSDP shards them later
        self._sampled.now(self.updates, self.model)
        for name, parameter in parameters.items():
            module, leaf = owner(self.model, name, create=lambda _: AdapterTensors())
            module.register_parameter(leaf, parameter)
        tree_adapter.place_factors(self.model, self.installed, self._device_of)
        for name in self._flags:
            parameter_of(self.model, name).requires_grad_(name in self._also)
        try:
            for module, live in self._lives():
                self._swapped.append((module, swap(module, live)))
        except LoraFxError:
            self.remove()
            raise

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter by name."""
        parameters = {}
        for key, update in self.installed.items():
            for slot in slots_of(key, update):
                if slot.saved:
                    parameters[slot.name] = parameter_of(self.model, slot.name)
        return parameters

    def _device_of(self, key: str) -> torch.device:
        """Return the device of a key's weight; for a computed weight, of its parameters."""
        name = base_name(key)
        if name.endswith("~"):
            name = self.found[key].sites[0].behind[0]
        module, leaf = owner(self.model, name)
        # codes may lie under other names
        tensors = (module._parameters.get(leaf), *module.parameters(), *module.buffers())
        return next(tensor.device for tensor in tensors if tensor is not None)

    def _lives(self) -> Iterator[tuple[nn.Module, Live]]:
        """Yield each module that gets a subclass, with the state for it."""
        root = self.model
        lives: dict[int, tuple[nn.Module, Live]] = {}
        for path, form in self.forms.items():
            module = root.get_submodule(path)
            lives[id(module)] = (module, self._live(form))
        if self._frozen_norms:
            for module in root.modules():
                if keeps_statistics(module):
                    _, live = lives.setdefault(id(module), (module, Live(self.switch)))
                    live.frozen = True
        _, root_live = lives.setdefault(id(root), (root, Live(self.switch)))
        root_live.gained = tuple(name for name in METHODS if name not in self._taken())
        yield from lives.values()

    def _live(self, form: Form) -> Live:
        """Return the state of a module that gets a form."""
        root = self.model
        weights = {
            leaf: (bound(program, root), where) for leaf, (program, where) in form.weights.items()
        }
        output = None
        if form.output is not None:
            eval_branch, train_branch = form.output
            output = (bound(eval_branch, root), bound(train_branch, root))
        stacks = {
            leaf: (bound(eval_branch, root), bound(train_branch, root))
            for leaf, (eval_branch, train_branch) in form.stacks.items()
        }
        merged = None
        if form.merged is not None:
            leaf, program = form.merged
            merged = (leaf, bound(program, root))
        return Live(self.switch, weights, output, merged, stacks)

    def _taken(self) -> set[str]:
        """Return the names of the model's own tensors, children and attributes."""
        model = self.model
        return {*model.__dict__, *model._parameters, *model._buffers, *model._modules}

    def remove(self) -> None:
        """Remove all forms, A and B; keep the requires_grad flags and the tensors trained whole.

        Raises:
            LoraFxError: Another tool has changed a module's class since.
        """
        for module, subclass in self._swapped:
            if type(module) is not subclass:
                raise LoraFxError(
                    f"another tool turned a {subclass.__name__} into a {type(module).__name__} "
                    "after attach",
                    "undo that first; or save model.adapter() and load the model again",
                )
        for module, _ in self._swapped:
            restore(module)
        self._swapped.clear()
        for module in list(self.model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, AdapterTensors):
                    del module._modules[name]

    def uninstall(self) -> None:
        """Restore the model to its state before attach, bit for bit.

        The flags and the tensors that were trained whole go back too.
        """
        self.remove()
        let_pack(self._packs)
        with torch.no_grad():
            for name, value in self._originals.items():
                parameter_of(self.model, name).copy_(value)
        for name, flag in self._flags.items():
            parameter = parameter_of(self.model, name)
            parameter.requires_grad_(flag)
            if name in self._also:
                parameter.grad = None
        self.ties.close()

    def base(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the low-rank updates are off."""
        return patched(self.switch, on=False)

    def watched(self, watcher: Watcher) -> contextlib.AbstractContextManager[None]:
        """Return a block in which `watcher` is called after every forward that has a branch."""
        return patched(self.switch, watcher=watcher)

    def branched_sites(self) -> frozenset[str]:
        """Return ids of uses whose branch can be compared with W + s·B·A in the parameter."""
        ids: set[str] = set()
        for path, form in self.forms.items():
            if self.merged(self.model.get_submodule(path)) is not None:
                ids |= form.sites
        return frozenset(ids)

    def merged(self, module: nn.Module) -> tuple[str, Bound] | None:
        """Return the leaf of a module that has a branch, and the program of its W + s·B·A.

        None where it has no branch, or no plain tensor of floats that could hold W + s·B·A: what
        is sharded or made from codes has a type of its own.
        """
        live: Live = module.__dict__[STATE]
        if live.merged is None:
            return None
        stored = module._parameters.get(live.merged[0])
        is_plain = type(stored) is nn.Parameter and stored.is_floating_point()
        return live.merged if is_plain else None

    # --- what the model gains --------------------------------------------------------------------

    @property
    def found(self) -> Found:
        """The model's targets."""
        return self.planner.found

    def slots(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the parameters A and B of every key."""
        return tree_adapter.factor_pairs(tree_adapter.update_tensors(self.model, self.updates))

    def fill(self, updates: Updates) -> None:
        """Write the values of `updates` into the installed parameters of the same shapes."""
        tree_adapter.write_factors(self.model, {key: updates[key] for key in self.installed})

    def adapter(self) -> Adapter:
        """Return the current adapter, bound to this model's keys."""
        shapes = {name: tuple(value.shape) for name, value in self._originals.items()}
        return tree_adapter.current_adapter(
            self.model, self.updates, shapes, self.metadata, self._sampled, self.installed
        )

    def load_adapter(self, adapter: Adapter) -> None:
        """Replace the adapter; targets, ranks and alphas become those of `adapter`.

        Where only the numbers differ, A and B stay the same objects. Optimizers made before
        another change hold the old A and B: make them again.

        Raises:
            LoraFxError: A key or a shape that does not fit, a target that attach has not
                proven, or a whole tensor that is not among `also_train`.
        """
        fitting = tree_adapter.bound_for_loading(
            adapter, self.found, self.model, self._also, "attach"
        )
        updates = fitting.lowrank
        for key, update in updates.items():
            if key in self.lost:
                raise LoraFxError(
                    f"{self.lost[key]}: attach left it out",
                    "use lora_fx.insert, which can adapt it",
                )
            if self.proven.get(key) != update.use:
                raise LoraFxError(
                    f"{key!r} is new: it was not adapted when attach compared the model with its "
                    "graph",
                    "detach the model, then call lora_fx.attach(…, adapter=adapter)",
                )
        self._put(updates)
        tree_adapter.write_full_tensors(self.model, fitting, self._originals)
        self.metadata = without_probe(fitting.metadata)
        self.check_base(adapter)

    def _put(self, updates: Updates) -> None:
        """Put updates into the branches; the forms stay if shapes and scales are equal."""
        installation = Installation.of(self._union, self.updates, updates)
        self._union = installation.union
        installed = installation.updates
        if frame(installed) == frame(self.installed):
            tree_adapter.write_factors(self.model, installed, installation.changed_ranks)
            self.installed = {key: installed[key] for key in self.installed}
            self.updates = dict(updates)
        else:
            if self._union is not None:
                tree_adapter.warn_of_compiling(installation.misfits)
            self.install(updates, installed)
            tree_adapter.free_ranks(self.model, self.installed)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile as the model does, once for all targets that attach was given.

        Another adapter of any of these targets, of any rank and scale, compiles nothing new. A
        warning says what one that does not fit lacks.
        """
        model: Any = self.model
        # a compile of the user's class is not skipped
        user_class: Any = super(type(model), model)
        user_class.compile(*args, **kwargs)
        if not is_any_sharded(model):  # such a model keeps its targets and ranks
            self._union = TargetUnion(self._empty_slots()).extended(self.updates)
            updates = self.adapter().lowrank
            self.install(updates, self._union.installed(updates), same=True)
        tree_adapter.free_ranks(model, self.installed)
        tree_adapter.compile_ranks(model)

    def _empty_slots(self) -> dict[str, LowRank]:
        """Return zero updates for the targets that attach has proven."""
        slots = {}
        for key, use in self.proven.items():
            target = self.found[key]
            dtype = factor_dtype(target.parameter.dtype).name
            slots[key] = empty_slot(target.layout, use, dtype=dtype)
        return slots

    def check_base(self, adapter: Adapter) -> None:
        """Put a note into the report if an adapter says that it was trained on other weights."""
        self._sampled.check(adapter.metadata, self.model)

    def weight_form(self) -> list[str]:
        """Return notes on the weights that are computed as W + s·B·A, with the cost."""
        reads = self._computed_reads()
        if not reads:
            return []
        places = {(id(self.model.get_submodule(path)), leaf) for path, leaf in reads}
        flops = 0
        sizes: dict[str, int] = {}
        for key, update in self.updates.items():
            name = base_name(key)
            module, leaf = owner(self.model, name)
            if (id(module), leaf) in places:
                matrices = math.prod(update.a.shape[:-2])
                flops += 2 * matrices * update.rank * update.b.shape[-2] * update.a.shape[-1]
                sizes[name] = math.prod(self.found[key].parameter.shape)
        names = ", ".join(f"{path}.{leaf}".lstrip(".") for path, leaf in reads)
        lines = [
            f"computed as W + s·B·A at every read: {names}: for one read of each, {human(flops)} "
            f"FLOPs and {human(sum(sizes.values()))} new numbers, which training keeps for backward"
        ]
        if self.metadata.get("dropout"):
            lines.append(
                "dropout acts on branches only, not on weights that are computed as W + s·B·A"
            )
        return lines

    def _computed_reads(self) -> list[tuple[str, str]]:
        """Return (path, leaf) of each computed weight; a stack counts once it has been formed."""
        reads: list[tuple[str, str]] = []
        for path, form in self.forms.items():
            if form.output:
                continue
            formed = self.model.get_submodule(path).__dict__[STATE].formed
            for leaf in form.weights:
                if leaf not in form.stacks or leaf in formed:
                    reads.append((path, leaf))
        return reads

    def say(self, *notes: str) -> None:
        """Add lines to the report."""
        self._notes = (*self._notes, *notes)

    def report(self) -> AdaptedReport:
        """Report what is adapted, in which form, what is trained, and all notes."""
        forms = self.weight_form()
        for method in METHODS:
            if method in self._taken():
                forms.append(
                    f"the model has its own {method!r}; use "
                    f"lora_fx.fx.attach.attachment(model).{method}"
                )
        notes = (*self._notes, *self._sampled.said, *self.found.notes, *forms)
        report = adapted_report.adapted_report(
            self.model, self.updates, self.found, self._also, notes
        )
        return replace(report, effect=self.effect)


def attachment(model: nn.Module) -> Attachment:
    """Return the Attachment of a model; raise LoraFxError if the model has none."""
    attached = unwrapped(model).__dict__.get(REGISTRY)
    if not isinstance(attached, Attachment):
        raise LoraFxError(
            f"no adapter is attached to this {type(model).__name__}",
            "call lora_fx.attach(model, …) first",
        )
    return attached


def is_attached(model: object) -> TypeGuard[nn.Module]:
    """True for a model that attach has changed."""
    return isinstance(model, nn.Module) and REGISTRY in unwrapped(model).__dict__


def keeps_statistics(module: nn.Module) -> bool:
    """True for a norm that updates running statistics in train mode."""
    tracked = isinstance(module._buffers.get("running_mean"), torch.Tensor)
    return tracked and bool(getattr(module, "track_running_stats", True))


@dataclass
class Form:
    """The form of one module: programs for its weights, a branch on its output, or both.

    A leaf that is a stack of matrices has the branches of its products too. A branch of a stored
    tensor comes with the program of W + s·B·A and the ids of the uses that it serves, for a proof.
    """

    weights: dict[str, tuple[Program, str]] = field(default_factory=dict)
    stacks: dict[str, tuple[Program, Program]] = field(default_factory=dict)
    output: tuple[Program, Program] | None = None
    merged: tuple[str, Program] | None = None
    sites: frozenset[str] = frozenset()


class Planner(Protocol):
    """An object that chooses the forms for a set of updates; copies of a model share it."""

    found: Found

    def forms(self, updates: Updates, by_weight: frozenset[str] = frozenset()) -> dict[str, Form]:
        """Return the form of every module, by path; modules in `by_weight` get no branch."""

    def __deepcopy__(self, memo: dict[int, object]) -> Planner:
        """Return the planner itself: its graph never changes."""
        return self
