"""A tied table that a file holds under several names: its copies change alike, or are untied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx import Adapter, Full, LoraFxError
from tests.checkpoint.families import load, logits, tied
from tests.checkpoint.made import checkpoint, read
from tests.checkpoint.test_untie_families import low

TABLE, HEAD = "model.shared.weight", "lm_head.weight"
ENCODER, DECODER = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
NAMES = (TABLE, ENCODER, DECODER, HEAD)


def copies(name: str, folder: Path, table: str, *names: str) -> Path:
    """A family's base that holds its table under more names, as converted files do."""
    tied(name, folder / "one")
    tensors = read(folder / "one")
    more = {n: tensors[table] for n in names}
    checkpoint(folder / "base", {**tensors, **more})
    config = (folder / "one" / "config.json").read_bytes()
    (folder / "base" / "config.json").write_bytes(config)
    return folder / "base"


def moved(base: Path, out: Path) -> dict[str, Any]:
    """By how much each name of the table changed."""
    old, new = read(base), read(out)
    return {n: new[n].astype("f8") - old[TABLE] for n in NAMES if n in new}


@pytest.mark.parametrize("stored", [(), (HEAD,), (ENCODER, DECODER), (ENCODER, DECODER, HEAD)])
def test_an_update_of_all_uses_changes_every_copy(stored: tuple[str, ...], tmp_path: Path) -> None:
    base = copies("bart", tmp_path, TABLE, *stored)
    entry = low(1, op="linear", tied=True)
    lora_fx.merge(base, Adapter({TABLE: entry}), tmp_path / "out")
    change = moved(base, tmp_path / "out")
    assert set(change) == {TABLE, *stored}
    for value in change.values():
        np.testing.assert_allclose(value, entry.matrix(), atol=1e-6)
    logits(load("bart", tmp_path / "out"))


@pytest.mark.parametrize("stored", [(), (HEAD,), (ENCODER, DECODER, HEAD)])
def test_uses_go_to_their_own_tensor(stored: tuple[str, ...], tmp_path: Path) -> None:
    """Of the shared table for all lookups, of one lookup for it alone, of the head for the head."""
    base = copies("bart", tmp_path, TABLE, *stored)
    entries = {
        TABLE: low(1, op="embedding"),
        DECODER: low(2, op="embedding"),
        HEAD: low(3),
    }
    with pytest.raises(LoraFxError, match="one of two uses"):
        lora_fx.merge(base, Adapter({DECODER: entries[DECODER]}), tmp_path / "out")
    lora_fx.merge(base, Adapter(entries), tmp_path / "out", untie=True)
    one, two, three = (low(i).matrix() for i in (1, 2, 3))
    want = {TABLE: one, ENCODER: one, DECODER: one + two, HEAD: three}
    change = moved(base, tmp_path / "out")
    assert set(change) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(change[name], value, atol=1e-6, err_msg=name)
    assert lora_fx.verify(tmp_path / "out", base, adapter=Adapter(entries), rows=None)
    logits(load("bart", tmp_path / "out"))


@pytest.mark.parametrize("stored", [False, True])
def test_a_trained_bias_has_two_names(stored: bool, tmp_path: Path) -> None:
    table, names = "bert.embeddings.word_embeddings.weight", ["cls.predictions.bias"]
    base = copies("bert", tmp_path, table)
    if stored:
        names.append("cls.predictions.decoder.bias")
        old = read(base)
        checkpoint(tmp_path / "new", {**old, names[1]: old[names[0]]})
        (tmp_path / "new" / "config.json").write_bytes((base / "config.json").read_bytes())
        base = tmp_path / "new"
    bias = np.arange(40, dtype="f4")
    for key in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        out = tmp_path / key
        lora_fx.merge(base, Adapter({key: Full(bias)}), out)
        new = read(out)
        assert [n for n in new if n in {*names, "cls.predictions.decoder.bias"}] == names
        for name in names:
            np.testing.assert_array_equal(new[name], bias)
    head = Adapter({"cls.predictions.decoder.weight": low(1), "cls.predictions.bias": Full(bias)})
    lora_fx.merge(base, head, tmp_path / "untied", untie=True)
    np.testing.assert_array_equal(read(tmp_path / "untied")["cls.predictions.decoder.bias"], bias)


def test_t5_has_one_table_for_its_lookups(tmp_path: Path) -> None:
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    base = copies("t5", tmp_path, "shared.weight", *names)
    one = Adapter({names[0]: low(1, op="embedding")})
    for untie in (False, True):
        with pytest.raises(LoraFxError, match="one of several lookups"):
            lora_fx.merge(base, one, tmp_path / "out", untie=untie)
    lookups = Adapter({"shared.weight": low(1, op="embedding")})
    lora_fx.merge(base, lookups, tmp_path / "out", untie=True)
    old, new = read(base), read(tmp_path / "out")
    for name in ("shared.weight", *names):
        np.testing.assert_allclose(new[name] - old[name], low(1).matrix(), atol=1e-6)
    np.testing.assert_array_equal(new["lm_head.weight"], old["shared.weight"])
    load("t5", tmp_path / "out")


@pytest.mark.parametrize("said", [True, False])
def test_a_t5_is_tied_whatever_its_config_says(said: bool, tmp_path: Path) -> None:
    """Files of T5 1.1 without a head say that they are not, which means their logits' scale."""
    base = tmp_path / "base"
    tied("t5", base)
    file = base / "config.json"
    text = file.read_text().replace('"scale_decoder_outputs": true,', "")
    file.write_text(text.replace('embeddings": true', f'embeddings": {str(said).lower()}'))
    entry = Adapter({"shared.weight": low(1, op="embedding")})
    with pytest.raises(LoraFxError, match="scales its logits" if said else "one of two uses"):
        lora_fx.merge(base, entry, tmp_path / "out")
    if not said:
        lora_fx.merge(base, entry, tmp_path / "out", untie=True)
        before, after = logits(load("t5", base)), logits(load("t5", tmp_path / "out"))
        assert float((before - after).abs().max()) > 1e-2 * float(before.abs().max())
