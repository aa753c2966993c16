"""From format to format and back: every bit of a, b and alpha, every key and layout.

A new format is one row of ROWS. It needs no fixture: `test_a_format_and_back` draws its adapters.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.registry import OURS
from lora_fx.ir.layout import plain_layout


@dataclass(frozen=True)
class Row:
    """A format that gives back the keys, A, B and the scale of every update.

    Attributes:
        file: A name of its files; without a suffix a folder.
        kernels: False where the format refuses convolutions.
    """

    file: str
    kernels: bool = True


ROWS = {
    "peft": Row("x"),
    "kohya": Row("x.safetensors"),
    "diffusers": Row("x.safetensors"),
}
APART = {
    "mlx": "one rank and one scale for all updates: test_mlx.py",
    "onnx_adapter": "the scale is multiplied into B: test_onnx_adapter.py",
    "gguf": "it needs the folder of a model: test_gguf.py",
}
"""The formats that give back other factors with the same ΔW, or need a model."""
NAMES = ("up_blocks.0.a_b", "up_blocks.0.c", "mid_block.to_q", "down_blocks.1.x.0")
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)


def equal(got: Adapter, want: Adapter) -> None:
    assert set(got.entries) == set(want.entries)
    for key, entry in want.entries.items():
        other = got.entries[key]
        assert type(other) is type(entry)
        for field in fields(entry):
            a, b = getattr(other, field.name), getattr(entry, field.name)
            if isinstance(b, np.ndarray):
                assert a.tobytes() == b.tobytes() and a.shape == b.shape, (key, field.name)
            else:
                assert a == b, (key, field.name)


def through(adapter: Adapter, *formats: str) -> Adapter:
    """The adapter after it was written and read in every format."""
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(adapter, Path(folder) / ROWS[name].file, name)
            adapter = load_adapter(Path(folder) / ROWS[name].file)
    return adapter


@st.composite
def lowrank(
    draw: st.DrawFn, variant: str, bound: bool, dora: bool, kernels: bool = True
) -> LowRank:
    rank, out, in_ = (draw(st.integers(1, n)) for n in (3, 5, 4))
    kernel = draw(st.sampled_from([(), (3,), (3, 2), (1, 1)])) if kernels else ()
    shape = (out, in_, *kernel)
    wide = in_ * int(np.prod(kernel, dtype=int))
    op = f"conv{len(kernel)}d" if kernel else "linear"
    return LowRank(
        draw(arrays(np.float32, (rank, wide), elements=FLOATS)),
        draw(arrays(np.float32, (out, rank), elements=FLOATS)),
        draw(st.floats(1e-3, 1e3)),
        plain_layout(shape) if bound else None,
        variant,
        origin=Origin(op if bound or kernel else "", () if bound else kernel),
        magnitude=draw(arrays(np.float32, (out,), elements=FLOATS)) if dora else None,
    )


@st.composite
def adapters(draw: st.DrawFn, dora: bool = False, kernels: bool = True) -> Adapter:
    variant = draw(st.sampled_from(["lora", "rslora"]))
    keys = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    bound = draw(st.booleans())
    return Adapter({f"{k}.weight": draw(lowrank(variant, bound, dora, kernels)) for k in keys})


def test_every_format_that_is_written_has_a_row() -> None:
    written = {format.name for format in OURS if not format.only_read}
    assert {*ROWS, *APART} == written, "a row of ROWS, or of APART with its reason"


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_format_and_back(name: str, data: st.DataObject) -> None:
    """Keys, A, B and the scale; layouts and variants come back where the file can say them."""
    adapter = data.draw(adapters(kernels=ROWS[name].kernels))
    got = through(adapter, name)
    assert set(got.lowrank) == set(got.entries) == set(adapter.entries)
    for key, update in adapter.lowrank.items():
        np.testing.assert_array_equal(got.lowrank[key].a, update.a, strict=True)
        np.testing.assert_array_equal(got.lowrank[key].b, update.b, strict=True)
        assert math.isclose(got.lowrank[key].scale, update.scale, rel_tol=1e-6)


@settings(max_examples=15, deadline=None)
@given(adapters())
def test_through_every_format(adapter: Adapter) -> None:
    equal(through(adapter, "peft", "kohya", "peft"), adapter)
    equal(through(adapter, "peft", "diffusers", "kohya", "diffusers", "peft"), adapter)


@settings(max_examples=30, deadline=None)
@given(adapters(dora=True))
def test_dora_through_kohya_and_diffusers(adapter: Adapter) -> None:
    equal(through(adapter, "kohya", "diffusers", "kohya"), adapter)


@st.composite
def others(draw: st.DrawFn) -> Entry:
    def array(*shape: int) -> Any:
        return draw(arrays(np.float32, shape, elements=FLOATS))

    rank, out, in_ = (draw(st.integers(1, n)) for n in (3, 5, 4))
    layout = draw(st.sampled_from([None, plain_layout((out, in_))]))
    which = draw(st.sampled_from(["loha", "dense", "lokr"]))
    if which == "dense":
        return Dense(array(out, in_), 1.0, layout)
    if which == "lokr":
        scale = draw(st.sampled_from([1.0, 0.3, 2.5, 1 / 3]))
        return Kronecker(array(out, 2), array(3, in_), scale)
    a, b = (rank, in_), (out, rank)
    return Hadamard(array(*a), array(*b), array(*a), array(*b), draw(st.floats(0.1, 9)), layout)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), others(), min_size=1))
def test_the_rest_through_kohya(entries: dict[str, Entry]) -> None:
    adapter = Adapter({f"{k}.weight": v for k, v in entries.items()})
    equal(through(adapter, "kohya", "kohya"), adapter)


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_a_foreign_file_keeps_its_tensors(tmp_path: Path, name: str) -> None:
    """Read and written again, a file of others holds the same tensors, bit by bit."""
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 6), (8, 4)))
    if name == "kohya":
        tensors = {"lora_te_x_y.lora_down.weight": a, "lora_te_x_y.lora_up.weight": b}
        tensors["lora_te_x_y.alpha"] = np.array(0.7, np.float32)
    else:
        tensors = {"unet.x.lora_A.weight": a, "unet.x.lora_B.weight": b}
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file(tensors, one)
    save_adapter(load_adapter(one), two, name)
    got = load_file(two)
    assert set(got) == set(tensors)
    for key, array in tensors.items():
        np.testing.assert_array_equal(got[key], array, strict=True)


def test_metadata_and_equal_bytes(tmp_path: Path) -> None:
    low = LowRank(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 2.0)
    adapter = Adapter({"unet.x.weight": low}, {"dropout": 0.1, "base_hash": "ab", "notes": ["n"]})
    for name in ("kohya", "diffusers"):
        for file in ("1.safetensors", "2.safetensors"):
            save_adapter(adapter, tmp_path / file, name, force=True)
        one, two = ((tmp_path / f).read_bytes() for f in ("1.safetensors", "2.safetensors"))
        assert one == two
        got = load_adapter(tmp_path / "1.safetensors").metadata
        assert got == {"dropout": 0.1, "base_hash": "ab", "notes": []}
        turned = Adapter({"unet.x.weight": low}, {"fan_in_fan_out": True})
        notes = save_adapter(turned, tmp_path / "3.safetensors", name, force=True)
        assert "[in, out]" in notes[0]
