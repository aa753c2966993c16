"""A column with one label a row is for heads that score rows: the others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.row_labels import refuse_row_labels
from tests.cli.test_cli import run
from tests.fx.train.language_models import folder as folder_of_llama

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 8,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
VIT = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
FOLDER = Path("folder")


def model(name: str) -> Any:
    cls = getattr(transformers, name)
    sizes = T5 if name.startswith("T5") else VIT if name.startswith("ViT") else SIZES
    with torch.device("meta"):
        return cls(cls.config_class(**sizes))


def table(labels: Any, words: tuple[str, ...] = ()) -> Table:
    ids = np.ones((len(labels), 3), int)
    return Table({"input_ids": ids, "stars": np.asarray(labels)}, "stars", words)


WORDS = tuple(f"class{i}" for i in range(300))
NAMED = table(np.arange(300), WORDS)
REFUSED = {
    "LlamaForCausalLM": "scores the next token at every token",
    "GPT2LMHeadModel": "scores the next token at every token",
    "BertForMaskedLM": "scores the vocabulary at every token",
    "T5ForConditionalGeneration": "scores the next token of a second text",
    "BertForTokenClassification": "scores classes at every token",
    "BertForQuestionAnswering": "scores where an answer begins and ends",
    "BertModel": "has no head",
    "ViTModel": "has no head",
    "LlamaModel": "has no head",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_class_and_what_it_does_are_named(name: str) -> None:
    with pytest.raises(LoraFxError) as caught:
        refuse_row_labels(NAMED, model(name), "d.csv", FOLDER)
    message = caught.value.message
    assert message == (
        "d.csv: 'stars' has one label a row ('class0', 'class1', 'class2' and 297 more), and "
        f"{name} {REFUSED[name]}: --label is for models with a classification head"
    )
    classifies = not name.startswith(("ViT", "T5"))
    assert ("ForSequenceClassification" in caught.value.hint) == classifies


ACCEPTED = {
    "BertForSequenceClassification": NAMED,
    "LlamaForSequenceClassification": NAMED,
    "ViTForImageClassification": NAMED,
    "BertForNextSentencePrediction": table([0, 1]),
    "BertForQuestionAnswering": table([0, 2]),
    "LlamaForCausalLM": table(np.ones((2, 3), int)),
    "BertForTokenClassification": table(np.ones((2, 3), int)),
    "BertModel": table([0.5, 0.25]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_labels_that_a_class_may_take(name: str) -> None:
    refuse_row_labels(ACCEPTED[name], model(name), "d.csv", FOLDER)


def test_a_model_of_the_users_own_is_not_judged() -> None:
    refuse_row_labels(NAMED, torch.nn.Linear(2, 3), "d.csv", None)


def test_a_config_without_names_of_classes() -> None:
    llama = model("LlamaForCausalLM")
    llama.config.id2label = None
    with pytest.raises(LoraFxError, match="LlamaForCausalLM scores the next token"):
        refuse_row_labels(NAMED, llama, "d.csv", FOLDER)


@pytest.mark.filterwarnings("ignore")
def test_the_command_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of_llama(Path("base"))
    lines = [f"the,w{i}" for i in range(40)]
    Path("d.csv").write_text("\n".join(["text,stars", *lines]))
    code, out, err = run(capsys, "train", "base", "d.csv", "--label", "stars", "-o", "a")
    assert code == 2 and not out and not Path("a").exists()
    assert "Error: d.csv: 'stars' has one label a row ('w0', 'w1', 'w10' and 37 more)" in err
    assert err.count("w39") == 0
    assert "Hint: leave --label out, and pass .jsonl" in err
