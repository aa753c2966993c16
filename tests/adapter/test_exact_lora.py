"""LoHa and LoKr as LoRA of the same ΔW, and those that have no such form."""

from __future__ import annotations

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.exact_lora import as_exact_lora, exact_update, has_low_rank
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, Hadamard, Kronecker, Rotation
from lora_fx.compare import rel
from lora_fx.dtypes import Array

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


def product(rows: int, rank: int, columns: int) -> Array:
    return (numbers(rows, rank).astype(np.float64) @ numbers(rank, columns)).astype(np.float32)


EXACT: dict[str, tuple[Hadamard | Kronecker, int]] = {
    "LoHa": (Hadamard(numbers(3, 20), numbers(24, 3), numbers(3, 20), numbers(24, 3), 5.0), 9),
    "LoHa of a kernel": (
        Hadamard(numbers(2, 18), numbers(7, 2), numbers(2, 18), numbers(7, 2), 5.0, kernel=(3, 2)),
        4,
    ),
    "LoKr of products": (Kronecker(numbers(2, 3), product(9, 2, 10), 0.7), 4),
    "LoKr of two products": (Kronecker(product(4, 1, 6), product(5, 2, 7), -0.7), 2),
    "LoKr, wide and tall": (Kronecker(numbers(5, 2), numbers(3, 11), 1.5), 6),
    "LoKr of a kernel": (Kronecker(numbers(4, 2), numbers(2, 9), 1.0, kernel=(3,)), 4),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_change_is_the_same(name: str) -> None:
    entry, rank = EXACT[name]
    low = exact_update(entry)
    assert low is not None and low.rank == rank and low.shape == entry.shape
    assert low.a.dtype == low.b.dtype == np.float32
    assert low.scale == pytest.approx(entry.scale) and low.origin.kernel == entry.kernel
    everything = slice(None)
    assert rel(low.matrix(), entry.block(0, everything, everything)) < 1e-6
    if isinstance(entry, Kronecker):
        wide = np.kron(entry.w1.astype(np.float64), entry.w2) * entry.scale
        assert rel(low.matrix(), wide) < 1e-6


HIGH = Hadamard(numbers(4, 20), numbers(16, 4), numbers(4, 20), numbers(16, 4), 5.0)
FULL: dict[str, Entry] = {
    "LoKr": Kronecker(numbers(2, 3), numbers(9, 10), 1.0),
    "LoKr of zeros": Kronecker(numbers(2, 3), np.zeros((9, 10), np.float32), 1.0),
    "OFT": Rotation(numbers(2, 3, 3)),
    "LoRA": LowRank(numbers(2, 6), numbers(5, 2), 1.0),
}


@pytest.mark.parametrize("name", FULL)
def test_what_has_no_such_form(name: str) -> None:
    assert exact_update(FULL[name]) is None
    adapter = Adapter({"w": FULL[name]})
    assert as_exact_lora(adapter) == (adapter, [])


def test_a_loha_of_a_high_rank_has_the_form_too() -> None:
    low = exact_update(HIGH)
    assert low is not None and low.rank == 16 and not has_low_rank(HIGH)
    assert rel(low.matrix(), HIGH.block(0, slice(None), slice(None))) < 1e-6


def test_a_note_for_each_method() -> None:
    entries: dict[str, Entry] = {f"{name}.weight": entry for name, (entry, _) in EXACT.items()}
    adapter, notes = as_exact_lora(Adapter({**entries, "plain": FULL["LoRA"]}), "de")
    assert all(isinstance(entry, LowRank) for entry in adapter.values())
    loha, lokr = notes
    assert loha.startswith("de: 2 LoHa updates taken as exact LoRA of rank 4 to 9 (LoHa of a ke")
    assert lokr.startswith("de: 4 LoKr updates taken as exact LoRA of rank 2 to 6 (")
