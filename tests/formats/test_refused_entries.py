"""What each format refuses: every kind of update is written and read back, or refused by its name.

A new format is one row of REFUSES. The hint of an error is followed, and keeps the update.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.as_lora import as_lora
from lora_fx.adapter.updates import Hadamard, Kronecker, Rotation
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.registry import FORMATS, OURS
from lora_fx.formats.unsupported import AS_LORA, KEEPS
from tests.formats.gguf_families import config
from tests.formats.refused_entries import ENTRIES, IN, OUT, Array, normal

NO_DELTA = ("LoHa", "LoHa, stored [in, out]", "LoKr", "LoKr, stored [in, out]", "OFT")
"""What is no LowRank and no tensor, but a method of its own."""
TENSORS = ("a whole ΔW", "a bias", "a whole tensor", "trained rows")
PLACES = (
    "a start that changed the base", "a part", "no weight of a module", "one use", "a stack",
    "a stack, unbound",
)  # fmt: skip
EMBEDDINGS = ("an embedding", "an embedding, unbound")
MODULE_FORM = (*PLACES, "all uses", *EMBEDDINGS, "stored [in, out]")
"""What `module_form` refuses."""
CONVOLUTIONS = ("a convolution", "a convolution, unbound")


@dataclass(frozen=True)
class Refuses:
    """What a format refuses.

    Attributes:
        file: A name of its files; without a suffix a folder.
        rows: Of ENTRIES, the names of those that it refuses. It writes the others.
        lead: What stands before the module in a key.
        instead: The hint, where it is the same for all and says something else.
    """

    file: str
    rows: tuple[str, ...]
    lead: str = ""
    instead: str = ""


REFUSES = {
    "peft": Refuses("x", NO_DELTA),
    "kohya": Refuses(
        "x.safetensors",
        (
            "LoHa, stored [in, out]", "LoKr, stored [in, out]", "OFT", "a whole tensor",
            "trained rows", *MODULE_FORM,
        ),
    ),
    "diffusers": Refuses("x.safetensors", (*NO_DELTA, *TENSORS, *MODULE_FORM), lead="unet."),
    "mlx": Refuses("x", (*NO_DELTA, *TENSORS, *PLACES, *CONVOLUTIONS)),
    "onnx_adapter": Refuses(
        "x.onnx_adapter",
        (
            *NO_DELTA, "a whole ΔW", "a bias", "trained rows", "DoRA",
            "a start that changed the base", "one use", "all uses",
        ),
        instead="merge it into the model instead|convert --for, or save it as peft",
    ),
    "gguf": Refuses("x.gguf", (*NO_DELTA, *TENSORS, *PLACES, "DoRA", *CONVOLUTIONS)),
}  # fmt: skip


def test_every_format_that_is_written_has_a_row() -> None:
    written = {format.name for format in OURS if not format.only_read}
    assert {*REFUSES} == written, "a row of REFUSES in test_refused_entries.py"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a model, whose config.json some formats need."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("llama")))
    return folder


@pytest.mark.parametrize("row", ENTRIES)
@pytest.mark.parametrize("name", REFUSES)
def test_an_update_is_written_or_refused(tmp_path: Path, base: Path, name: str, row: str) -> None:
    format = REFUSES[name]
    entry = ENTRIES[row].entry
    key = f"{format.lead}model.layers.0.mlp.up_proj{ENTRIES[row].end}"
    adapter = Adapter({key: entry})
    home = base if FORMATS[name].takes_base else None
    out = tmp_path / format.file
    if row not in format.rows:
        save_adapter(adapter, out, name, base=home)
        read = load_adapter(out, base=home)
        assert list(read.entries) == [key] and type(read.entries[key]) is type(entry)
        return

    with pytest.raises(LoraFxError, match=ENTRIES[row].words) as caught:
        save_adapter(adapter, out, name, base=home)
    assert repr(key) in caught.value.message and "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    hint = caught.value.hint
    if format.instead:
        assert re.search(format.instead, hint)
        return
    for other_format, file in (("peft", "kept"), ("kohya", "kept.safetensors")):
        if f"save it as {other_format}" in hint:
            save_adapter(adapter, tmp_path / file, other_format)
            read = load_adapter(tmp_path / file)
            assert list(read.entries) == [key] and type(read.entries[key]) is type(entry)
    if AS_LORA in hint:
        plain = turned_into_lora(adapter, hint)
        if "--format peft" in hint:
            save_adapter(plain, tmp_path / "plain", "peft")
            read = load_adapter(tmp_path / "plain")
        else:
            save_adapter(plain, out, name, base=home)
            read = load_adapter(out, base=home)
        np.testing.assert_allclose(read.lowrank[key].matrix(), delta_of(adapter), atol=1e-4)
    assert hint == KEEPS or AS_LORA in hint


WEIGHT = normal(20, OUT, IN)


def delta_of(adapter: Adapter) -> Array:
    """ΔW of the only update."""
    (entry,) = adapter.entries.values()
    if isinstance(entry, Rotation):
        return entry.of(WEIGHT)
    assert isinstance(entry, (Hadamard, Kronecker))
    return entry.block(0, slice(None), slice(None))


def turned_into_lora(adapter: Adapter, hint: str) -> Adapter:
    """What lora-fx convert --as lora makes; it has the base only if the hint asks for it."""
    lora, _ = as_lora(adapter, rank=IN, delta_of=delta_of if "--base FOLDER" in hint else None)
    return lora
