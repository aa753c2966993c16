"""lora-fx train FOLDER chat.jsonl with no option more: what it captures, takes and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import lora_fx
from lora_fx.cli.step_lines import StepLines
from lora_fx.cli.train_options import ExampleOptions, LoopOptions, defaults_taken, with_checks
from lora_fx.data import Table
from lora_fx.fx.capture.capture import Captured
from lora_fx.held_out import split
from lora_fx.run_defaults import CAUSAL, OTHERS
from tests.cli.test_cli import run
from tests.cli.test_train_cli import MODEL
from tests.fx.train.language_models import folder, rows, write


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each capture of the test so far is of train mode."""
    modes: list[bool] = []
    trace = Captured._trace

    def counted(self: Captured, source: Any, training: bool, *rest: Any) -> Any:
        modes.append(training)
        return trace(self, source, training, *rest)

    monkeypatch.setattr(Captured, "_trace", counted)
    return modes


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by PEFT
def test_a_run_without_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modes: list[bool],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base")
    write(tmp_path / "chat.jsonl", rows("messages", 30))
    capsys.readouterr()  # transformers' own line of the folder that it saved
    code, out, err = run(
        capsys, "train", "base", "chat.jsonl", "-o", "a", "--json", "--curve", "c.csv"
    )
    assert code == 0, err
    assert modes == [False, True], "one capture of each mode"

    told = json.loads(out)
    first_line = err.splitlines()[0]
    assert "--batch-size 4, --gradient-accumulation-steps 2, --lr 0.0002" in first_line
    assert told["examples"] == {"training": 27, "validation": 3}
    assert len(told["losses"]) == 3 * 4, "three passes of 27 examples, 8 a step"
    assert (tmp_path / "c.csv").read_text().count("\n") == 2 + 12
    assert "step 1/12: loss" in err

    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert config["task_type"] == "CAUSAL_LM"
    projections = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj"]
    assert config["target_modules"] == sorted([*projections, "v_proj"])
    assert "exclude_modules" not in config

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT looks there for the adapter's tokenizer
    ids = torch.randint(0, 320, (2, 7))
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained("a").double()(ids).logits
        base = AutoModelForCausalLM.from_pretrained("base").double()
        before = base(ids).logits
        for key, delta in lora_fx.load_adapter("a").deltas().items():
            base.get_parameter(key).add_(torch.from_numpy(delta))
        expected = base(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    assert torch.allclose(adapted, expected, rtol=0, atol=1e-9)


def test_a_classifier_is_captured_once_a_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modes: list[bool],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        MODEL.replace("torch.relu(", "nn.functional.dropout(training=self.training, input=")
    )
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    np.savez("d.npz", x=x, labels=np.arange(40) % 4)
    code, _, err = run(capsys, "train", "model.py:build", "d.npz", "-o", "a", "--steps", "2")
    assert code == 0, err
    assert modes == [False, True]
    assert "the data has 4 labels, the model scores 5 classes" in err
    assert "defaults of" not in err


def test_an_option_of_the_users_wins() -> None:
    settings = LoopOptions().settings(0, CAUSAL)
    assert (settings.batch_size, settings.accumulate, settings.lr) == (8, 2, 2e-4)
    own = LoopOptions(batch_size=32, lr=1e-3).settings(0, CAUSAL)
    assert (own.batch_size, own.accumulate, own.lr) == (32, 1, 1e-3)
    batches = LoopOptions(gradient_accumulation_steps=8).settings(0, CAUSAL)
    assert (batches.batch_size, batches.accumulate) == (32, 8)
    others = LoopOptions().settings(0)
    assert (others.batch_size, others.accumulate, others.lr) == (32, 1, 1e-3), "as they were"

    assert defaults_taken(ExampleOptions(), LoopOptions()) == [
        "defaults of causal language models: --batch-size 4, --gradient-accumulation-steps 2, "
        "--lr 0.0002, at most 1024 tokens of a line (--max-length), at most 64 examples held out "
        "(--validation)"
    ]
    parts = defaults_taken(ExampleOptions(), LoopOptions(accumulate=4))
    assert "--batch-size 4, 4 examples a step in 4 parts, --lr 0.0002" in parts[0]
    examples = ExampleOptions(validation=0.2, max_length=64)
    loop = LoopOptions(batch_size=8, lr=1e-3)
    assert defaults_taken(examples, loop) == []


@pytest.mark.parametrize(("steps", "wanted"), [(3, 1), (15, 1), (60, 7), (80, 10), (900, 10)])
def test_a_short_run_validates_on_no_more_examples_than_it_trains_on(
    steps: int, wanted: int
) -> None:
    table = Table({"input_ids": np.zeros((900, 3), np.int64)})
    loop = LoopOptions(steps=steps)
    settings, lines = with_checks(loop.settings(0, CAUSAL), loop, CAUSAL, table, 64)
    assert settings.checks == wanted
    assert settings == replace(loop.settings(0, CAUSAL), checks=wanted)
    told = [f"not 10 times (--checks): it trains on {8 * steps} examples, and 64 are held out"]
    assert [line.partition("run, ")[2] for line in lines] == (told if wanted < 10 else [])

    for own in (LoopOptions(steps=steps, checks=12), LoopOptions(steps=steps, patience=2)):
        assert with_checks(own.settings(0, CAUSAL), own, CAUSAL, table, 64)[1] == []
    assert LoopOptions(checks=12).settings(0, CAUSAL).checks == 12
    assert with_checks(loop.settings(0), loop, OTHERS, table, 64) == (loop.settings(0), [])


def test_no_more_than_64_examples_are_held_out() -> None:
    for count, wanted in ((30, 3), (640, 64), (5000, 64)):
        table = Table({"input_ids": np.zeros((count, 3), np.int64)})
        assert len(split(table, CAUSAL.share_of(count), 0)[1]) == wanted
    assert OTHERS.share_of(5000) == 0.1


def test_lines_tell_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([100.0, *(10.0 + 100 + 5 * i for i in range(1, 50))])
    monkeypatch.setattr("lora_fx.cli.step_lines.time.monotonic", lambda: next(seconds))
    lines: list[str] = []
    tell = StepLines(lines.append)
    for step in range(1, 41):
        tell(step, 40, 2.0)
    assert lines[:2] == [
        "step 1/40: loss 2.0000",
        "step 4/40: loss 2.0000, 5 s a step, 3 min left",
    ]
    assert len(lines) == 1 + 10
    assert lines[-1] == "step 40/40: loss 2.0000, 5 s a step"
