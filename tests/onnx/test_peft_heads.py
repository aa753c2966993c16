"""Two adapters of PEFT with a classifier each in one file, judged by PEFT's own model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx import Session
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.session import open_session

TOL = 1e-6
WORDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(3))
LAYERS = ["query", "value", "q_proj", "v_proj"]
BIASES = ("query.base_layer.bias", "q_proj.base_layer.bias")
NAMES = ("news", "mail", "plain")
"""The last one has no classifier of its own."""


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        image_size=8, patch_size=4, num_channels=3, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


MODELS = {"bert": (bert, WORDS), "vit": (vit, torch.randn(4, 3, 8, 8))}


def trained(model: Any, name: str, seed: int, folder: Path) -> None:
    """Save what PEFT saves after training: random A, B, and a classifier of its own."""
    import peft

    torch.manual_seed(seed)
    has_head = name != "plain"
    config = peft.LoraConfig(
        r=2 + seed, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False,
        modules_to_save=["classifier"] if has_head else None,
        bias="lora_only" if seed == 1 else "none",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                is_trained_bias = seed == 1 and key.endswith(BIASES)
                if "modules_to_save" in key or is_trained_bias:
                    parameter.add_(torch.randn_like(parameter))
        wrapped.save_pretrained(folder)


def by_peft(make: Any, x: torch.Tensor, folder: Path) -> Any:
    """The logits in float64 of PEFT's own model with a saved adapter."""
    import peft

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(make(), str(folder)).eval().double()
        x = x.double() if x.is_floating_point() else x
        return model(x).logits.numpy()


@pytest.fixture(scope="module", params=MODELS)
def case(request: Any, tmp_path_factory: Any) -> Any:
    make, x = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(NAMES):
        trained(make(), name, seed, folder / name)
    expected = {name: by_peft(make, x, folder / name) for name in NAMES}
    with torch.no_grad():
        double = x.double() if x.is_floating_point() else x
        expected[""] = make().double()(double).logits.numpy()
    captured = lora_fx.capture(make(), (x,))
    assert rel(expected["news"], expected["mail"]) > 0.05
    return captured, x.numpy(), folder, expected


@pytest.mark.parametrize("mode", ["switch", "load"])
def test_each_adapter_alone(case: Any, mode: Any, tmp_path: Path) -> None:
    captured, x, folder, expected = case
    path = tmp_path / "m.onnx"
    adapters = {name: folder / name for name in NAMES}
    lora_fx.export(captured, path, adapters=adapters, mode=mode, provider="cpu")
    (name_of_input,) = [spec.name for spec in captured.inputs.specs]
    session = Session(path, "cpu")
    assert rel(session.run({name_of_input: x})["logits"], expected[""]) < TOL
    for name in NAMES:
        if mode == "load":
            session = Session(path, "cpu", adapter=tmp_path / f"{name}.onnx_adapter", check=True)
            ours = session.run({name_of_input: x})
        else:
            session.load(name, tmp_path / f"{name}.onnx_adapter")
            ours = session.run({name_of_input: x}, name)
        assert rel(ours["logits"], expected[name]) < TOL, name
    if mode == "switch":
        session.load("news", folder / "news")  # PEFT's own folder
        again = session.run({name_of_input: x}, "news")
        assert rel(again["logits"], expected["news"]) < TOL
    assert lora_fx.verify(path)


def test_rows_of_one_batch(case: Any, tmp_path: Path) -> None:
    captured, x, folder, expected = case
    path = tmp_path / "m.onnx"
    adapters = {name: folder / name for name in NAMES}
    report = lora_fx.export(captured, path, adapters=adapters, mode="batch", provider="cpu")
    whole = report.details["whole_tensors"]
    assert {"classifier.weight", "classifier.bias"} <= {*whole}
    assert any("attention" in key for key in whole), "the bias that PEFT trained"
    (name_of_input,) = [spec.name for spec in captured.inputs.specs]
    session = open_session(path, "cpu")
    rows = [2, 0, 1, 3]
    ours = session.run({name_of_input: x, IDS: np.array(rows)})["logits"]
    of_rows = [expected[("", *NAMES)[number]][i] for i, number in enumerate(rows)]
    assert rel(ours, np.stack(of_rows)) < TOL
    assert lora_fx.verify(path)
