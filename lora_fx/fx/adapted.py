"""The modules that insert and fold return: CapturedModule plus their passes and adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter import Adapter, bind
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture import Captured
from lora_fx.fx.module import CapturedModule, Rewriter
from lora_fx.fx.ones import prove_ones
from lora_fx.fx.tensors import from_numpy, named_tensors, owner, to_numpy
from lora_fx.lowrank import Full, LowRank, slot_names
from lora_fx.target import Found, human

Inserter = Callable[[Mapping[str, LowRank], bool], Rewriter]


class AdaptedModule(CapturedModule):
    """A model with low-rank branches; only the adapter's tensors require grad."""

    def __init__(
        self,
        captured: Captured,
        found: Found,
        updates: Mapping[str, LowRank],
        inserter: Inserter,
        *,
        also_train: Sequence[str] = (),
        norm_stats: str = "frozen",
        notes: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(captured, also_train, norm_stats=norm_stats)
        self._found = found
        self._updates = dict(updates)
        self._inserter = inserter
        self._also = tuple(also_train)
        self._notes = tuple(notes)
        self._metadata = dict(metadata or {})
        prove_ones(self)
        self._graph(False, captured.named)  # registers the adapter's tensors

    def _rewriters(self, training: bool) -> list[Rewriter]:
        return [self._inserter(self._updates, training)]

    def _slots(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        pairs = {}
        for key in self._updates:
            sides = []
            for name in slot_names(key):
                m, leaf = owner(self, name)
                p = m._parameters[leaf]
                assert p is not None
                sides.append(p)
            pairs[key] = (sides[0], sides[1])
        return pairs

    @property
    def found(self) -> Found:
        """The model's targets."""
        return self._found

    @property
    def updates(self) -> Mapping[str, LowRank]:
        """Key → the update as it was inserted (ranks, alphas and layouts hold)."""
        return self._updates

    def adapter(self) -> Adapter:
        """The adapter as it is now, bound to this model's keys."""
        entries: dict[str, LowRank | Full] = {}
        for key, (a, b) in self._slots().items():
            update = self._updates[key]
            one = (to_numpy(t).astype(np.float32, copy=True) for t in (a, b))
            entries[key] = replace(update, a=next(one), b=next(one))
        for name in self._also:
            m, leaf = owner(self, name)
            entries[name] = Full(to_numpy(m._parameters[leaf]).copy())
        return Adapter(entries, self._metadata)

    def changes_anything(self) -> bool:
        """False while every update is zero, as after insert, and no tensor is trained whole."""
        pairs = self._slots().values()
        return bool(self._also) or any(bool(a.any()) and bool(b.any()) for a, b in pairs)

    @torch.no_grad()
    def load_adapter(self, adapter: Adapter) -> None:
        """Replace the adapter; targets, ranks and alphas become those of `adapter`.

        Raises:
            LoraFxError: A key or a shape that does not fit, or a whole tensor that is not
                among `also_train`.
        """
        bound = bind(adapter, self._found)
        names, _ = named_tensors(self)
        for name in bound.full:
            if names[name] not in self._also:
                raise LoraFxError(
                    f"the adapter holds the whole tensor {name!r}",
                    f"insert with also_train={name!r} before loading it",
                )
        old = self._slots()
        for key in old:
            self._drop(key)
        device = next(self.parameters()).device
        self._updates = dict(bound.lowrank)
        self._programs.compiled.clear()
        self._programs.codes.clear()
        self._graph(False, self._programs.captured.named)
        for a, b in self._slots().values():
            a.data, b.data = a.data.to(device), b.data.to(device)
        originals = dict(self.captured.model.named_parameters())
        for name in self._also:  # what the adapter does not hold goes back to the model's own
            m, leaf = owner(self, name)
            p = m._parameters[leaf]
            assert p is not None
            full = {names[k]: v for k, v in bound.full.items()}.get(name)
            p.copy_(originals[name] if full is None else from_numpy(full.value, like=p))
        self._metadata = dict(adapter.metadata)

    def _drop(self, key: str) -> None:
        for name in slot_names(key):
            m, leaf = owner(self, name)
            del m._parameters[leaf]

    def report(self) -> AdaptedReport:
        """What is adapted, what is trained, and what had to be said."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        rows = tuple(
            (key, u.rank, u.alpha, self._found[key].flops) for key, u in self._updates.items()
        )
        return AdaptedReport(
            rows, self._also, trained, frozen, self._found, (*self._notes, *self.captured.notes)
        )


@dataclass(frozen=True)
class AdaptedReport:
    """What `model.report()` returns; prints as text."""

    targets: tuple[tuple[str, int, float, int], ...]
    also_train: tuple[str, ...]
    trained: int
    frozen: int
    found: Found
    notes: tuple[str, ...]

    @property
    def adapted_share(self) -> float:
        """Share of the weight FLOPs that run through an adapted target."""
        total = self.found.flops["reached"] + self.found.flops["refused"]
        return sum(t[3] for t in self.targets) / total if total else 0.0

    def __str__(self) -> str:
        """A few lines."""
        lines = [
            f"{len(self.targets)} targets adapted ({self.adapted_share:.1%} of the weight FLOPs), "
            f"{human(self.trained)} of {human(self.trained + self.frozen)} parameters trained"
        ]
        lines += [f"  {k}: rank {r}, alpha {a:g}" for k, r, a, _ in self.targets]
        lines += [f"  {n}: trained whole" for n in self.also_train]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


class FoldedModule(CapturedModule):
    """A model with an adapter folded into its weights; eval mode only, no branches."""

    def __init__(
        self, model: Captured | CapturedModule, rewriter: Rewriter, adapter: Adapter
    ) -> None:
        tree = model if isinstance(model, CapturedModule) else None
        captured = model.captured if isinstance(model, CapturedModule) else model
        super().__init__(captured, tree=tree)
        if tree is not None:
            self._programs.not_one = tree._programs.not_one
        else:
            prove_ones(self)
        self._rewriter = rewriter
        self.folded: tuple[Any, ...] = ()
        for name, full in adapter.full.items():
            m, leaf = owner(self, name)
            old = m._parameters[leaf]
            assert old is not None
            new = nn.Parameter(from_numpy(full.value, like=old), requires_grad=False)
            for part in self.modules():
                for k, p in part._parameters.items():
                    if p is old:
                        part._parameters[k] = new
        self._graph(False, captured.named)

    def _rewriters(self, training: bool) -> list[Rewriter]:
        return [self._rewriter]

    def train(self, mode: bool = True) -> FoldedModule:
        """A folded model has no train mode."""
        if mode:
            raise LoraFxError("a folded model is for inference", "insert again to train")
        super().train(False)
        return self
