"""The question for a server: how answers are matched with points, and how a question is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

import lora_fx
from lora_fx import Adapter, Full
from lora_fx.passes.proofs import language_making
from lora_fx.passes.verbs.probe_for_server import probe_for_server
from lora_fx.probe.completions import _logprobs
from lora_fx.probe.language import Continuations, LanguageProbe, NextToken, Prompt
from lora_fx.probe.verdict import Verdict
from tests.fx.train import language_models
from tests.probe.test_server import adapter

BASE = Continuations(np.array([-1.0, -2.0, -3.0]), ((5,), (6,)), (" the cat", " dog"))
WITH = Continuations(np.array([-2.0, -1.0, -1.5]), ((7,), (6,)), (" a cat", " dog"))
PROBE = LanguageProbe(
    prompts=(Prompt("one", (1, 2)), Prompt("two", (3,))),
    points=(NextToken(0, 10, " the"), NextToken(0, 11, " a"), NextToken(1, 12, " dog")),
    tolerance=0.001,
    precisions={"bfloat16": 0.1},
    base=BASE,
    adapter=WITH,
    half=np.array([-1.5, -1.5, -2.0]),
    double=np.array([-4.0, -0.5, -0.5]),
    groups={"q": np.array([-2.0, -1.0, -2.5])},
)


def test_json_and_back() -> None:
    again = LanguageProbe.from_json(PROBE.to_json(), "x")
    assert again.to_json() == PROBE.to_json()
    assert again.prompts == PROBE.prompts and again.points == PROBE.points


@pytest.mark.parametrize(
    ("answers", "places"),
    [
        ([{10: -2.0, 11: -1.0}, {12: -1.5}], [0, 1, 2]),
        ([{" the": -2.0, " a": -1.0}, {" dog": -1.5}], [0, 1, 2]),
        # texts of a tokenizer that leaves out the space before a word
        ([{"the": -2.0, "a": -1.0}, {"dog": -1.5}], [0, 1, 2]),
        # "the" is another token where texts have spaces
        ([{"the": -9.0, " a": -1.0}, {" dog": -1.5}], [1, 2]),
        ([{99: -1.0}, {}], []),
    ],
)
def test_points_are_matched(answers: list[Mapping[int | str, float]], places: list[int]) -> None:
    told = PROBE.told(answers)
    assert told.places.tolist() == places
    assert np.array_equal(told.found, WITH.values[places])


def test_a_verdict_over_the_told_points_alone() -> None:
    told = PROBE.told([{10: -2.0, 11: -1.0}, {}])
    assert PROBE.verdict_on_adapter(told) == "right"
    assert PROBE.unseen_groups(told, Verdict("right")) == ["q"], "its one point was not told"
    told = PROBE.told([{10: -2.0, 11: -1.0}, {12: -2.5}])
    assert PROBE.verdict_on_adapter(told) == "without q" and not PROBE.unseen_groups(
        told, Verdict("right")
    )
    told = PROBE.told([{10: -1.0}, {12: math.nan}])
    assert PROBE.verdict_on_adapter(told) == "not finite"


@pytest.mark.parametrize(
    ("texts", "adapter_verdict", "base_verdict"),
    [
        ([" a cat sat", " dog"], "right in texts", "adapter x in texts"),
        (["a cat", "anything"], "right in texts", "adapter x in texts"),
        ([" the cat", " dog"], "no effect in texts", "right in texts"),
        ([" my cat", " dog"], "differs", "differs"),
        ([" a", " dog"], "differs", "differs"),
        (["", ""], "differs", "differs"),
    ],
)
def test_texts(texts: list[str], adapter_verdict: str, base_verdict: str) -> None:
    """Only the first prompt counts: after the second, both say the same."""
    assert PROBE.verdict_on_texts(texts, of_base=False, name="x") == adapter_verdict
    assert PROBE.verdict_on_texts(texts, of_base=True, name="x") == base_verdict


def test_groups_that_a_precision_hides() -> None:
    told = PROBE.told([{10: -2.0, 11: -1.0}, {12: -1.5}])
    assert PROBE.unseen_groups(told, Verdict("right", precision="bfloat16")) == []
    coarse = replace(PROBE, precisions={"bfloat16": 0.6})
    assert coarse.unseen_groups(told, Verdict("right", precision="bfloat16")) == ["q"], (
        "without it, 1.0 is missing"
    )


def test_a_small_effect_in_another_precision() -> None:
    """Where the precision explains the difference, and the effect is not far above it."""
    near = PROBE.told([{10: -2.05, 11: -1.0}, {12: -1.55}])
    assert PROBE.verdict_on_adapter(near) == "right in bfloat16"
    coarse = replace(PROBE, precisions={"bfloat16": 0.6})
    assert coarse.verdict_on_adapter(near) == "too small to tell"
    assert replace(PROBE, precisions={}).verdict_on_adapter(near) == "differs"


def test_texts_that_tell_nothing() -> None:
    alike = replace(PROBE, adapter=replace(WITH, texts=(" the cat sat", " dog")))
    assert alike.verdict_on_texts([" the cat", " dog"], of_base=False, name="x") == (
        "too small to tell"
    )


ANSWERS: dict[str, tuple[Any, dict[int | str, float] | None]] = {
    "none": (None, None),
    "ids": ({"top_logprobs": [{"token_id:3": -1.0, "token_id:4": -2}]}, {3: -1.0, 4: -2.0}),
    "texts": ({"tokens": ["a"], "top_logprobs": [{"a": -1.0}]}, {"a": -1.0}),
    "rows": (
        {"content": [{"token": "a", "top_logprobs": [{"id": 5, "token": "a", "logprob": -1.0}]}]},
        {"a": -1.0, 5: -1.0},
    ),
    "a number that is none": ({"top_logprobs": [{"a": None}]}, {"a": math.nan}),
    "no probability": ({"top_logprobs": [{"a": -9999.0, "b": -1.0}]}, {"b": -1.0}),
    "empty": ({"top_logprobs": [{}]}, None),
    "null": ({"top_logprobs": None}, None),
    "of other kinds": ({"top_logprobs": [[1]], "content": [{"top_logprobs": 3}]}, None),
    "a text for a number": ({"top_logprobs": [{"a": "x"}]}, None),
    "an id that is none": ({"top_logprobs": [{"token_id:x": -1.0}]}, {"token_id:x": -1.0}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_forms_of_answers(name: str) -> None:
    logprobs, expected = ANSWERS[name]
    found = _logprobs({"text": "a", "logprobs": logprobs})
    assert str(found) == str(expected)


def question(base: Path, path: Path) -> LanguageProbe:
    probe, _ = probe_for_server(base, lora_fx.load_adapter(path))
    assert probe.language is not None
    return LanguageProbe.from_json(probe.language, "x")


def test_a_tokenizer_that_begins_every_text(tmp_path: Path) -> None:
    """The token is part of the prompt, and of no text."""
    base = language_models.folder(tmp_path / "base")
    words = language_models.tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    words.save_pretrained(base)
    probe = question(base, adapter(tmp_path / "one", 0))
    assert all(prompt.tokens[0] == 1 and 2 not in prompt.tokens for prompt in probe.prompts)
    assert not any("<s>" in point.text for point in probe.points)
    assert not any("<s>" in text for text in (*probe.base.texts, *probe.adapter.texts))


def test_points_are_among_the_tokens_that_servers_tell(tmp_path: Path) -> None:
    base = language_models.folder(tmp_path / "base")
    probe = question(base, adapter(tmp_path / "one", 0))
    per_prompt = [point.prompt for point in probe.points]
    assert len(probe.points) <= 64 and max(map(per_prompt.count, set(per_prompt))) <= 8
    for prompt in set(per_prompt):
        texts = [point.text for point in probe.points if point.prompt == prompt]
        assert len(set(texts)) == len(texts)
    assert probe.tolerance == 0.001 and list(probe.precisions) == ["tf32", "bfloat16"]
    assert probe.precisions["tf32"] == pytest.approx(probe.precisions["bfloat16"] / 8, rel=1e-3)


def test_a_whole_tensor_has_no_scale(tmp_path: Path) -> None:
    base = language_models.folder(tmp_path / "base")
    low = lora_fx.load_adapter(adapter(tmp_path / "one", 0))
    norm = Full(np.full(24, 1.5, np.float32))
    lora_fx.save_adapter(
        Adapter({**low.bind(base).entries, "model.norm.weight": norm}), tmp_path / "two"
    )
    probe = question(base, tmp_path / "two")
    assert probe.half is None and probe.double is None and probe.groups


def test_a_base_that_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n\n\ndef build():\n"
        "    return torch.nn.Linear(3, 2), (torch.ones(4, 3),), {}\n"
    )
    low = lora_fx.LowRank(np.ones((1, 3), "f4"), np.ones((2, 1), "f4"), 1.0)
    probe, notes = probe_for_server(f"{tmp_path}/model.py:build", Adapter({"weight": low}))
    assert probe.language is None and list(probe.adapters) == ["adapter"]
    assert any("no question for a server" in note for note in notes)


def test_prompts_are_ours() -> None:
    assert len(language_making.PROMPTS) * language_making.POINTS == 64
