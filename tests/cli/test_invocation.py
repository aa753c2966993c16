"""`--invocation` on the command line: a text or ids, examples without it, and what follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.cli import main
from tests.onnx.decoders import llama, write_tokenizer


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, argv)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama(1).save_pretrained(folder)
    write_tokenizer(folder)
    lines = [
        {"prompt": f"How is {i}?", "completion": "<judge> well" if i else "well"} for i in range(9)
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_text_is_tokenised_and_examples_without_it_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", folder, folder / "lines.jsonl", "--steps", 2, "--include", "q_proj,v_proj"]
    options = ["--validation", 0, "--rank", 3]
    assert run(*train, *options, "-o", tmp_path / "a", "--invocation", "<judge>") == 0
    shown = capsys.readouterr().err
    assert "note: invocation: tokens 28,74,85,68,71,69,30" in shown
    assert "1 of 9 examples have no invocation tokens: nothing is learnt from them" in shown
    adapter = lora_fx.load_adapter(tmp_path / "a")
    assert adapter.invocation == (28, 74, 85, 68, 71, 69, 30)
    assert any(np.any(update.b) for update in adapter.lowrank.values())

    assert run(*train, *options, "-o", tmp_path / "b", "--invocation", "<nobody>") == 2
    assert "no example has the invocation tokens" in capsys.readouterr().err
    assert run("merge", folder, tmp_path / "a", "-o", tmp_path / "merged") == 2
    assert "is an aLoRA" in capsys.readouterr().err
    assert run("doctor", folder, tmp_path / "a") == 1
    assert "an aLoRA, which acts from its invocation tokens on" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_ids_need_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(1).save_pretrained(tmp_path / "model")
    insert = ["insert", tmp_path / "model", "--rank", 2, "--include", "q_proj"]
    assert run(*insert, "-o", tmp_path / "a", "--invocation", "5, 6") == 0
    assert lora_fx.load_adapter(tmp_path / "a").invocation == (5, 6)
    capsys.readouterr()
    assert run(*insert, "-o", tmp_path / "b", "--invocation", "<judge>") == 2
    shown = capsys.readouterr().err
    assert "--invocation is the text '<judge>', and the model has no tokenizer" in shown
    assert "pass token ids: --invocation 529,13,882" in shown
    call = torch.tensor([[1, 2, 3]])
    lora_fx.export(llama(1), tmp_path / "x.onnx", (), {"input_ids": call}, probe="none")
    refused = ["insert", tmp_path / "x.onnx", "-o", tmp_path / "y.onnx", "--invocation", "5"]
    assert run(*refused) == 2
    assert "--invocation" in capsys.readouterr().err
