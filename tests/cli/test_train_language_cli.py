"""lora-fx train FOLDER DATA of a language model, end to end: what PEFT makes of what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.test_cli import run
from tests.fx.train.language_models import folder, rows, write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # PEFT's, of transformers


@torch.no_grad()
def peft_loss(base: Path, adapter: Path, lines: list[dict[str, str]]) -> float:
    """The mean over the completions' tokens, of PEFT's model, a line at a time."""
    words = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total, count = 0.0, 0
    for line in lines:
        ids = words(line["prompt"] + line["completion"] + "</s>", return_tensors="pt")["input_ids"]
        start = len(words(line["prompt"])["input_ids"])
        scores = model(input_ids=ids).logits[0, start - 1 : -1].double()
        total -= float(scores.log_softmax(-1).gather(1, ids[0, start:, None]).sum())
        count += ids.shape[1] - start
    return total / count


def test_a_run_and_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base, lines = folder(tmp_path / "base"), rows("prompt", 30)
    write(tmp_path / "data.jsonl", lines[:24])
    write(tmp_path / "held.jsonl", lines[24:])
    argv = [
        "train",
        "base",
        "data.jsonl",
        "-r",
        "3",
        "--exclude",
        "role:head",
        "--steps",
        "6",
        "--lr",
        "0.02",
        "--json",
    ]
    argv += ["--eval-data", "held.jsonl", "--schedule", "linear", "--batch-size", "4"]
    argv += ["--gradient-accumulation-steps", "2", "--activation-checkpointing"]
    code, out, err = run(capsys, *argv, "-o", "a", "--curve", "curve.csv")
    assert code == 0, err
    told = json.loads(out)
    assert told["examples"] == {"training": 24, "validation": 6} and len(told["losses"]) == 6
    best = told["validation"][str(told["best_step"])]
    assert best < told["before"] - 0.1
    assert peft_loss(base, tmp_path / "a", lines[24:]) == pytest.approx(best, abs=1e-4)
    assert "data.jsonl: trained on the completions' tokens" in err and "held.jsonl: trained" in err
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 8

    write(tmp_path / "bad.jsonl", [*lines[:2], {"prompt": "the", "completion": ""}])
    code, out, err = run(capsys, "train", "base", "bad.jsonl", "-o", "b", "-r", "2")
    assert code == 2 and not out and not (tmp_path / "b").exists()
    assert "Error: bad.jsonl: line 3: the completion is empty\nHint: leave the line out" in err

    config = json.loads((base / "config.json").read_text())
    named = config.pop("architectures")
    tensors = load_file(base / "model.safetensors")
    plain = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    code, out, err = run(capsys, "train", "base", "data.jsonl", "-o", "b", "-r", "2")
    assert code == 2 and "Error: base/config.json names no architectures, so the model is" in err
    assert f'Hint: add "architectures": ["{named[0]}"] to config.json' in err
    assert not (tmp_path / "b").exists()
