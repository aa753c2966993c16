"""Lines of text, prompts and conversations: their labels, their loss, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import lora_fx
from lora_fx.data import Table, read_table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.train.language_data import language_table
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.settings import Settings
from lora_fx.held_out import repeated
from tests.fx.train.language_models import MARKED, PLAIN, SIZES, folder, rows, tokenizer, write
from tests.zoo.shared import captured

WORDS = tokenizer()
FORMS = ("text", "prompt", "messages")


def config(**more: Any) -> LlamaConfig:
    sizes = {**SIZES, "num_hidden_layers": 1, **more}
    return LlamaConfig(vocab_size=len(WORDS), **sizes)


def build() -> tuple[Any, tuple[()], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(use_cache=False)).eval()
    ids = torch.randint(3, 200, (2, 5))
    return model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build()[0]


def words_in(path: Path, template: str | None = MARKED) -> Path:
    path.mkdir()
    tokenizer(template).save_pretrained(path)
    return path


def table(
    tmp_path: Path, model: torch.nn.Module, lines: list[Any], longest: int | None = None,
    template: str | None = MARKED,
) -> tuple[Table, list[str]]:  # fmt: skip
    path = write(tmp_path / "data.jsonl", lines)
    found = language_table(path, model, words_in(tmp_path / "folder", template), longest)
    assert found is not None
    return found


def expected(line: dict[str, Any]) -> tuple[str, str]:
    """(the whole text, what of it is trained on), by hand."""
    if "text" in line:
        return line["text"] + "</s>", line["text"] + "</s>"
    if "prompt" in line:
        return line["prompt"] + line["completion"] + "</s>", line["completion"] + "</s>"
    turns = line["messages"]
    whole = "".join(f"<|{t['role']}|>{t['content']}</s>" for t in turns)
    return whole, "".join(t["content"] + "</s>" for t in turns if t["role"] == "assistant")


@pytest.mark.parametrize("form", FORMS)
def test_ids_labels_and_padding(tmp_path: Path, model: LlamaForCausalLM, form: str) -> None:
    lines = rows(form, 7)
    found, notes = table(tmp_path, model, lines)
    assert found.label == "labels" and len(found) == len(lines)
    ids, mask, labels = (found.columns[n] for n in ("input_ids", "attention_mask", "labels"))
    lengths = mask.sum(1)
    assert len(set(lengths)) > 2 and lengths.max() == ids.shape[1] == labels.shape[1]
    for row, line in enumerate(lines):
        whole, trained = expected(line)
        assert (np.sort(mask[row])[::-1] == mask[row]).all(), "padding is on the right"
        assert WORDS.decode(ids[row, : lengths[row]]) == whole
        assert (labels[row, lengths[row] :] == -100).all()
        taken = labels[row] != -100
        assert (labels[row][taken] == ids[row][taken]).all()
        assert WORDS.decode(labels[row][taken]) == trained
    assert len(notes) == 1 and "in 7 lines" in notes[0]
    short = next(found.rows([int(lengths.argmin())]).batches(4))
    assert short.columns["labels"].shape == (1, lengths.min()), "a batch is as long as its longest"


def test_a_template_that_marks_nothing_trains_on_all(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    found, notes = table(tmp_path, model, rows("messages", 3), template=PLAIN)
    mask = found.columns["attention_mask"].astype(bool)
    assert (found.columns["labels"] == found.columns["input_ids"])[mask].all()
    assert "every token, of all roles, since the chat template has no {% generation %}" in notes[0]


def test_what_is_cut_left_out_and_ignored_is_said(tmp_path: Path, model: LlamaForCausalLM) -> None:
    lines = [
        {"prompt": "the cat", "completion": " runs", "source": "a"},
        {"prompt": "the cat sees a small dog and it runs", "completion": " over green hills"},
        {"prompt": "the", "completion": " cat sees a small dog and it runs over green hills"},
    ]
    found, notes = table(tmp_path, model, lines, 7)
    assert len(found) == 2 and found.columns["input_ids"].shape == (2, 7)
    assert found.columns["attention_mask"].sum(1).tolist()[1] == 7
    assert "cut to 7 tokens: 2 of 3 lines" in notes[1]
    assert "none of their first 7 tokens is trained on: 1 of 3 lines (line 2)" in notes[2]
    assert "ignored: 'source'" in notes[3]
    small = LlamaForCausalLM(config(max_position_embeddings=5))
    (tmp_path / "again").mkdir()
    assert table(tmp_path / "again", small, lines, 64)[0].columns["input_ids"].shape[1] == 5


def test_lines_that_two_files_share_are_counted_whatever_their_padding(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    lines = rows("prompt", 6)
    training, _ = table(
        tmp_path / "one", model, [*lines, {"prompt": "the", "completion": " a" * 40}]
    )
    longer = {"prompt": lines[4]["prompt"], "completion": lines[4]["completion"] + " roofs"}
    held_out, _ = table(tmp_path / "two", model, [lines[1], longer, lines[3]])
    assert training.columns["labels"].shape[1] > held_out.columns["labels"].shape[1]
    assert repeated(held_out, training) == 2


OTHER = {"text": "roofs", "prompt": "a dog", "completion": " runs"}


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("messages", ["prompt"]),  # the first turn again, as in UltraChat
        ("messages", ["completion"]),
        ("text", ["prompt"]),
        ("prompt", []),
        ("messages", []),
    ],
)
def test_a_form_that_is_whole_is_taken_beside_parts_and_nulls(
    tmp_path: Path, model: LlamaForCausalLM, form: str, more: list[str]
) -> None:
    lines = rows(form, 3)
    nulls = {name: None for name in ("text", "completion", "messages") if name not in lines[0]}
    beside = {**nulls, **{name: OTHER[name] for name in more}}
    (tmp_path / "alone").mkdir()
    want, _ = table(tmp_path / "alone", model, lines)
    found, notes = table(tmp_path, model, [{**beside, **line} for line in lines])
    for name, column in want.columns.items():
        assert (found.columns[name] == column).all()
    assert all(repr(name) in notes[-1] for name in beside), "what is ignored is named"


def test_a_model_without_a_limit_takes_what_max_length_says(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    """Bloom's and Mamba's configs have no max_position_embeddings."""
    sizes = {"hidden_size": 12, "n_layer": 1, "n_head": 2}
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(WORDS), **sizes))
    line = {"text": "the cat sees a small dog " * 300}
    (tmp_path / "free").mkdir()
    free, notes = table(tmp_path / "free", bloom, [line], 1700)
    assert free.columns["input_ids"].shape == (1, 1700) and "cut to 1700 tokens" in notes[1]
    (tmp_path / "usual").mkdir()
    usual, _ = table(tmp_path / "usual", bloom, [line])
    assert usual.columns["input_ids"].shape == (1, 1024)


def test_a_prompt_that_merges_with_its_completion(tmp_path: Path, model: LlamaForCausalLM) -> None:
    lines = [{"prompt": "the cat s", "completion": "ees"}]
    found, notes = table(tmp_path, model, lines)
    labels = found.columns["labels"][0]
    assert WORDS.decode(labels[labels != -100]) == " sees</s>"
    assert "in 1 lines the last tokens of the prompt change" in notes[1] and "line 1" in notes[1]


ROW = {"text": "the cat"}
TURN = {"role": "user", "content": "the"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"text": "a"', "not valid JSON"),
    "a list": ("[1]", "a JSON list, not an object"),
    "a key twice": ('{"text": "a", "text": "b"}', "'text' appears twice"),
    "half a pair": ('{"text": "\\ud800"}', "not valid JSON"),
    "two forms": ({"text": "a", "messages": [TURN]}, "has 'text' and 'messages'; expected one"),
    "another form": ({"prompt": "a", "completion": "b"}, "the first line has 'text'"),
    "no form": ({"question": "a"}, "has none of the forms; the first line has 'text'"),
    "no completion": ({"prompt": "a"}, "has no 'completion'"),
    "a number": ({"text": 3}, "'text' is 3, expected a text"),
    "null": ({"text": None}, "'text' is null, expected a text"),
    "empty": ({"text": ""}, "the text is empty"),
    "only its end": ({"text": "</s>"}, "it has no token to train on"),
}
FIRST: dict[str, tuple[Any, str]] = {
    "empty completion": ({"prompt": "a", "completion": ""}, "the completion is empty"),
    "turns as a prompt": ({"prompt": [TURN], "completion": "b"}, "'prompt' is [{"),
    "unknown role": (
        {"messages": [TURN, {"role": "bot", "content": "a"}]},
        "message 2 has the role 'bot', expected one of system, developer, user, assistant, tool",
    ),
    "no turns": ({"messages": []}, "'messages' is [], expected turns"),
    "text as turns": ({"messages": "hi"}, "'messages' is \"hi\", expected turns"),
    "a turn of text": ({"messages": ["hi"]}, "message 1 has the role None"),
    "parts as content": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "message 1: 'content' is [{",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: 'content' is null"),
    "no assistant": ({"messages": [TURN]}, "it has no token to train on"),
    "no form at all": (
        {"instruction": "a", "conversations": [TURN]},
        "has 'instruction', 'conversations'; expected 'text', or 'prompt' with 'completion', or",
    ),
}


def refused(path: Path, model: torch.nn.Module, folder: Path) -> str:
    with pytest.raises(LoraFxError) as info:
        language_table(str(path), model, folder, None)
    assert info.value.exit_code == 2 and info.value.hint and "\n" not in info.value.message
    return str(info.value.message)


def test_malformed_lines(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path, folder = tmp_path / "data.jsonl", words_in(tmp_path / "folder")
    for name, (line, message) in REFUSED.items():
        text = line if isinstance(line, str) else json.dumps(line)
        path.write_text(f"{json.dumps(ROW)}\n\n{text}\n", "utf-8")
        said = refused(path, model, folder)
        assert said.startswith(f"{path}: line 3") and message in said, (name, said)
    for name, (line, message) in FIRST.items():
        write(path, [line])
        said = refused(path, model, folder)
        assert said.startswith(f"{path}: line 1") and message in said, (name, said)
    path.write_bytes(b'{"text": "the"}\n{"text": "\xe9"}\n')
    assert f"{path}: line 2 is not UTF-8" in refused(path, model, folder)
    for text in ("\n", '{"input_ids": [1, 2], "labels": [1, 2]}\n'):
        path.write_text(text)
        assert language_table(str(path), model, folder, None) is None, "columns, if any"
    path.write_text("\n")
    with pytest.raises(LoraFxError, match=f"{path}: the data has no rows"):
        read_table(str(path))
    write(path, [{"text": "the old roofs <|system|>"}])
    small = LlamaForCausalLM(config()).resize_token_embeddings(40)
    model_of_40 = LlamaForCausalLM(config())
    model_of_40.set_input_embeddings(small)
    assert "expected ids below 40" in refused(path, model_of_40, folder)
    write(path, [{"prompt": "the cat sees a small dog", "completion": " runs"}])
    with pytest.raises(LoraFxError, match="no line has a token to train on among its first"):
        language_table(str(path), model, folder, 3)


def test_a_template_that_raises(tmp_path: Path, model: LlamaForCausalLM) -> None:
    template = "{{ raise_exception('system comes first') }}"
    write(tmp_path / "d.jsonl", [{"messages": [TURN]}])
    said = refused(tmp_path / "d.jsonl", model, words_in(tmp_path / "folder", template))
    assert "line 1: the chat template refuses this line: TemplateError: system comes first" in said


def test_a_tokenizer_without_a_template(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder = words_in(tmp_path / "folder", None)
    write(tmp_path / "d.jsonl", [{"messages": [TURN, {"role": "assistant", "content": "a"}]}])
    said = refused(tmp_path / "d.jsonl", model, folder)
    assert f"{folder}: the tokenizer has no chat template" in said and "d.jsonl" in said
    (folder / "chat_template.jinja").write_text(MARKED)  # as the hint says
    assert language_table(str(tmp_path / "d.jsonl"), model, folder, None) is not None


def test_models_that_predict_no_token(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folder = words_in(tmp_path / "folder")
    plain = LlamaModel(config(hidden_size=8, intermediate_size=8))
    path = tmp_path / "d.jsonl"
    write(path, [ROW])
    said = refused(path, plain, folder)
    assert f"{folder}/config.json names no architectures, so the model is LlamaModel" in said
    with pytest.raises(LoraFxError) as info:
        language_table(str(path), plain, folder, None)
    assert info.value.hint == 'add "architectures": ["LlamaForCausalLM"] to config.json'
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8))
    bert.config.architectures = ["BertForSequenceClassification"]
    assert language_table(str(path), bert, folder, None) is None, "texts that it reads its own way"
    write(path, rows("prompt", 2))
    assert "BertForSequenceClassification is not a causal language model" in refused(
        path, bert, folder
    )


def explicit(
    model: torch.nn.Module, start: dict[str, tuple[torch.Tensor, torch.Tensor]], data: Table,
    order: list[int], each: int, steps: int, lr: float,
) -> list[float]:  # fmt: skip
    """Losses of AdamW on W + s·B·A in fp64, with a cross entropy and a schedule of its own."""
    base = {n: p.detach().double() for n, p in model.named_parameters()}
    pairs = {k: tuple(t.detach().double().requires_grad_() for t in ab) for k, ab in start.items()}
    trained = [t for ab in pairs.values() for t in ab]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        now = {**base, **{k: base[k] + 1.5 * b @ a for k, (a, b) in pairs.items()}}
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i in order[step * each : (step + 1) * each]:  # one line at a time: no padding
            length = int(data.columns["attention_mask"][i].sum())
            ids, labels = (
                torch.from_numpy(data.columns[n][i, :length]) for n in ("input_ids", "labels")
            )
            out = functional_call(model, now, (), {"input_ids": ids[None]}).logits[0]
            for at in range(length - 1):
                if labels[at + 1] != -100:
                    total = total + out[at].exp().sum().log() - out[at, labels[at + 1]]
                    count += 1
        optimizer.zero_grad()
        (total / count).backward()
        norm = float(torch.stack([t.grad.norm() for t in trained]).norm())
        for t in trained:
            t.grad *= min(1.0, 1 / norm)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        losses.append(float(total.detach() / count))
    return losses


def test_losses_are_those_of_an_explicit_loop(tmp_path: Path) -> None:
    cap, *_ = captured("language llama", build)
    adapted = lora_fx.insert(cap, rank=2, alpha=3.0, include="q_proj,down_proj", dead="allow")
    with torch.no_grad():
        for _, b in insertion_of(adapted).slots().values():
            b.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    start = {key: (a.clone(), b.clone()) for key, (a, b) in insertion_of(adapted).slots().items()}
    data, _ = table(tmp_path, cap.model, rows("prompt", 12))
    order = np.arange(12)
    np.random.default_rng(0).shuffle(order)
    steps, lr = 3, 0.05
    double = build()[0].double()
    theirs = explicit(double, start, data, order.tolist(), 4, steps, lr)
    settings = Settings(
        steps=steps, batch_size=4, accumulate=2, lr=lr, schedule="linear", warmup=0.0
    )
    ours = fit(adapted, data, settings=settings).losses
    assert abs(ours[0] - ours[-1]) > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_tokenizer_that_panics_is_one_line(tmp_path: Path) -> None:
    r"""`(\p{L}+)+$` tries more than the package tokenizers allows, which ends in no Exception."""
    home = folder(tmp_path / "model")
    file = home / "tokenizer.json"
    made = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(\p{L}+)+$"}, "behavior": "Isolated"}
    made["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, made["pre_tokenizer"]],
    }
    file.write_text(json.dumps(made))
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"text": "a" * 60 + "!"}) + "\n")
    model = LlamaForCausalLM.from_pretrained(home)
    with pytest.raises(
        LoraFxError, match=r"d\.jsonl: line 1: the tokenizer in .* fails: "
    ) as caught:
        language_table(str(data), model, home, None)
    assert "\n" not in caught.value.message
