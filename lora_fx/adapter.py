"""The Adapter: a named set of updates, key → LowRank or Full, that knows no file format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.changes import Dense, Entry, Hadamard, Kronecker, is_plain, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import plain_layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.lowrank import Full, LowRank
from lora_fx.targets.found import Found


@dataclass(frozen=True)
class Adapter:
    """Updates by key, plus metadata (dropout, base name, where it was trained).

    An adapter from a file is *unbound*: its keys are the file's names and its layouts are not
    known. `bind` gives it those of a model.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of updates."""
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self.entries)

    @property
    def lowrank(self) -> dict[str, LowRank]:
        """The low-rank updates."""
        return {k: v for k, v in self.entries.items() if isinstance(v, LowRank)}

    @property
    def full(self) -> dict[str, Full]:
        """The whole tensors."""
        return {k: v for k, v in self.entries.items() if isinstance(v, Full)}

    @property
    def others(self) -> dict[str, str]:
        """{key: what it is} of entries that only a merge of checkpoints can apply."""
        return {k: name_of(v) for k, v in self.entries.items() if not is_plain(v)}

    @property
    def bound(self) -> bool:
        """True when every low-rank update knows its layout."""
        return all(v.layout is not None for v in self.lowrank.values())

    @property
    def parameters(self) -> int:
        """Number of trained elements."""
        fields = (v for entry in self.entries.values() for v in vars(entry).values())
        return sum(v.size for v in fields if isinstance(v, np.ndarray))

    def deltas(self, base: object = None, dtype: npt.DTypeLike = "float64") -> dict[str, Array]:
        """{key: ΔW in stored layout}; an unbound update is taken as [out, in].

        Args:
            base: Not needed by lora and rslora.
            dtype: Of the arithmetic and of the result.

        Raises:
            LoraFxError: An update whose effect depends on the base (DoRA, PiSSA, OLoRA).
        """
        e = NumpyEmitter()
        result = {}
        for key, low in self.lowrank.items():
            if not is_plain(low):
                raise LoraFxError(
                    f"the adapter's {key!r} is {name_of(low)}; it has no ΔW of its own",
                    "merge it into its base",
                )
            matrix = low.matrix(dtype)
            layout = low.layout or plain_layout(matrix.shape)
            result[key] = layout.to_stored(e, matrix)
        return result

    def weighted(self, weight: float) -> Adapter:
        """Every change times `weight`; whole tensors and rows cannot be scaled.

        Raises:
            LoraFxError: The weight is not 1 and the adapter holds whole tensors, rows, or DoRA,
                whose effect is not in proportion to its update.
        """
        if weight == 1.0:
            return self
        scaled: dict[str, Entry] = {}
        for key, entry in self.entries.items():
            if isinstance(entry, Hadamard) or (
                isinstance(entry, LowRank) and key not in self.others
            ):
                scaled[key] = replace(entry, alpha=entry.alpha * weight)
            elif isinstance(entry, (Kronecker, Dense)):
                scaled[key] = replace(entry, scale=entry.scale * weight)
            else:
                raise LoraFxError(
                    f"weight {weight:g}: the adapter's {key!r} is {name_of(entry)}",
                    "only updates in proportion to their scale can be weighted",
                )
        return replace(self, entries=scaled)

    def bind(self, model: Any, args: Any = (), kwargs: Any = None) -> Adapter:
        """This adapter in the keys and layouts of a model (module, Captured, Found or folder).

        Raises:
            LoraFxError: A key that the model lacks, or a shape that does not fit.
        """
        import lora_fx  # the verbs live above this module; only the facade knows them
        from lora_fx.binding import bind  # it is built on this module

        found = model if isinstance(model, Found) else lora_fx.find(model, args, kwargs)
        return bind(self, found)


def check_plain(adapter: Adapter, what: str) -> None:
    """Raise for an entry that is more than s·b·a or a whole tensor."""
    for key, kind in adapter.others.items():
        raise LoraFxError(
            f"{what}: the adapter's {key!r} is {kind}; expected lora, rslora or a whole tensor",
            "lora-fx merge folds it into a checkpoint",
        )
