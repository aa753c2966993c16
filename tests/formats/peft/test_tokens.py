"""Trained tokens, whole modules and tied heads as PEFT stores and merges them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import ReplacedRows
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.peft import file as ours
from tests.formats.merging import (
    check_with_peft,
    close,
    merged,
    numbers,
    randomise,
    same_entries,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

EMBED = "model.embed_tokens.weight"


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def config(**fields: Any) -> Any:
    usual = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["q_proj"]}
    return peft.LoraConfig(**{**usual, **fields})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[1, 5, 7], {"embed_tokens": [7, 1]}])
def test_trained_tokens(tmp_path: Path, tied: bool, indices: Any) -> None:
    def build() -> Any:
        return llama(tied)

    given = config(trainable_token_indices=indices)
    if tied:  # the head is the same tensor, and PEFT's merge changes it with the table
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(build(), given)
            randomise(model)
            model.save_pretrained(tmp_path)
            want = numbers(model.merge_and_unload())
        got = load_adapter(tmp_path)
        result = merged(numbers(build()), got)
        close({**result, "lm_head.weight": result[EMBED]}, want)
    else:
        got = check_with_peft(tmp_path, build, given, changed=2)
    rows = got.entries[EMBED]
    assert isinstance(rows, ReplacedRows)
    assert list(rows.index) == (indices if isinstance(indices, list) else [7, 1])


def test_tokens_of_table_and_head(tmp_path: Path) -> None:
    indices = {"embed_tokens": [1, 5], "lm_head": [2, 3, 4]}
    given = config(trainable_token_indices=indices)
    got = check_with_peft(tmp_path, lambda: llama(False), given, changed=3)
    assert {len(e.index) for e in got.entries.values() if isinstance(e, ReplacedRows)} == {2, 3}


def test_tokens_of_tied_table_and_head_are_stored_once(tmp_path: Path) -> None:
    same = {"embed_tokens": [1, 5], "lm_head": [1, 5]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            llama(True), config(trainable_token_indices=same, ensure_weight_tying=True)
        )
        model.save_pretrained(tmp_path)
    got = load_adapter(tmp_path)
    assert sorted(got.entries) == [EMBED, "model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("indices", "word"),
    [
        ([1, 5], r"\[3, 16\]"),
        ([1, 5, 5], "different"),
        ({"wte": [1, 5, 7]}, "None"),
        ([0, 1, -2], "-2"),
    ],
)
def test_numbers_that_do_not_fit_the_rows(tmp_path: Path, indices: Any, word: str) -> None:
    import json

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(False), config(trainable_token_indices=[1, 5, 7]))
        model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / ours.CONFIG).read_text())
    (tmp_path / ours.CONFIG).write_text(json.dumps({**fields, "trainable_token_indices": indices}))
    with pytest.raises(LoraFxError, match=word):
        load_adapter(tmp_path)


def test_a_tied_head_is_one_update(tmp_path: Path) -> None:
    """The oracle is PEFT's own forward: its merge adds the update of a tied head twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
        model = peft.get_peft_model(llama(True), given).eval()
        randomise(model)
        model.save_pretrained(tmp_path / "theirs")
        ids = torch.arange(8)[None]
        want = model(ids).logits.detach().numpy()
        got = load_adapter(tmp_path / "theirs")
        low = got.lowrank[EMBED]
        assert low.origin == Origin("embedding", tied=True, twins=("lm_head.weight",))
        assert "lm_head.weight" not in got.entries
        new = llama(True).eval()
        result = merged(numbers(new), got)
        new.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in result.items()})
        assert np.abs(new(ids).logits.detach().numpy() - want).max() < 1e-5 * np.abs(want).max()
        save_adapter(got, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(llama(True), str(tmp_path / "ours")).eval()
        np.testing.assert_array_equal(again(ids).logits.detach().numpy(), want)
        same_entries(load_adapter(tmp_path / "ours"), got)


def test_a_head_that_only_looks_tied_is_refused(tmp_path: Path) -> None:
    from lora_fx.files.tensor_files import read_tensors, write_tensors

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = config(target_modules=["embed_tokens"], ensure_weight_tying=True)
        peft.get_peft_model(llama(True), given).save_pretrained(tmp_path)
    tensors, header = read_tensors(tmp_path / ours.WEIGHTS)
    name = "base_model.model.lm_head.lora_A.weight"
    write_tensors(tmp_path / ours.WEIGHTS, {**tensors, name: tensors[name] * 2}, header)
    with pytest.raises(LoraFxError, match="does not name"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("tying", [False, True])
def test_whole_modules(tmp_path: Path, tying: bool) -> None:
    given = config(modules_to_save=["embed_tokens"], ensure_weight_tying=tying)
    if not tying:
        got = check_with_peft(tmp_path, lambda: llama(False), given, changed=2)
        assert set(got.full) == {EMBED}
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(True), given)
        randomise(model)
        model.save_pretrained(tmp_path)
        want = numbers(model.merge_and_unload())
    got = load_adapter(tmp_path)
    assert set(got.full) == {EMBED, "lm_head.weight"}
    close(merged(numbers(llama(True)), got), want)
