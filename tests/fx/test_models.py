"""load_model: folders, factories, timm and torchvision, weights; and what is refused."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture import capture
from lora_fx.fx.models import LoadedModel, load_model
from lora_fx.passes.find import find
from lora_fx.target import Found

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SMALL: dict[str, Any] = {"vocab_size": 61}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def bert(**more: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, num_labels=10, **{**SMALL, **more},
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2,
                   **SMALL)
    )  # fmt: skip


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                  image_size=[16, 24], patch_size=8, num_channels=1)
    )  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4,
                 relative_attention_num_buckets=8, **SMALL)
    )  # fmt: skip


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(num_mel_bins=8, d_model=24, encoder_layers=1, decoder_layers=1,
                      encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=40,
                      decoder_ffn_dim=40, max_source_positions=6, max_target_positions=16,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                      **SMALL)
    )  # fmt: skip


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def found(loaded: LoadedModel) -> Found:
    return find(capture(loaded.module, loaded.args, loaded.kwargs).fx_graph())


def refused(spec: str | Path, *texts: str, **options: Any) -> LoraFxError:
    with pytest.raises(LoraFxError) as caught:
        load_model(spec, **options)
    error = caught.value
    assert error.exit_code == 2 and "\n" not in error.message and error.hint
    for text in texts:
        assert text in str(error)
    return error


# --- Hugging Face folders ------------------------------------------------------------------------

IDS = {"input_ids": (2, 5), "attention_mask": (2, 5)}
FOLDERS: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, ...]], int]] = {
    "bert": (bert, IDS, 17),
    "gpt2": (gpt2, IDS, 10),
    "vit": (vit, {"pixel_values": (2, 1, 16, 24)}, 14),
    "t5": (t5, IDS | {"decoder_input_ids": (2, 5)}, 35),
    "whisper": (whisper, {"input_features": (2, 8, 12), "decoder_input_ids": (2, 5)}, 20),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, shapes, targets = FOLDERS[name]
    model = make().eval()
    saved(model, tmp_path)
    capfd.readouterr()
    loaded = load_model(tmp_path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "") and loaded.notes == () and loaded.origin == str(tmp_path)
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == shapes
    assert not loaded.module.training and loaded.tokenizer_folder is None
    state = loaded.module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert len(found(loaded).targets) == targets
    again = load_model(str(tmp_path), meta=True)
    assert all(p.is_meta for p in again.module.parameters())
    assert [t.key for t in found(again).targets] == [t.key for t in found(loaded).targets]
    assert all(torch.equal(v, loaded.kwargs[k]) for k, v in again.kwargs.items())


def test_folder_dtype_shards_and_tokenizer(tmp_path: Path) -> None:
    bert().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer_folder == tmp_path
    edit(tmp_path, dtype=None, torch_dtype=None)
    assert next(load_model(tmp_path).module.parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path, meta=True).module.parameters()).dtype == torch.bfloat16


def test_folder_without_architectures_is_the_plain_model(tmp_path: Path) -> None:
    edit(saved(bert(), tmp_path), architectures=None)
    loaded = load_model(tmp_path)
    assert type(loaded.module).__name__ == "BertModel"
    assert any("unused" in n and "classifier.weight" in n for n in loaded.notes)


def test_missing_tensors_are_said_and_the_same_each_time(tmp_path: Path) -> None:
    model = bert()
    saved(model, tmp_path)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    before = torch.random.get_rng_state()
    one, two = load_model(tmp_path), load_model(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    note = f"random weights: 2 tensors are not in {tmp_path}: classifier.bias, classifier.weight"
    assert one.notes == (note,)
    assert torch.equal(one.module.classifier.weight, two.module.classifier.weight)  # type: ignore[union-attr,arg-type]
    save_file({"classifier.bias": torch.zeros(10)}, tmp_path / "model.safetensors")
    refused(tmp_path, "does not fit BertForSequenceClassification", "are missing")


def test_causal_classifier_gets_a_padding_token(tmp_path: Path) -> None:
    from transformers import GPT2ForSequenceClassification

    saved(GPT2ForSequenceClassification(gpt2().config), tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.notes == ("config.json has no pad_token_id: 2 is taken",)
    assert found(loaded).targets


@pytest.mark.parametrize("meta", [False, True])
def test_unknown_architecture(meta: bool, tmp_path: Path) -> None:
    edit(saved(bert(), tmp_path), architectures=["NopeForNothing"])
    refused(tmp_path, "'NopeForNothing'", "unknown to transformers", "FACTORY", meta=meta)
    edit(tmp_path, architectures=["pipeline"])
    refused(tmp_path, "'pipeline'", meta=meta)
    edit(tmp_path, model_type="nope", architectures=["NopeForNothing"])
    edit(tmp_path, auto_map={"AutoConfig": "configuration_nope.NopeConfig"})
    (tmp_path / "configuration_nope.py").write_text("raise SystemExit('was run')")
    refused(tmp_path, "(model_type 'nope')", "auto_map", "never run", meta=meta)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    code = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    edit(saved(bert(), tmp_path), auto_map=code, attn_implementation="someone/kernel")
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    notes = load_model(tmp_path).notes
    assert any("auto_map" in n and "BertForSequenceClassification is used" in n for n in notes)
    assert any("'someone/kernel' is ignored" in n for n in notes)


def test_an_adapter_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    saved(bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert load_model(tmp_path).notes == ()
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "an adapter, not a model")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    saved(bert(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(LFS)
    refused(tmp_path, "model.safetensors", "git-LFS")
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    refused(tmp_path, "cut off")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "convert it to safetensors")
    assert load_model(tmp_path, meta=True).notes == ()
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "no .safetensors file")
    edit(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tmp_path, "quantised weights (gptq)")
    edit(tmp_path, quantization_config=None, vocab_size="many")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_bytes(LFS)
    refused(tmp_path, "config.json", "git-LFS")


def test_folder_whose_shapes_differ(tmp_path: Path) -> None:
    edit(saved(bert(), tmp_path), vocab_size=62)
    refused(tmp_path, "'bert.embeddings.word_embeddings.weight' is [61, 24], expected [62, 24]")


def test_folder_with_other_weights(tmp_path: Path) -> None:
    model = bert()
    saved(model, tmp_path / "m")
    with torch.no_grad():
        model.classifier.weight.fill_(3)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    loaded = load_model(tmp_path / "m", weights=str(file))
    assert float(loaded.module.classifier.weight[0, 0]) == 3  # type: ignore[union-attr,index,arg-type]
    state = model.state_dict()
    del state["classifier.weight"]
    save_file(state, file)
    refused(tmp_path / "m", "1 of its tensors are missing: classifier.weight", weights=file)


def test_transformers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(tmp_path, "cannot be imported").hint == "pip install 'lora-fx[hf]'"


# --- factories -----------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 4)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, *, scale=1.0):
        return self.drop(self.fc(x)) * scale

def make():
    return Net(), (torch.randn(2, WIDTH),), {"scale": 2.0}
def pair():
    return Net(), (torch.randn(2, WIDTH),)
def tensor():
    return Net(), torch.randn(2, WIDTH)
def bare():
    return Net()
def no_model():
    return "model", (1,)
def bad_kwargs():
    return Net(), (), [1]
def fails():
    return Net(), (torch.randn(2, 3) @ torch.randn(2, 3),)
def quits():
    raise SystemExit(3)
net = Net()
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path / "nets.py"


@pytest.mark.parametrize("where", ["nets", "nets.py"])
@pytest.mark.parametrize("name", ["make", "pair", "tensor"])
def test_factory(where: str, name: str, code: Path) -> None:
    path = list(sys.path)
    loaded = load_model(f"{where}:{name}")
    assert sys.path == path and loaded.notes == () and not loaded.module.training
    assert loaded.kwargs == ({"scale": 2.0} if name == "make" else {})
    assert [t.key for t in found(loaded).targets] == ["fc.weight"]
    again = load_model(f"{code}:{name}")
    assert torch.equal(again.module.fc.weight, loaded.module.fc.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(again.args[0], loaded.args[0])


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("nets.py:bare", ["returned no example inputs", "(model, (torch.randn(2, 3),), {})"]),
        ("nets.py:no_model", ["returned (str, tuple)"]),
        ("nets.py:bad_kwargs", ["returned (Net, tuple, list)"]),
        ("nets.py:net", ["is a Net, not a factory"]),
        ("nets.py:WIDTH", ["is a int, not a factory"]),
        ("nets.py:mkae", ["nets.py has no 'mkae'", "make"]),
        ("nets.py:fails", ["nets.py:fails failed at", "nets.py:28: RuntimeError"]),
        ("nets.py:quits", ["nets.py:30: SystemExit: 3"]),
        ("nets.py", ["which factory?", "nets.py:FACTORY"]),
        ("gone.py:make", ["gone.py: no such file"]),
        ("nowhere.nets:make", ["nowhere.nets failed", "No module named 'nowhere'", "run from"]),
        ("bad name:make", ["names no factory"]),
        ("nets:", ["names no factory"]),
    ],
)
def test_factories_that_fail(spec: str, texts: list[str], code: Path) -> None:
    refused(spec, *texts)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("import torch\ndef f(:\n", "broken.py:2: SyntaxError"),
        ("\n\nimport not_installed_here\n", "broken.py:3: ModuleNotFoundError"),
        ("import json\njson.loads('{')\n", "broken.py:2: JSONDecodeError"),
    ],
)
def test_file_that_cannot_be_imported(text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    refused(f"{tmp_path}/broken.py:make", where)
    assert "lora_fx_user_broken" not in sys.modules


# --- timm and torchvision ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("timm:resnet10t", (2, 3, 176, 176)), ("torchvision:squeezenet1_1", (2, 3, 224, 224))],
)
def test_reserved_names_have_random_weights(spec: str, shape: tuple[int, ...]) -> None:
    loaded, again = load_model(spec), load_model(spec)
    assert loaded.notes == (
        f"random weights: {spec} was built without weights (--weights FILE.safetensors)",
    )
    assert loaded.args[0].shape == shape and torch.equal(loaded.args[0], again.args[0])
    pairs = zip(loaded.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    light = load_model(spec, meta=True)
    assert light.notes == () and all(p.is_meta for p in light.module.parameters())
    assert [t.key for t in found(light).targets] == [t.key for t in found(loaded).targets]


def test_constructors_that_read_values_are_built_for_real() -> None:
    assert found(load_model("timm:convnext_atto", meta=True)).targets


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timm:resnet81", "nearest names"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no model"),
        ("torchvision:resnet81", "nearest names"),
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
    for changes in ({}, one_name):
        loaded = load(changes)
        assert loaded.notes == ()
        assert torch.equal(loaded.module.table.weight, state["table.weight"])  # type: ignore[union-attr,arg-type]
        assert loaded.module.head.weight is loaded.module.table.weight  # type: ignore[union-attr]
    assert load({"norm.bias": torch.ones(3).half()}).notes == (
        f"{file}: cast from float16 to float32: norm.bias",
    )
    for changes, text in (
        ({"norm.bias": None}, "1 missing: norm.bias"),
        ({"norm.extra": torch.ones(2)}, "1 unexpected: norm.extra"),
        ({"norm.bias": torch.ones(4)}, "norm.bias [4] (expected [3])"),
        ({"norm.bias": torch.ones(3).int()}, "norm.bias int32 (expected float32)"),
        ({"head.weight": torch.ones(7, 3)}, "are one tensor of the model"),
    ):
        with pytest.raises(LoraFxError, match="w.safetensors") as caught:
            load(changes)
        assert text in caught.value.message
    refused(spec, "w.bin: a pickle", weights=tmp_path / "w.bin")
    refused(spec, "gone.safetensors: cannot be read", weights=tmp_path / "gone.safetensors")


def test_reserved_name_with_weights(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet10t", pretrained=False)
    nn.init.constant_(model.fc.weight, 2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors")
    assert loaded.notes == () and float(loaded.module.fc.weight[0, 0]) == 2  # type: ignore[union-attr,index,arg-type]
    light = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors", meta=True)
    assert light.module.fc.weight.is_meta  # type: ignore[union-attr]


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("model.pt2", "in this version"),
        ("model.onnx", "in this version"),
        ("w.safetensors", "MODEL --weights w.safetensors"),
        ("pytorch_model.bin", "pickle"),
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B"),
        ("nothing", "MODEL is a Hugging Face folder"),
        ("", "MODEL is a Hugging Face folder"),
    ],
)
def test_forms_that_are_refused(
    spec: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(spec, text)


def test_trust_and_devices_are_refused_by_name(code: Path) -> None:
    refused("nets:make", "--trust is not supported yet", trust=True)
    refused("nets:make", "device 'nope'", device="nope")
    if not torch.cuda.is_available():
        refused("nets:make", "device 'cuda'", device="cuda")
    assert load_model("nets:make", device="cpu").args[0].device.type == "cpu"
