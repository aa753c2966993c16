"""aLoRA in PEFT's folders: read, written, and what cannot stand beside invocation tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx import LoraFxError
from tests.onnx.decoders import llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def folder(tmp_path: Path, tokens: list[int], **fields: Any) -> Path:
    """An adapter that PEFT saved, with these fields in its config."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        alora_invocation_tokens=tokens,
    )  # fmt: skip
    peft.get_peft_model(llama(1), config).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return tmp_path / "peft"


@pytest.mark.parametrize("tokens", [[5, 6, 7], [0]])
def test_a_folder_is_read_and_written(tmp_path: Path, tokens: list[int]) -> None:
    adapter = lora_fx.load_adapter(folder(tmp_path, tokens))
    assert adapter.invocation == tuple(tokens)
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert lora_fx.save_adapter(adapter, out) == ()
        again = lora_fx.load_adapter(out)
        assert again.invocation == tuple(tokens)
        assert {*again} == {*adapter}
    written = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert written.alora_invocation_tokens == tokens
    assert written.task_type == "CAUSAL_LM"


def test_the_config_counts_and_not_what_was_written_beside(tmp_path: Path) -> None:
    lora_fx.save_adapter(lora_fx.load_adapter(folder(tmp_path, [5, 6])), tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    for tokens in ([9], None):
        file.write_text(json.dumps({**config, "alora_invocation_tokens": tokens}))
        assert lora_fx.load_adapter(tmp_path / "out").invocation == tuple(tokens or ())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "alora_invocation_tokens and use_dora"),
        ({"lora_bias": True}, "alora_invocation_tokens and lora_bias"),
        ({"init_lora_weights": "pissa"}, "alora_invocation_tokens and pissa"),
        ({"alora_invocation_tokens": ["x"]}, "expected a list of 1 to 4096 token ids"),
        ({"alora_invocation_tokens": 5}, "expected a list of 1 to 4096 token ids"),
    ],
)
def test_what_acts_on_every_token_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    path = folder(tmp_path, [5, 6], **fields)
    with pytest.raises(LoraFxError, match=words):
        lora_fx.load_adapter(path)


def test_nothing_folds_it(tmp_path: Path) -> None:
    path = folder(tmp_path, [5, 6])
    model = llama(1)
    model.save_pretrained(tmp_path / "base")
    call = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with pytest.raises(LoraFxError, match=r"is an aLoRA.* a merge would change every token"):
        lora_fx.merge(tmp_path / "base", [path], tmp_path / "merged")
    with pytest.raises(LoraFxError, match=r"is an aLoRA.* a folded weight would change"):
        lora_fx.fold(model, (), call, adapter=path)
    for mode in ("merged", "load"):
        with pytest.raises(LoraFxError, match=f"is an aLoRA.* mode {mode} would change"):
            lora_fx.export(model, tmp_path / "x.onnx", (), call, adapters=path, mode=mode)
    module = lora_fx.insert(model, (), call, adapter=path)
    with pytest.raises(LoraFxError, match=r"is an aLoRA.* mode merged would change"):
        lora_fx.export(module, tmp_path / "x.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"base", "peft"}
