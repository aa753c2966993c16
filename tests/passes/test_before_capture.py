"""What an adapter alone decides is said before a model is captured, which takes half a minute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import lora_fx
from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Hadamard, Kronecker, Rotation
from lora_fx.cli.group import group
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.onnx import Session
from lora_fx.passes.verbs.export_options import MODES

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("f4")


LORA = LowRank(numbers(2, 4), numbers(6, 2), 3.0)
DORA = LowRank(numbers(2, 4), numbers(6, 2), 3.0, magnitude=np.abs(numbers(6)) + 1)
LOHA = Hadamard(numbers(2, 4), numbers(6, 2), numbers(2, 4), numbers(6, 2), 1.0)
LOKR = Kronecker(numbers(2, 2), numbers(3, 2), 1.0)
OFT = Rotation(0.1 * numbers(2, 2, 2))
HEAD = Full(numbers(3, 6))
ADAPTERS = {
    "LoHa": Adapter({"fc.weight": LOHA}),
    "LoKr": Adapter({"fc.weight": LOKR}),
    "DoRA": Adapter({"fc.weight": DORA}),
    "OFT": Adapter({"fc.weight": OFT}),
    "the whole tensor": Adapter({"fc.weight": LORA, "head.weight": HEAD}),
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc(x)))


X = (torch.ones(3, 4),)


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object, **__: object) -> None:
        pytest.fail("a model was captured")

    monkeypatch.setattr(Captured, "__init__", capture)


REFUSED = [
    *(("LoHa", mode) for mode in ("switch", "load", "batch")),
    *(("LoKr", mode) for mode in MODES),
    *(("OFT", mode) for mode in MODES),
]


@pytest.mark.parametrize(("kind", "mode"), REFUSED)
def test_an_export_is_refused(kind: str, mode: str, no_capture: None, tmp_path: Path) -> None:
    given = {"de": ADAPTERS[kind]}
    adapters = given["de"] if mode == "merged" else given
    with pytest.raises(LoraFxError, match=kind) as caught:
        lora_fx.export(Net(), tmp_path / "m.onnx", X, adapters=adapters, mode=mode)
    assert "lora-fx convert" in caught.value.hint


OPS = {
    "lstm": ("r.weight_ih_l0", numbers(2, 4), numbers(24, 2), "a recurrent layer"),
    "gru": ("r.weight_hh_l0", numbers(2, 4), numbers(18, 2), "a recurrent layer"),
    "einsum": ("w", numbers(3, 2, 4), numbers(3, 5, 2), "a stack of matrices"),
    "grouped_mm": ("w", numbers(3, 2, 4), numbers(3, 5, 2), "a stack of matrices"),
}


@pytest.mark.parametrize("op", OPS)
def test_mode_batch_knows_an_op_that_has_no_rows(op: str, no_capture: None, tmp_path: Path) -> None:
    key, a, b, say = OPS[op]
    adapter = Adapter({"fc.weight": LORA, key: LowRank(a, b, 3.0, origin=Origin(op=op))})
    with pytest.raises(
        LoraFxError, match=f"de: '{key}' is the weight of {say}.* mode batch"
    ) as caught:
        lora_fx.export(Net(), tmp_path / "m.onnx", X, adapters={"de": adapter}, mode="batch")
    module = key.removesuffix(".weight")
    assert f"run lora-fx convert de -o OUT --exclude {module} to leave it out" in caught.value.hint


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.r = torch.nn.Linear(4, 4), torch.nn.GRU(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.r(torch.relu(self.c(x)))[0]


def test_an_adapter_file_tells_a_recurrent_layer(tmp_path: Path) -> None:
    """Beside it a plain layer; the hint's command cures it."""
    net, args = Both(), (torch.ones(2, 3, 4),)
    save_adapter(
        lora_fx.insert(net, args, rank=2, include=["c", "r.weight_ih_l0"]).adapter(),
        tmp_path / "up",
    )
    adapter = lora_fx.load_adapter(tmp_path / "up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captured, "__init__", lambda *_, **__: pytest.fail("a model was captured"))
        with pytest.raises(
            LoraFxError, match=r"'r\.weight_ih_l0' is the weight of a recurrent layer"
        ):
            lora_fx.export(net, tmp_path / "m.onnx", args, adapters={"up": adapter}, mode="batch")
    line = f"convert {tmp_path / 'up'} -o {tmp_path / 'out'} --exclude r.weight_ih_l0"
    assert CliRunner().invoke(group, line.split()).exit_code == 0
    rest = lora_fx.load_adapter(tmp_path / "out")
    lora_fx.export(net, tmp_path / "m.onnx", args, adapters={"up": rest}, mode="batch")


@pytest.mark.parametrize("kind", ["LoKr", "OFT"])
def test_an_insert_is_refused(kind: str, no_capture: None) -> None:
    with pytest.raises(LoraFxError, match=kind):
        lora_fx.insert(Net(), X, adapter=ADAPTERS[kind])


CODE = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 6)), (torch.ones(3, 4),), {}
"""
COMMANDS = {
    "export, missing": ("export net.py:build nope -o m.onnx --mode switch", "nope: no such file"),
    "export, merged, missing": ("export net.py:build nope -o m.onnx", "nope: no such file"),
    "verify, missing": ("verify net.py:build net.py:build --adapter nope", "nope: no such file"),
    "verify, missing B": ("verify net.py:build gone.onnx", "gone.onnx: cannot be read: no such"),
    "verify, missing A": ("verify gone.onnx net.py:build", "gone.onnx: cannot be read: no such"),
    "verify, missing .py": ("verify net.py:build gone.py:build", "gone.py: cannot be read: no"),
    "verify, no adapter": ("verify net.py:build net.py:build --adapter net.py", "net.py: not a"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused(
    name: str, no_capture: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, say = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    done = CliRunner().invoke(group, line.split())
    assert isinstance(done.exception, LoraFxError), done.exception
    assert say in done.exception.message


def test_one_adapter_with_a_head_switches(tmp_path: Path) -> None:
    """The head is the adapter's and not the base's, W + s·B·A by hand beside it."""
    net, path = Net(), tmp_path / "m.onnx"
    before = net.head.weight.detach().clone()
    adapter = ADAPTERS["the whole tensor"]
    report = lora_fx.export(net, path, X, adapters={"de": adapter}, mode="switch")
    assert report.details["whole_tensors"] == ["head.weight"]
    x = numbers(5, 4)
    w, b = (t.detach().double().numpy() for t in (net.fc.weight, net.fc.bias))
    bias = net.head.bias.detach().double().numpy()
    of_base = net.head.weight.detach().double().numpy()
    head = HEAD.value.astype("f8")

    def by_hand(weight: np.ndarray, head: np.ndarray) -> np.ndarray:
        return np.maximum(x.astype("f8") @ weight.T + b, 0) @ head.T + bias

    delta = LORA.scale * LORA.b.astype("f8") @ LORA.a.astype("f8")
    session = Session(path)
    session.load("de", tmp_path / "de.onnx_adapter")
    (base,) = session.run({"x": x}).values()
    (adapted,) = session.run({"x": x}, "de").values()
    assert np.abs(by_hand(w + delta, head) - by_hand(w, of_base)).max() > 0.1
    assert np.allclose(base, by_hand(w, of_base), atol=1e-5)
    assert np.allclose(adapted, by_hand(w + delta, head), atol=1e-5)
    assert torch.equal(net.head.weight, before)
