"""Folders whose config.json names no class: the one whose weights they are, or a refusal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fx.fx.load.models import load_model
from lora_fx.fx.load.sealed_libraries import sealed_libraries
from tests.fx.load.loading import block_network, refused

BERT: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 16,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 3}
GPT2 = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 3}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 3}
DISTIL = {"vocab_size": 61, "dim": 24, "hidden_dim": 40, "n_layers": 1, "n_heads": 3}
VIT = {k: v for k, v in BERT.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
MIXTRAL = {**LLAMA, "num_local_experts": 2}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def folder_of(
    path: Path, name: str, sizes: dict[str, Any], edit: Callable[[dict[str, Any]], None] = id
) -> Path:
    """A folder that a class saved, its config without the class's name."""
    import transformers

    cls = getattr(transformers, name)
    cls(cls.config_class(**sizes)).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    del config["architectures"]
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


TOLD = {
    "BertModel": BERT,
    "BertForSequenceClassification": BERT,
    "BertForTokenClassification": BERT,
    "BertForQuestionAnswering": BERT,
    "BertForMaskedLM": BERT,
    "BertForPreTraining": BERT,
    "BertForNextSentencePrediction": BERT,
    "RobertaForMaskedLM": BERT,
    "RobertaForSequenceClassification": BERT,
    "DistilBertForSequenceClassification": DISTIL,
    "LlamaModel": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "LlamaForSequenceClassification": LLAMA,
    "MixtralForCausalLM": MIXTRAL,
    "GPT2Model": GPT2,
    "GPT2LMHeadModel": GPT2,
    "T5Model": T5,
    "T5EncoderModel": T5,
    "T5ForSequenceClassification": T5,
    "ViTForImageClassification": VIT,
}


@pytest.mark.parametrize("name", TOLD)
def test_the_class_whose_weights_they_are(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name, TOLD[name])
    loaded = load_model(folder)
    assert type(loaded.module).__name__ == name
    assert f"names no architectures: {name} is built, which has these weights" in loaded.notes[0]
    assert not any("unused" in note or "random" in note for note in loaded.notes)
    assert type(load_model(folder, meta=True).module).__name__ == name


@pytest.mark.parametrize(("decoder", "name"), [(True, "BertLMHeadModel"), (False, "BertForMasked")])
def test_heads_of_the_same_names_are_told_by_the_config(
    decoder: bool, name: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, "BertLMHeadModel", {**BERT, "is_decoder": decoder})
    assert type(load_model(folder).module).__name__.startswith(name)


def test_a_tied_head_that_the_file_does_not_have(tmp_path: Path) -> None:
    """The names of the body tell: with a head before them, it is the class that ties its own."""
    folder = folder_of(tmp_path, "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert type(load_model(folder).module).__name__ == "LlamaForCausalLM"


def test_another_class_that_would_fit_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "T5ForConditionalGeneration", T5)
    (note,) = load_model(folder).notes
    assert (
        "T5Model is built, which has exactly these weights; T5ForConditionalGeneration would fit"
        in note
    )


def test_a_body_without_its_pooler_is_the_body(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    loaded = load_model(folder_of(tmp_path, "BertModel", BERT, edit))
    assert type(loaded.module).__name__ == "BertModel"
    assert any("2 tensors have random values" in note for note in loaded.notes)


def test_an_old_buffer_is_no_weight(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    loaded = load_model(folder_of(tmp_path, "GPT2LMHeadModel", GPT2, edit))
    assert type(loaded.module).__name__ == "GPT2LMHeadModel"


def strange(tensors: dict[str, Any]) -> None:
    tensors["my_head.weight"] = torch.ones(3, 24)


REFUSED = {
    "a head that no class has": (
        "BertModel", BERT, strange, "leaves out my_head.weight", '"architectures": ["BertModel"]'
    ),
    "a head beside one that a class has": (
        "BertForMaskedLM", BERT, strange, "BertForMaskedLM leaves out my_head.weight",
        '"architectures": ["BertForMaskedLM"]',
    ),
    "two heads": (
        "LlamaForCausalLM", LLAMA, lambda t: t.update({"score.weight": torch.ones(2, 24)}),
        "leaves out", '"architectures"',
    ),
    "a classifier with one row": (
        "BertForSequenceClassification", {**BERT, "num_labels": 1}, id,
        "fit BertForSequenceClassification, BertForMultipleChoice alike",
        'add "architectures": ["BertForSequenceClassification"]',
    ),
    "an encoder with a head of its own": (
        "ViTModel", VIT, strange, "leaves out my_head.weight", '"architectures": ["ViTModel"]'
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_tell_are_refused(case: str, tmp_path: Path) -> None:
    name, sizes, edit, say, hint = REFUSED[case]
    folder = folder_of(tmp_path, name, sizes, edit)
    error = refused(folder, f"{folder}/config.json names no architectures", say)
    assert hint in error.hint


def test_the_hint_works(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "BertForMaskedLM", BERT, strange)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForMaskedLM"]})
    )
    loaded = load_model(folder)
    assert any(
        "1 tensors of " in n and "are not used: " in n and "my_head.weight" in n
        for n in loaded.notes
    )


def test_a_problem_type_tells_a_classifier_with_one_row(tmp_path: Path) -> None:
    sizes = {**BERT, "num_labels": 1, "problem_type": "regression"}
    folder = folder_of(tmp_path, "BertForSequenceClassification", sizes)
    assert type(load_model(folder).module).__name__ == "BertForSequenceClassification"


def test_without_weights_it_is_the_plain_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "BertForMaskedLM", BERT)
    (folder / "model.safetensors").unlink()
    loaded = load_model(folder, meta=True)
    assert type(loaded.module).__name__ == "BertModel"
    assert "BertModel is built, since the file has no weights to choose by" in loaded.notes[0]


def test_a_block_finds_the_folder_of_temporary_files_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python finds it by writing a file, which torch._dynamo asks for when it is imported."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    with sealed_libraries("a test", tmp_path):
        assert tempfile.gettempdir()
