"""What insert writes as a .pt2 file, and how it goes on from there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import SequenceClassifierOutput

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.pt2.models import built, net, stirred
from tests.fx.pt2.steps import steps
from tests.zoo.models import ZOO

ROOT = Path(__file__).resolve().parents[3]
WHOLE = ("hf_gpt2", "transformer_encoder", "hf_bert", "tv_resnet18")
SLOW = (pytest.param(n, marks=pytest.mark.slow) for n in WHOLE)
TRAINED = ("hf_gpt2/1", "transformer_encoder/1", *SLOW)


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    model, args = net()
    module = stirred(
        lora_fx.insert(
            model, args, rank=2, dropout=0.25, also_train="out.bias", norm_stats="update"
        )
    )
    path = tmp_path / "x.pt2"
    assert save_program(module, path) == ()
    with pytest.raises(LoraFxError, match="exists"):
        save_program(module, path)
    again = load_program(path)
    assert isinstance(again, AdaptedModule) and type(again).__name__ == "Net"
    mine, other = module.adapter(), again.adapter()
    assert list(mine) == list(other) and dict(mine.metadata) == dict(other.metadata)
    for key in mine:
        a, b = mine.entries[key], other.entries[key]
        for field in ("a", "b", "value"):
            if hasattr(a, field):
                assert np.array_equal(getattr(a, field), getattr(b, field)), key
        assert getattr(a, "layout", None) == getattr(b, "layout", None)
    for training in (False, True):
        outs = []
        for m in (module.train(training), again.train(training)):
            torch.manual_seed(5)
            outs.append(pytree.tree_leaves(m(*args)))
        for a, b in zip(*outs, strict=True):
            assert a is b is None or torch.equal(a, b)
        with module.base(), again.base():
            assert torch.equal(module(*args)["scores"], again(*args)["scores"]) is not training
    assert again.state_dict().keys() == module.state_dict().keys()
    for name, t in module.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in again.named_parameters()}
    assert {k: v for k, v in lora_fx.find(again).to_json().items() if k != "targets"} == {
        k: v for k, v in lora_fx.find(model, args).to_json().items() if k != "targets"
    }
    fresh = lora_fx.insert(model, args, rank=1).adapter()
    again.load_adapter(fresh) if not fresh.full else None
    assert again.updates["fc.weight"].rank == 1


def test_what_lies_in_the_file(tmp_path: Path) -> None:
    trunk = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 3), norm=nn.BatchNorm2d(16)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 100_000))
    model, args = nn.Sequential(OrderedDict(trunk=trunk, head=head)), (torch.randn(2, 3, 8, 9),)
    module = lora_fx.insert(model, args, rank=2, include="*")
    path = tmp_path / "x.pt2"
    save_program(module, path)
    state = module.state_dict()
    size = sum(t.numel() * t.element_size() for t in state.values())
    with zipfile.ZipFile(path) as z:
        names = [n.partition("/")[2] for n in z.namelist()]
        weights = [i for i in z.infolist() if "/data/weights/weight_" in i.filename]
        assert sum(i.file_size for i in weights) == size, "each tensor once"
        assert {n for n in names if n.startswith("models/")} == {
            "models/model.json",
            "models/train.json",
        }
        assert all(not z.getinfo(f"x/{n}").file_size for n in names if "sample_inputs" in n)
        programs = [json.loads(z.read(f"x/models/{n}.json")) for n in ("model", "train")]
        manifest = json.loads(z.read("x/data/extra/lora_fx.json"))
        text = z.read("x/models/model.json").decode()
    assert path.stat().st_size < 1.1 * size
    for p in programs:
        targets = {n["target"] for n in p["graph_module"]["graph"]["nodes"]}
        assert all(t.startswith(("torch.ops.aten.", "_operator.")) for t in targets)
        marks = [
            n
            for n in p["graph_module"]["graph"]["nodes"]
            if "lora_fx" in n["metadata"].get("custom", "")
        ]
        assert len(marks) >= 3 * len(module.updates)
    assert "site-packages" not in text and str(ROOT) not in text
    row = manifest["adapter"]["updates"]["trunk.conv.weight"]
    assert (row["a"], row["rank"], row["scale"]) == ("trunk.conv.lora_A.weight", 2, 2.0)
    assert tuple(row["layout"]["stored"]) == tuple(state["trunk.conv.weight"].shape)
    plain = torch.export.load(str(path)).module()
    assert torch.equal(plain(*args), module.eval()(*args))


class Scored(nn.Module):
    """A loss beside logits, in a class of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 3), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        logits = self.fc(self.drop(x))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def test_outputs_are_plain(tmp_path: Path) -> None:
    kwargs = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 2, 1, 0])}
    module = lora_fx.insert(Scored(), (), kwargs, rank=2)
    save_program(module, tmp_path / "x.pt2")
    out = load_program(tmp_path / "x.pt2")(**kwargs)
    assert type(out) is dict and list(out) == ["loss", "logits"]
    by_torch = torch.export.load(str(tmp_path / "x.pt2")).module()(*kwargs.values())
    assert type(by_torch) is dict and torch.equal(by_torch["logits"], out["logits"])


def test_a_held_adapter_is_heeded(tmp_path: Path) -> None:
    model, args, _ = ZOO["f_linear"].build()
    module = stirred(lora_fx.insert(model, args, rank=2))
    path = tmp_path / "x.pt2"
    save_program(module, path)
    for held in (str(path), path, lora_fx.capture(path), load_program(path)):
        with pytest.raises(LoraFxError, match="holds an adapter already"):
            lora_fx.insert(held)
    want = module.eval()(*args)
    for folded in (lora_fx.fold(path), lora_fx.fold(lora_fx.capture(path))):
        assert torch.allclose(folded(*args), want, atol=1e-6)
    assert torch.equal(lora_fx.capture(path).eval(*args)[0], model(*args)), "capture: without it"
    assert lora_fx.verify(path, module) and not lora_fx.verify(path, lora_fx.capture(model, args))
    other = stirred(lora_fx.insert(model, args, rank=3)).adapter()
    reloaded = load_program(path)
    reloaded.load_adapter(other)
    lora_fx.export(reloaded, tmp_path / "x.onnx", provider="cpu")
    assert lora_fx.verify(
        tmp_path / "x.onnx", lora_fx.insert(model, args, adapter=other), provider="cpu"
    )
    save_program(lora_fx.fold(path), tmp_path / "folded.pt2")
    assert lora_fx.verify(tmp_path / "folded.pt2", module, tol=1e-5)


def test_a_wrong_program_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, _ = ZOO["f_linear"].build()
    module = stirred(lora_fx.insert(model, args, rank=2))
    monkeypatch.setattr(
        "lora_fx.fx.pt2.write.bytes_of", lambda t: bytes(t.untyped_storage().nbytes())
    )
    with pytest.raises(LoraFxError, match="other numbers"):
        save_program(module, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


CHILD = """
import json, socket, sys
for name in ("transformers", "torchvision", "timm", "tests.zoo"):
    sys.modules[name] = None
import torch
import lora_fx
from lora_fx.passes.verbs.program import load_program
from tests.fx.pt2 import steps as pt2_steps
def none(*a, **k):
    raise AssertionError("a socket")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = none
path, = sys.argv[1:]
model = load_program(path)
kwargs = torch.load(path + ".inputs", weights_only=True)
torch.manual_seed(1)
losses = pt2_steps.steps(model, kwargs, 5)
report = lora_fx.export(model, path + ".onnx", provider="cpu")
print(json.dumps({"losses": losses, "ok": bool(report), "keys": list(model.adapter())}))
"""


@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_without_the_source(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket")

    model, kwargs = built(name, dropout=False)
    cap = lora_fx.capture(model, (), kwargs)
    straight = steps(lora_fx.insert(cap, rank=2), kwargs, 10)
    module = lora_fx.insert(cap, rank=2)
    first = steps(module, kwargs, 5)
    path = tmp_path / "x.pt2"
    for what in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, what, refuse)
    save_program(module, path)
    monkeypatch.undo()
    torch.save(kwargs, f"{path}.inputs")
    done = child(path)
    assert done["ok"] and done["keys"] == list(module.adapter())
    assert np.allclose(first + done["losses"], straight, rtol=0, atol=1e-6)
    assert abs(straight[9] - straight[0]) > 1e-5, "the steps move something"


@pytest.mark.parametrize(
    "name",
    [
        "hf_bert/1",
        "transformer_encoder/1",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hf_bert", "transformer_encoder")),
    ],
)
def test_dropout_acts_after_a_reload(name: str, tmp_path: Path) -> None:
    model, kwargs = built(name, dropout=True)
    module = lora_fx.insert(model, (), kwargs, rank=2, dropout=0.2)
    path = tmp_path / "x.pt2"
    save_program(module, path)
    losses = []
    for m in (load_program(path), module):
        torch.manual_seed(1)
        losses.append(steps(m, kwargs, 5))
    first, second = losses
    assert np.allclose(first, second, rtol=0, atol=1e-6)


def child(path: Path) -> Any:
    """Run CHILD where the model's libraries cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
