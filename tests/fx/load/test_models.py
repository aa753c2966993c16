"""load_model: timm and torchvision, weights, and the forms that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.load.loaded_model import LoadedModel
from lora_fx.fx.load.models import load_model
from tests.fx.load.loading import block_network, found, net, refused


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("timm:resnet10t", (2, 3, 176, 176)), ("torchvision:squeezenet1_1", (2, 3, 224, 224))],
)
def test_reserved_names_have_random_weights(spec: str, shape: tuple[int, ...]) -> None:
    loaded, again = load_model(spec), load_model(spec)
    assert loaded.notes == (
        f"random weights: {spec} was built without weights; pass them with "
        "--weights FILE.safetensors",
    )
    assert loaded.args[0].shape == shape and torch.equal(loaded.args[0], again.args[0])
    pairs = zip(loaded.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    light = load_model(spec, meta=True)
    assert light.notes == () and all(p.is_meta for p in light.module.parameters())
    assert found(light).targets


def test_constructors_that_read_values_are_built_for_real() -> None:
    module = load_model("torchvision:regnet_x_400mf", meta=True).module
    assert not any(p.is_meta for p in module.parameters())


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timm:resnet81", "did you mean"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no model"),
        ("torchvision:resnet81", "did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", "detection models"),
    ],
)
def test_reserved_names_that_are_refused(spec: str, text: str) -> None:
    refused(spec, text)


# --- weights -------------------------------------------------------------------------------------

TIED = """
import torch
from torch import nn
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight
    def forward(self, ids):
        return self.head(self.norm(self.table(ids)))
def make():
    return Tied(), (torch.tensor([1, 2]),)
"""


def test_weights_are_strict(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(TIED)
    spec, file = f"{tmp_path}/tied.py:make", tmp_path / "w.safetensors"
    state = {n: t.clone() for n, t in load_model(spec).module.state_dict().items()}
    state["table.weight"] = state["head.weight"] = torch.arange(21.0).reshape(7, 3)

    def load(changes: dict[str, torch.Tensor | None]) -> LoadedModel:
        new = {n: t for n, t in (state | changes).items() if t is not None}
        save_file({n: t.clone() for n, t in new.items()}, file)
        return load_model(spec, weights=file)

    one_name: dict[str, torch.Tensor | None] = {
        "table.weight": None,
        "norm.num_batches_tracked": None,
    }
    no_change: dict[str, torch.Tensor | None] = {}
    for names in (no_change, one_name):
        loaded = load(names)
        assert loaded.notes == ()
        assert torch.equal(net(loaded).table.weight, state["table.weight"])
        assert net(loaded).head.weight is net(loaded).table.weight
    assert load({"norm.bias": torch.ones(3).half()}).notes == (
        f"{file}: cast from float16 to float32: norm.bias",
    )
    misfits: tuple[tuple[dict[str, torch.Tensor | None], str], ...] = (
        ({"norm.bias": None}, "1 missing: norm.bias"),
        ({"norm.extra": torch.ones(2)}, "1 unexpected: norm.extra"),
        ({"norm.bias": torch.ones(4)}, "norm.bias [4] (expected [3])"),
        ({"norm.bias": torch.ones(3).int()}, "norm.bias int32 (expected float32)"),
        ({"head.weight": torch.ones(7, 3)}, "the model has one tensor for both"),
    )
    for changes, text in misfits:
        with pytest.raises(LoraFxError, match=r"w\.safetensors") as caught:
            load(changes)
        assert text in caught.value.message
    pickle = tmp_path / "w.bin"
    torch.save({k: v for k, v in net(load_model(spec)).state_dict().items()}, pickle)
    refused(spec, "w.bin: a PyTorch pickle", "trust=True", weights=pickle)
    load_model(spec, weights=pickle, trust=True)
    refused(spec, "gone.safetensors: cannot be read", weights=tmp_path / "gone.safetensors")


def test_reserved_name_with_weights(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet10t", pretrained=False)
    nn.init.constant_(model.fc.weight, 2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors")
    assert loaded.notes == () and net(loaded).fc.weight[0, 0].item() == 2
    light = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors", meta=True)
    assert net(light).fc.weight.is_meta


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("model.pt2", "a program, not a torch module"),
        ("model.onnx", "an .onnx file cannot be opened as a torch model"),
        ("w.safetensors", "load_model(MODEL, weights='w.safetensors')"),
        ("pytorch_model.bin", "load_model(MODEL, weights='pytorch_model.bin')"),
        ("meta-llama/Llama-3.1-8B", "hf:meta-llama/Llama-3.1-8B"),
        ("nothing", "pass a Hugging Face folder"),
        ("", "pass a Hugging Face folder"),
    ],
)
def test_forms_that_are_refused(
    spec: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(spec, text)


def test_devices_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(TIED)
    spec = f"{tmp_path}/tied.py:make"
    refused(spec, "device 'nope'", device="nope")
    if not torch.cuda.is_available():
        refused(spec, "device 'cuda'", device="cuda")
    assert load_model(spec, device="cpu").args[0].device.type == "cpu"


def test_every_verb_takes_a_model_by_its_name(tmp_path: Path) -> None:
    import torch

    import lora_fx

    (tmp_path / "m.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(6, 4)).eval(), (torch.randn(3, 6),)\n"
    )
    spec = f"{tmp_path / 'm.py'}:build"
    assert [t.key for t in lora_fx.find(spec).targets] == ["0.weight"]
    model = lora_fx.insert(spec, rank=2)
    adapter = model.adapter().bind(spec)
    folded = lora_fx.fold(spec, adapter=adapter)
    x = torch.randn(5, 6)
    assert torch.equal(folded(x), model(x))
    assert lora_fx.export(spec, tmp_path / "m.onnx", adapters=adapter, provider="cpu")
