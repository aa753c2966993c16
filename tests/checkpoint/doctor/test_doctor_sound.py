"""doctor is silent about sound pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx.checkpoint.doctor import CHECKS, lines
from tests.checkpoint.doctor import pairs
from tests.checkpoint.doctor.pairs import save_adapter, save_base
from tests.checkpoint.doctor.test_doctor import alarms, run


def good_llama(path: Path) -> Iterator[Any]:
    yield (model := pairs.llama())
    yield save_adapter(model, path, target_modules="all-linear")


def good_rslora(path: Path) -> Iterator[Any]:
    yield (model := pairs.llama())
    ranks = {"layers.1.self_attn.q_proj": 2, "down_proj": 6}
    yield save_adapter(
        model, path, use_rslora=True, rank_pattern=ranks, target_modules=pairs.LINEAR
    )


def good_gpt2(path: Path) -> Iterator[Any]:
    yield (model := pairs.gpt2())
    yield save_adapter(model, path, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def good_bert(path: Path) -> Iterator[Any]:
    yield (model := pairs.bert())
    yield save_adapter(
        model, path, target_modules=["query", "value"], modules_to_save=["classifier"]
    )


def good_convolutions(path: Path) -> Iterator[Any]:
    yield (model := pairs.Convolutions())
    yield save_adapter(model, path, target_modules=["stem", "mix"])


def good_embeddings(path: Path) -> Iterator[Any]:
    yield (model := pairs.llama(tied=False))
    yield save_adapter(model, path, target_modules=["embed_tokens", "lm_head", "q_proj"])


def good_kohya(path: Path) -> Iterator[Any]:
    yield (model := pairs.Convolutions())
    source = save_adapter(model, path.with_name("peft"), target_modules=["stem", "mix"])
    file = path.with_suffix(".safetensors")
    lora_fx.save_adapter(lora_fx.load_adapter(source), file, format="kohya")
    yield file


def good_layers(path: Path) -> Iterator[Any]:
    yield (model := pairs.llama(layers=3))
    yield save_adapter(
        model, path, target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    )


def good_excluded(path: Path) -> Iterator[Any]:
    yield (model := pairs.llama())
    yield save_adapter(
        model, path, target_modules=r".*\.(q|v)_proj", exclude_modules=r".*layers\.1\..*"
    )


GOOD = [f for name, f in sorted(globals().items()) if name.startswith("good_")]


@pytest.mark.parametrize("case", GOOD, ids=lambda f: f.__name__)
def test_no_alarm_for_a_sound_pair(case: Callable[[Path], Iterator[Any]], tmp_path: Path) -> None:
    steps = case(tmp_path / "adapter")
    base = save_base(next(steps), tmp_path / "base")
    adapter = next(steps)
    code, found = run(base, adapter)
    assert code == 0 and found["ok"] and not alarms(found), alarms(found)
    assert found["used"] and found["unused"] == found["missing"] == 0
    text = lines(lora_fx.doctor(base, adapter))
    assert text.endswith("healthy") and text.count(" ok\n") >= len(CHECKS) - 2
