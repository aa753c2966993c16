"""Adapters of older PEFT for classification: their heads stand in no list of the config.

PEFT adds `classifier` and `score` (or `qa_outputs`) to modules_to_save by the task type, and puts
what is in no list into the model's own tensor. The oracle is PEFT's own reading of the same files.
On 1358f462 they were refused: "is not a name that PEFT writes".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter
from lora_fx.formats.peft import file as ours

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
tf = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_labels": 3,
}  # fmt: skip


def bert() -> Any:
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, max_position_embeddings=32))


def tokens() -> Any:
    return tf.BertForTokenClassification(tf.BertConfig(**SMALL, max_position_embeddings=32))


def answers() -> Any:
    sizes = {k: v for k, v in SMALL.items() if k != "num_labels"}
    return tf.BertForQuestionAnswering(tf.BertConfig(**sizes, max_position_embeddings=32))


def roberta() -> Any:
    config = tf.RobertaConfig(**SMALL, max_position_embeddings=32)
    return tf.RobertaForSequenceClassification(config)


def distil() -> Any:
    config = tf.DistilBertConfig(
        vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return tf.DistilBertForSequenceClassification(config)


def llama() -> Any:
    config = tf.LlamaConfig(**SMALL, pad_token_id=0)
    return tf.LlamaForSequenceClassification(config)


Make = Callable[[], Any]
MODELS: dict[str, tuple[Make, str, str, set[str]]] = {
    "bert": (bert, "query", "SEQ_CLS", {"classifier.weight", "classifier.bias"}),
    "tokens": (tokens, "query", "TOKEN_CLS", {"classifier.weight", "classifier.bias"}),
    "answers": (answers, "query", "QUESTION_ANS", {"qa_outputs.weight", "qa_outputs.bias"}),
    "roberta": (
        roberta, "query", "SEQ_CLS",
        {f"classifier.{m}.{t}" for m in ("dense", "out_proj") for t in ("weight", "bias")},
    ),
    "distil": (
        distil, "q_lin", "SEQ_CLS",
        {f"{m}classifier.{t}" for m in ("", "pre_") for t in ("weight", "bias")},
    ),
    "llama": (llama, "q_proj", "SEQ_CLS", {"score.weight"}),
}  # fmt: skip
IDS = {"input_ids": torch.arange(1, 11).reshape(2, 5)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(make: Make) -> Any:
    torch.manual_seed(0)
    return make().eval()


def out(model: Any) -> Any:
    with torch.no_grad():
        got = model(**IDS)
    return (got["logits"] if "logits" in got else got["start_logits"]).numpy()


def saved(name: str, folder: Path, **config: Any) -> Any:
    """The adapter of PEFT's model, with other fields in its config, and its logits."""
    make, target, task, _ = MODELS[name]
    given = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=[target], task_type=task, init_lora_weights=False
    )
    model = peft.get_peft_model(built(make), given).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(str(folder))
    fields = json.loads((folder / ours.CONFIG).read_text())
    (folder / ours.CONFIG).write_text(json.dumps({**fields, **config}))
    return out(model)


OLD = {"modules_to_save": None}


@pytest.mark.parametrize("task", ["own", None])
@pytest.mark.parametrize("name", MODELS)
def test_read_as_peft_reads_them(name: str, task: str | None, tmp_path: Path) -> None:
    make, _, own, keys = MODELS[name]
    want = saved(name, tmp_path / "a", **OLD, task_type=own if task else None)
    theirs = peft.PeftModel.from_pretrained(built(make), str(tmp_path / "a")).eval()
    assert rel(out(theirs), want) == 0
    adapter = load_adapter(tmp_path / "a")
    assert set(adapter.full) == keys
    # a name that PEFT adds itself is no surprise, and one that it lacks is none either
    assert bool(adapter.metadata["notes"]) is (task is None)
    built(make).save_pretrained(tmp_path / "base")
    lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = type(built(make)).from_pretrained(tmp_path / "out").eval()
    assert rel(out(merged), want) < FOLD_TOL


@pytest.mark.parametrize("name", ["bert", pytest.param("distil", marks=pytest.mark.slow)])
def test_insert_and_back(name: str, tmp_path: Path) -> None:
    make, *_ = MODELS[name]
    want = saved(name, tmp_path / "a", **OLD)
    module = lora_fx.insert(built(make), (), IDS, adapter=tmp_path / "a")
    assert rel(out(module), want) < ORT_TOL
    lora_fx.save_adapter(module.adapter(), tmp_path / "b")
    again = peft.PeftModel.from_pretrained(built(make), str(tmp_path / "b")).eval()
    assert rel(out(again), want) < ORT_TOL
    assert lora_fx.doctor(built_in(tmp_path, make), tmp_path / "a").ok


def built_in(folder: Path, make: Make) -> Path:
    built(make).save_pretrained(folder / "base")
    return folder / "base"


def test_the_lists_of_newer_files_say_the_same(tmp_path: Path) -> None:
    saved("bert", tmp_path / "new")
    saved("bert", tmp_path / "old", **OLD)
    new, old = (load_adapter(tmp_path / n) for n in ("new", "old"))
    assert new.metadata["peft"]["modules_to_save"] == old.metadata["peft"]["modules_to_save"]
    assert set(new.entries) == set(old.entries)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_other_names_are_refused_as_before(task: str | None, tmp_path: Path) -> None:
    from lora_fx.files.tensor_files import read_tensors, write_tensors

    saved("bert", tmp_path, **OLD, task_type=task)
    tensors, header = read_tensors(tmp_path / ours.WEIGHTS)
    bias = "base_model.model.bert.pooler.dense.bias"
    extra = {bias: tensors["base_model.model.classifier.bias"]}
    write_tensors(tmp_path / ours.WEIGHTS, {**tensors, **extra}, header)
    with pytest.raises(LoraFxError, match=r"pooler\.dense\.bias' is not a name that PEFT writes"):
        load_adapter(tmp_path)
