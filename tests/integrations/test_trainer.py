"""The callback for Hugging Face's Trainer and its subclasses; docs/integrations.md runs it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lora_fx.integrations.trainer import ExportAtEnd  # noqa: E402

X = torch.linspace(-2, 2, 64).reshape(8, 8).sin()
ROWS = [{"x": row, "labels": torch.tensor(n % 3)} for n, row in enumerate(X)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits = self.fc2(torch.relu(self.fc1(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def train(model: Any, out: Path, callback: ExportAtEnd) -> None:
    arguments = transformers.TrainingArguments(
        str(out), max_steps=2, per_device_train_batch_size=8, learning_rate=0.05, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback]).train()


def equal(file: Path, model: Any) -> None:
    """The file computes what the model does with its adapter, and more than the base does."""
    with torch.no_grad():
        want = model.eval()(X)["logits"].numpy()
        base = Net().eval()(X)["logits"].numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got = session.run(["logits"], {"x": X.numpy()})[0]
    assert abs(got - want).max() < 1e-5 < 1e-3 < abs(want - base).max()


@pytest.mark.parametrize("kind", ["insert", "attach", "peft"])
def test_the_file_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    model: Any = Net().eval()
    if kind == "insert":
        model = lora_fx.insert(model, (X,), rank=2, include="*")
    elif kind == "attach":
        lora_fx.attach(model, (X,), rank=2, include="*")
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    example = () if kind == "insert" else (X,)
    callback = ExportAtEnd(tmp_path / "x.onnx", example, adapter=tmp_path / "adapter")
    train(model, tmp_path / "out", callback)
    assert callback.exported and callback.verified
    equal(tmp_path / "x.onnx", model)
    updates = lora_fx.load_adapter(tmp_path / "adapter").entries.values()
    assert len(updates) == 2 and all(isinstance(update, LowRank) for update in updates)


def test_switch(tmp_path: Path) -> None:
    model = lora_fx.insert(Net().eval(), (X,), rank=2, include="*")
    callback = ExportAtEnd(tmp_path / "x.onnx", mode="switch")
    train(model, tmp_path / "out", callback)
    assert callback.verified and (tmp_path / "adapter.onnx_adapter").is_file()


def test_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be exported at the end; nothing is trained or written."""
    with pytest.raises(LoraFxError, match="no argument 'moed'") as caught:
        ExportAtEnd(tmp_path / "x.onnx", moed="switch")
    assert "mode" in caught.value.hint
    with pytest.raises(LoraFxError, match="a Net holds no adapter of lora-fx or PEFT"):
        train(Net(), tmp_path / "out", ExportAtEnd(tmp_path / "x.onnx"))
    model = Net().eval()
    lora_fx.attach(model, (X,), rank=2, include="*")
    with pytest.raises(LoraFxError, match="example inputs of the Net are missing"):
        train(model, tmp_path / "out", ExportAtEnd(tmp_path / "x.onnx"))
    (tmp_path / "x.onnx").write_text("mine")
    with pytest.raises(LoraFxError, match=r"x\.onnx already exists"):
        train(model, tmp_path / "out", ExportAtEnd(tmp_path / "x.onnx", (X,)))
    assert (tmp_path / "x.onnx").read_text() == "mine"

    def was_trained(*_: object, **__: object) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(ExportAtEnd, "on_train_end", was_trained)
    (tmp_path / "adapter.onnx_adapter").write_text("mine")
    (tmp_path / "adapter.safetensors").write_text("mine")
    for file, options in (("y.onnx", {"mode": "switch"}), ("y.pt2", {"mode": "switch"})):
        with pytest.raises(LoraFxError, match=r"adapter\.\w+ already exists"):
            train(model, tmp_path / "out", ExportAtEnd(tmp_path / file, (X,), **options))
