"""The probes of a training step and of the forward beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import lora_fx
from lora_fx.checkpoint.verify import lines
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import save_for
from lora_fx.onnx import TrainSession
from lora_fx.onnx.probe_runs import probe_of
from tests.probe.nets import IDS, SPOILT, adapter, net, verdicts


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step from a trained adapter, whose weights lie in a file of their own."""
    folder = tmp_path_factory.mktemp("exported")
    lora_fx.export(net(), folder / "m.onnx", (IDS,), mode=lora_fx.TrainStep(), adapters=adapter(1))
    return folder


@pytest.fixture
def file(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy")) / "m.onnx"


def test_the_loss_is_that_of_torch(file: Path) -> None:
    probe = probe_of(file)
    assert probe.mode == "train" and not probe.adapters and probe.points == (("loss", 0),)
    assert probe.outputs["loss"].shape == ()
    feeds = probe.feeds()
    module = lora_fx.insert(net(), (IDS,), adapter=adapter(1))
    logits = module(torch.from_numpy(feeds["ids"]))
    labels = torch.from_numpy(feeds["labels"])
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten()).item()
    assert probe.base is not None and probe.base[0] == pytest.approx(loss, rel=1e-6)


def test_the_files_are_right_and_the_report_has_the_probe(tmp_path: Path) -> None:
    report = lora_fx.export(
        net(), tmp_path / "m.onnx", (IDS,), mode=lora_fx.TrainStep(), adapters=adapter(1)
    )
    assert report.details["probe"] == {
        "bytes": probe_of(tmp_path / "m.onnx").size, "effects": {}, "groups": {},
    }  # fmt: skip
    step = lora_fx.verify(tmp_path / "m.onnx")
    assert step.ok and "step: its loss is what it was" in lines(step)
    assert verdicts(lora_fx.verify(tmp_path / "m.switch.onnx")) == {"": "right", "m": "right"}


@pytest.mark.parametrize("case", SPOILT)
def test_another_start_is_found(case: str, file: Path) -> None:
    spoil, expected = SPOILT[case]
    forward = file.with_name("m.switch.onnx")
    start = file.with_name("m.onnx_adapter")
    save_for(str(forward), spoil(adapter(1)), start, "onnx_adapter", force=True)
    of_forward = {"another adapter": "differs"}.get(case, expected)  # it knows no other adapter
    assert verdicts(lora_fx.verify(forward)) == {"": "right", "m": of_forward}
    if case == "a rank less":
        with pytest.raises(LoraFxError, match="has rank 2; expected 3"):
            lora_fx.verify(file)
        return
    step = lora_fx.verify(file)
    of_step = {"right": "right", "not finite": "not finite"}.get(expected, "differs")
    assert verdicts(step) == {"": of_step} and step.ok is (of_step == "right")
    if of_step == "differs":
        assert "which of these cannot be told" in lines(step)


@pytest.mark.parametrize(("change", "expected"), [(1.01, "differs"), (np.nan, "not finite")])
def test_another_base_is_found(change: float, expected: str, file: Path) -> None:
    changed = 0
    for name in ("m.onnx", "m.switch.onnx"):
        model = onnx.load(file.with_name(name))
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.shape == (12, 12):
                other = numpy_helper.from_array(array * np.float32(change), tensor.name)
                tensor.CopyFrom(other)
                changed += 1
        onnx.save(model, file.with_name(name))
    assert changed == 2
    assert verdicts(lora_fx.verify(file)) == {"": expected}
    found = verdicts(lora_fx.verify(file.with_name("m.switch.onnx")))
    # a base so near to the first is within what products in bfloat16 make of it
    assert found == ({"": expected, "m": expected} if expected == "not finite" else found)
    assert found[""] != "right" and found["m"] != "right"


def test_a_new_adapter_is_no_adapter_of_the_forward(tmp_path: Path) -> None:
    lora_fx.export(net(), tmp_path / "m.onnx", (IDS,), mode=lora_fx.TrainStep())
    assert verdicts(lora_fx.verify(tmp_path / "m.onnx")) == {"": "right"}
    assert verdicts(lora_fx.verify(tmp_path / "m.switch.onnx")) == {"": "right"}


def test_probes_stand_where_the_data_is_a_file_of_its_own(file: Path) -> None:
    assert file.with_name("m.onnx.data").exists()
    assert lora_fx.verify(file) and lora_fx.verify(file.with_name("m.switch.onnx"))
    before = probe_of(file)
    TrainSession(file).step(before.feeds())
    assert lora_fx.verify(file), "a step writes nothing into the file"


def test_without_a_start_there_is_no_step(file: Path) -> None:
    file.with_name("m.onnx_adapter").unlink()
    with pytest.raises(LoraFxError, match="there is no adapter to start from"):
        lora_fx.verify(file)


class Sigmoid(nn.Module):
    """Probabilities, and numbers as inputs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 18), nn.Linear(18, 12)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.b(self.drop(torch.tanh(self.a(x)))))


LOSSES: dict[str, Any] = {
    "mse": "mse",
    "of probabilities": lambda output, labels: F.binary_cross_entropy(output, labels),
    "classes": "ce",
}


@pytest.mark.parametrize(
    ("loss", "dropout"), [("mse", 0.0), ("of probabilities", 0.0), ("classes", 0.5)]
)
def test_labels_are_those_that_the_loss_takes(loss: str, dropout: float, tmp_path: Path) -> None:
    mode = lora_fx.TrainStep(loss=LOSSES[loss])
    lora_fx.export(Sigmoid(dropout), tmp_path / "m.onnx", (torch.ones(2, 16),), mode=mode)
    probe = probe_of(tmp_path / "m.onnx")
    assert probe.inputs["labels"].values is not None and probe.inputs["x"].seed is not None
    assert lora_fx.verify(tmp_path / "m.onnx")


def test_none_writes_none(tmp_path: Path) -> None:
    lora_fx.export(net(), tmp_path / "m.onnx", (IDS,), mode=lora_fx.TrainStep(), probe="none")
    for name in ("m.onnx", "m.switch.onnx"):
        with pytest.raises(LoraFxError, match="it has no probe"):
            lora_fx.verify(tmp_path / name)


HOSTILE: dict[str, Callable[[str], str]] = {
    "no labels": lambda text: text.replace('"labels"', '"label\\u001b"'),
    "labels out of range": lambda text: text.replace("-100", "4000000000"),
    "other sizes": lambda text: text.replace('"shape": [2, 5]', '"shape": [5, 2]', 1),
    "another mode": lambda text: text.replace('"mode": "train"', '"mode": "switch"'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_probe_is_refused_or_fails(case: str, file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "lora_fx.probe":
            assert HOSTILE[case](entry.value) != entry.value
            entry.value = HOSTILE[case](entry.value)
    file.write_bytes(model.SerializeToString())
    try:
        assert not lora_fx.verify(file)
    except LoraFxError as e:
        assert "\x1b" not in str(e)
