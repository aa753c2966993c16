"""The module that insert returns: a CapturedModule with branches and its adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter, bind, mix
from lora_fx.adapter.lowrank import Full, LowRank, Updates
from lora_fx.adapter.variant import (
    asked,
    frame,
    learning,
    relearning,
    slots_of,
    variant_of,
    with_values,
)
from lora_fx.checkpoint import provenance
from lora_fx.compare import Parity, sizes_text
from lora_fx.dtypes import FLOATING, Array, factor_dtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx import dynamo
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.codes import numbers
from lora_fx.fx.fake_tensors import is_wrapper
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.doubts import decide_doubts
from lora_fx.fx.module.module import CapturedModule, Rewriter, Speedups
from lora_fx.fx.tensors import (
    from_numpy,
    is_sharded,
    named_tensors,
    owner,
    parameter_of,
    put,
    refuse_shards,
    settle,
    to_numpy,
    whole,
)
from lora_fx.inputs import Named
from lora_fx.targets.target import Found
from lora_fx.text import Json, by_key, counted, html, human, short

Inserter = Callable[[Updates, bool], Rewriter]


DEFAULT = "default"
"""Name of the adapter that insert makes."""


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
        self._inserter = inserter
        self._also = tuple(also_train)
        self._notes = tuple(notes)
        self._metadata = dict(adapter.metadata)
        self._stored: dict[str, Adapter] = {}
        self._active: dict[str, float] = {DEFAULT: 1.0}
        self._sampled = Base()
        self._effect: Effect | None = None
        decide_doubts(self)
        self._graph(False, captured.named)  # registers the adapter's tensors
        self._sampled.now(self._updates, self)  # while tensors are whole

    def _rewrite(self, graph: FxGraph, training: bool) -> None:
        self._inserter(self._updates, training)(graph)

    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        """Key → every tensor of its update by field: a and b, and a variant's own."""
        return held_tensors(self, self._updates)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """What trains, for an optimizer: one group for each learning rate of the variant.

        Args:
            lr: The rate of a, and of tensors trained whole; LoRA+ trains b faster.
            weight_decay: That of every group.
        """
        rates: dict[int, float] = {}
        for key, held in self.tensors().items():
            by_field = variant_of(self._updates[key]).rates(lr)
            rates |= {id(p): by_field.get(field, lr) for field, p in held.items()}
        trained = (p for p in self.parameters() if p.requires_grad)
        groups = by_key((rates.get(id(p), lr), p) for p in trained)
        return [
            {"params": params, "lr": rate, "weight_decay": weight_decay}
            for rate, params in groups.items()
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """What insert had to say."""
        return self._notes

    @property
    def updates(self) -> Updates:
        """Key → the update as it was inserted (ranks, alphas and layouts hold)."""
        return self._updates

    def adapter(self, name: str | None = None) -> Adapter:
        """The active adapter (or mix) as it is now, or a loaded one, bound to this model's keys.

        Sharded tensors are gathered, so every process has to call it.
        """
        if name is not None and self._active != {name: 1.0}:
            self._known(name)
            return self._stored[name]
        if not self._active:
            return Adapter({})
        also = dict.fromkeys(self._also)
        return held_adapter(self, self._updates, also, self._metadata, self._sampled)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(dict.fromkeys((*self._stored, *self._active)))

    @property
    def active(self) -> Mapping[str, float]:
        """Name → weight of what the branches hold; empty for the base."""
        return dict(self._active)

    def load_adapter(self, adapter: AdapterLike, name: str | None = None) -> None:
        """Replace the active adapter, or load one under a name for `activate`; a path will do.

        Targets, ranks and alphas become those of `adapter`.

        Raises:
            LoraFxError: A key or a shape that does not fit, or a whole tensor that is not
                among `also_train`.
        """
        adapter = as_adapter(adapter)
        bound = fitted(adapter, self._found, self, self._also, "insert")
        if name is not None and self._active != {name: 1.0}:
            self._stored[name] = bound
            self._sampled.check(adapter.metadata, self, f"the adapter {name!r}")
            return
        if len(self._active) != 1:
            raise LoraFxError(
                "a mix, or none, is active: there is no one adapter to replace",
                "give the adapter a name: load_adapter(adapter, name=…)",
            )
        self._put(bound)
        self._sampled.check(adapter.metadata, self)

    def activate(self, which: str | Mapping[str, float] | None) -> None:
        """Let the branches hold an adapter, a weighted sum of several (exact), or none.

        A change that training made to the adapter so far active is kept under its name. A mix
        is for use: its tensors do not require grad.

        Raises:
            LoraFxError: A name that is not loaded, or whole tensors in a mix.
        """
        wanted = {which: 1.0} if isinstance(which, str) else dict(which or {})
        for name in wanted:
            self._known(name)
        if list(self._active.values()) == [1.0]:
            (now,) = self._active
            self._stored[now] = self.adapter()
        self._adapted = bool(wanted)
        if wanted:
            lone = len(wanted) == 1 and 1.0 in wanted.values()
            parts = [(self._stored[n], w) for n, w in wanted.items()]
            self._put(parts[0][0] if lone else mix(parts))
            for key, update in self._updates.items():
                for slot in slots_of(key, update):
                    parameter_of(self, slot.name).requires_grad_(lone and slot.trained)
        self._active = wanted

    def compile(self, *args: object, **kwargs: object) -> None:
        """As nn.Module's; adapters of other ranks ≥ 2 and the same scale need no other compilation.

        The scale is alpha/rank. `torch.compile(module)` compiles anew for every rank.
        """
        super().compile(*args, **kwargs)
        compile_ranks(self, self._updates)

    def scale(self, factor: float) -> None:
        """Multiply every low-rank update of the active adapter by a factor."""
        self._put(self.adapter().weighted(factor))

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise LoraFxError(f"no adapter {name!r} is loaded", f"loaded: {list(self.adapters)}")

    @torch.no_grad()
    def _put(self, bound: Adapter) -> None:
        """Put an adapter into the branches; equal shapes and scales keep the programs."""
        settle(self)
        if frame(bound.lowrank) == frame(self._updates):
            self._updates = dict(bound.lowrank)
            fill(self, self._updates)
        else:
            refuse_shards(self)
            for key, update in self._updates.items():
                for slot in slots_of(key, update):
                    m, leaf = owner(self, slot.name)
                    del m._parameters[leaf]
            self._updates = dict(bound.lowrank)  # the passes read it
            self._programs.compiled.clear()
            self._programs.codes.clear()
            self._graph(False, self._programs.captured.named)
        originals = dict(self._programs.captured.model.named_parameters())
        put_whole(self, bound, {name: originals[name] for name in self._also})
        self._metadata = dict(bound.metadata)

    def report(self) -> AdaptedReport:
        """What is adapted, what is trained, and what had to be said."""
        captured = self._programs.captured
        notes = (*self._notes, *self._sampled.said, *captured.notes)
        found = adapted_report(self, self._updates, self._found, self._also, notes)
        names = self.adapters if len(self.adapters) > 1 else ()
        parity = captured.compared
        return replace(found, effect=self._effect, adapters=names, parity=parity)


# An adapter as the tensors of a tree of modules, be it a module of ours or the user's own.


def held_tensors(root: nn.Module, updates: Updates) -> dict[str, dict[str, nn.Parameter]]:
    """Key → the tensors of its update by field, where a tree holds them."""
    return {
        key: {slot.field: parameter_of(root, slot.name) for slot in slots_of(key, update)}
        for key, update in updates.items()
    }


def factor_pairs(
    tensors: Mapping[str, Mapping[str, nn.Parameter]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Key → the tensors a and b, of the updates that have them."""
    return {key: (held["a"], held["b"]) for key, held in tensors.items() if {"a", "b"} <= {*held}}


def fill(root: nn.Module, updates: Updates) -> None:
    """Write the values of updates into the tensors that a tree holds; another rank has new ones."""
    settle(root)
    slots = [slot for key, update in updates.items() for slot in slots_of(key, update)]
    if any(parameter_of(root, s.name).shape != s.value.shape for s in slots):
        refuse_shards(root)
    for slot in slots:
        old, value = parameter_of(root, slot.name), torch.from_numpy(np.array(slot.value))
        # of another rank, one size is another; parts that some tool keeps elsewhere are refused
        pairs = zip(old.shape, value.shape, strict=False)
        if old.dim() != value.dim() or sum(a != b for a, b in pairs) != 1:
            put(slot.name, old, value)
        else:
            new = nn.Parameter(value.to(old), old.requires_grad)
            owner(root, slot.name)[0].register_parameter(slot.name.rpartition(".")[2], new)
    free_ranks(root, updates)


def free_ranks(root: nn.Module, updates: Updates) -> None:
    """Tell torch.compile that the ranks of a tree's tensors may change."""
    for key, held in held_tensors(root, updates).items():
        if variant_of(updates[key]).peft_type:  # others have ranks elsewhere, too
            dynamo.may_vary(held["a"], held["a"].dim() - 2)
            dynamo.may_vary(held["b"], held["b"].dim() - 1)


def compile_ranks(root: nn.Module, updates: Updates) -> None:
    """Let a module whose `compile` was called take other ranks without another compilation."""
    free_ranks(root, updates)
    compiled: Any = root._compiled_call_impl
    root._compiled_call_impl = dynamo.with_free_parameters(compiled)


def fitted(
    adapter: Adapter, found: Found, root: nn.Module, also: Collection[str], verb: str
) -> Adapter:
    """An adapter that is to be loaded, bound to a model.

    Args:
        adapter: As it was read.
        found: The model's targets.
        root: The model.
        also: First names of the tensors that are trained whole.
        verb: What can make more of them so, for the hint.

    Raises:
        LoraFxError: A key or a shape that does not fit, or a whole tensor that is not in `also`.
    """
    bound = bind(adapter, found)
    updates, metadata = relearning(bound.lowrank, bound.metadata)
    names, _ = named_tensors(root)
    for name in bound.full:
        if names[name] not in also:
            raise LoraFxError(
                f"the adapter holds the whole tensor {name!r}",
                f"{verb} with also_train={name!r} before loading it",
            )
    return Adapter({**bound.entries, **updates}, metadata)


def put_whole(root: nn.Module, adapter: Adapter, originals: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors that are trained whole; what an adapter lacks is the model's own again."""
    names, _ = named_tensors(root)
    full = {names[k]: from_numpy(v.value) for k, v in adapter.full.items()}
    for name, original in originals.items():
        put(name, parameter_of(root, name), full.get(name, original))


def held_adapter(
    root: nn.Module,
    updates: Updates,
    also: Mapping[str, tuple[int, ...] | None],
    metadata: Named,
    base: Base,
) -> Adapter:
    """The adapter with the values that the tensors of a tree have now.

    Sharded tensors are gathered, so every process has to call it.

    Args:
        root: Holds the tensors.
        updates: Key → the update as it was inserted.
        also: First name of a tensor that is trained whole → its shape, where that is known.
        metadata: What else the adapter says.
        base: What it says of the frozen weights.
    """
    settle(root)
    entries: dict[str, LowRank | Full] = {}
    for key, update in updates.items():
        values = {}
        for s in slots_of(key, update):
            value = whole(s.name, parameter_of(root, s.name), s.value.shape)
            values[s.field] = value.astype(factor_dtype(value.dtype.name), copy=False)
        entries[key] = with_values(update, values)
    _, aliases = named_tensors(root)
    for name, shape in also.items():
        twins = tuple(aliases.get(name, ()))
        entries[name] = Full(whole(name, parameter_of(root, name), shape), bool(twins), twins)
    own = {**learning(updates), **base.now(updates, root)}
    return Adapter(entries, {**metadata, **own})


def moved(u: LowRank, held: Mapping[str, nn.Parameter]) -> bool:
    """Whether W' is other than W."""
    if u.frozen:
        return not (torch.equal(held["a"], held["a0"]) and torch.equal(held["b"], -held["b0"]))
    variant = variant_of(u)
    for field, start in variant.beside(u).items():
        if not np.array_equal(to_numpy(held[field]), np.asarray(start)):
            return True
    return all(bool(held[field].any()) for field in variant.zero_where)


# What `model.report()` says.


def adapted_report(
    root: nn.Module, updates: Updates, found: Found, also: tuple[str, ...], notes: tuple[str, ...]
) -> AdaptedReport:
    """The report on a tree that holds the tensors of these updates."""
    rows = tuple((key, *asked(u), found[key].flops) for key, u in updates.items())
    trained = sum(p.numel() for p in root.parameters() if p.requires_grad)
    still = (n for n, p in root.named_parameters() if not p.requires_grad)
    # of codes the weights are counted, and not the bytes
    frozen = sum(math.prod(found.shapes.get(n) or parameter_of(root, n).shape) for n in still)
    return AdaptedReport(rows, also, trained, frozen, found, notes)


@dataclass(frozen=True)
class AdaptedReport:
    """What `model.report()` returns; prints as text."""

    targets: tuple[tuple[str, int, float, int], ...]
    also_train: tuple[str, ...]
    trained: int
    frozen: int
    found: Found
    notes: tuple[str, ...]
    effect: Effect | None = None
    adapters: tuple[str, ...] = ()
    parity: tuple[Parity, ...] = ()

    __repr__ = short

    def _repr_html_(self) -> str:
        """What is adapted, as a table for notebooks."""
        rows = [("key", "rank", "alpha"), *((k, str(r), f"{a:g}") for k, r, a, _ in self.targets)]
        return html(str(self).partition("\n")[0], rows)

    @property
    def adapted_share(self) -> float:
        """Share of the weight FLOPs that run through an adapted target."""
        total = self.found.weight_flops
        return sum(t[3] for t in self.targets) / total if total else 0.0

    def to_json(self) -> Json:
        """The parts of docs/json.md that an adapted module knows."""
        return {
            **self.found.to_json(),
            "targets": [self.found[k].to_json(r, a) for k, r, a, _ in self.targets],
            "also_train": list(self.also_train),
            "trained": self.trained,
            "frozen": self.frozen,
            "adapted_share": round(self.adapted_share, 6),
            "effect": None if self.effect is None else str(self.effect),
            "parity": [p.to_json() for p in self.parity],
        }

    def __str__(self) -> str:
        """A few lines."""
        targets = counted(len(self.targets), "target")
        lines = [
            f"{targets} adapted ({self.adapted_share:.1%} of the weight FLOPs), "
            f"{human(self.trained)} of {human(self.trained + self.frozen)} parameters trained"
        ]
        lines += [f"  {k}: rank {r}, alpha {a:g}" for k, r, a, _ in self.targets]
        lines += [f"  {n}: trained whole" for n in self.also_train]
        if self.effect is not None:
            lines.append(f"  effect: {self.effect}")
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        for of, rows in by_key((p.of, sizes_text(p.sizes)) for p in self.parity).items():
            lines.append(f"  {of}: compared with the model at {'; '.join(rows)}")
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Effect:
    """What the proof found.

    Attributes:
        dead: Key → the modes in which no gradient reaches it.
        modes: The modes that were proven.
        notes: What could not be proven, and why; and what training moves beside the adapter.
    """

    dead: Mapping[str, tuple[str, ...]]
    modes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        dead = ", ".join(f"{k} ({'/'.join(m)})" for k, m in self.dead.items())
        text = f"gradients reach every target in {' and '.join(self.modes) or 'no mode'}"
        if dead:
            text = f"no gradient reaches {dead}"
        return "; ".join([text, *self.notes])


# The fingerprint of the base that a module holds; see `lora_fx.checkpoint.provenance`.


class Base:
    """What an adapter says of the base that it is trained on.

    The last fingerprint is kept: tensors that are sharded later cannot be sampled by one process.
    """

    def __init__(self) -> None:
        self._keys: frozenset[str] = frozenset()
        self._last: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    @property
    def said(self) -> tuple[str, ...]:
        """Notes on adapters whose base is another than this one, or cannot be compared."""
        return tuple(self._said.values())

    def check(self, metadata: Named, root: nn.Module, name: str = "the adapter") -> None:
        """Compare the weights with those that an adapter says it was trained on, if it does.

        Args:
            metadata: That of the adapter.
            root: The tree that holds the weights.
            name: The adapter's name, for the note; an earlier one of that name is forgotten.
        """
        self._said.pop(name, None)
        recorded = metadata.get(provenance.FIELD)
        if recorded is None:
            return
        same, why = provenance.compared(recorded, partial(_cast_sample, root))
        if same is None:
            self._said[name] = f"{name}: its base is not verified: {why}"
        elif not same:
            count = len(recorded["names"])
            self._said[name] = (
                f"{name} was trained on other weights than this model's: samples of the {count} "
                "tensors that it changed there differ"
            )

    def now(self, keys: Iterable[str], root: nn.Module) -> dict[str, Any]:
        """{"base": fingerprint} of the weights of low-rank keys; empty where they have no values.

        Args:
            keys: Those of the adapter.
            root: The tree that holds the weights.
        """
        keys = frozenset(keys)
        try:
            samples = [_sample(root, name) for name in provenance.parameters_of(keys)]
            found = {provenance.FIELD: provenance.fingerprint(samples)} if samples else {}
        except LoraFxError:
            return self._last if keys == self._keys else {}
        self._keys, self._last = keys, found
        return found


def _cast_sample(root: nn.Module, name: str, dtype: str) -> tuple[tuple[int, ...], Array]:
    try:
        _, shape, values = _sample(root, name)
    except LoraFxError as error:
        raise provenance.Unknown(error.message) from error
    if values.dtype.itemsize < numpy_dtype(dtype).itemsize:
        raise provenance.Unknown(f"{name!r} is {values.dtype} here and was {dtype}")
    return shape, provenance.cast(values, dtype)


def _sample(root: nn.Module, name: str) -> tuple[str, tuple[int, ...], Array]:
    """The name, the shape, and both ends of a parameter; of codes, what they stand for."""
    tensor: torch.Tensor = parameter_of(root, name)
    if is_sharded(tensor):
        raise LoraFxError(
            f"{name!r} is sharded: every process would have to gather it", "gather it before"
        )
    tensor = numbers(root, name)
    if dtype_name(tensor.dtype) not in FLOATING or is_wrapper(tensor.data):
        raise LoraFxError(f"{name!r} is {tensor.dtype}, no plain weight", "cast it before")
    return name, tuple(tensor.shape), both_ends(tensor)


def both_ends(tensor: torch.Tensor) -> Array:
    """The first and the last elements of a tensor, as a fingerprint samples them."""
    flat = tensor.detach().reshape(-1)
    return np.concatenate([to_numpy(flat[part].clone()) for part in provenance.ends(len(flat))])
