"""QA-LoRA (use_qalora) with PEFT's own GPTQ layer as the judge: its folders read, ours loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.variant import variant_of
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.io import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(96, 60)
        self.up = nn.Linear(60, 7, bias=False)

    def forward(self, x: Any) -> Any:
        return self.up(self.fc(x))


@pytest.fixture(autouse=True)
def gptq(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFT takes every nn.Linear for one of GPTQ, of which it has the only layer with QA-LoRA."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    def dispatch(target: nn.Module, name: str, config: Any, **more: Any) -> nn.Module | None:
        return GPTQLoraLinear(target, name, config=config, **more) if more and isinstance(
            target, nn.Linear) else None  # fmt: skip

    monkeypatch.setattr(peft.tuners.lora.model, "dispatch_gptq", dispatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_peft(path: Path, **config: Any) -> tuple[Any, Path]:
    """A model of PEFT whose A and B are all drawn, and the folder that PEFT saved it in."""
    torch.manual_seed(0)
    options = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["fc", "up"],
        "use_qalora": True,
        **config,
    }
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(**options)).eval()
    for name, p in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(p)
    model.save_pretrained(str(path))
    return model, path


def effects(model: Any) -> dict[str, Any]:
    """ΔW in fp64: what each of PEFT's layers adds to its base layer on a unit matrix."""
    result = {}
    for name, layer in model.double().base_model.model.named_modules():
        if hasattr(layer, "qalora_group_size"):
            x = torch.eye(layer.in_features, dtype=torch.float64)
            with torch.no_grad():
                result[f"{name}.weight"] = (layer(x) - layer.base_layer(x)).T.numpy()
    return result


@pytest.mark.parametrize(
    "config",
    [
        {"qalora_group_size": 12},
        {"qalora_group_size": 4, "alpha_pattern": {"up": 7}, "rank_pattern": {"fc": 2}},
        {"qalora_group_size": 6, "use_rslora": True},
        {"qalora_group_size": 16, "target_modules": ["fc"]},  # the default
        {"qalora_group_size": 1},
    ],
    ids=str,
)
def test_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    model, path = of_peft(tmp_path / "peft", **config)
    adapter = load_adapter(path)
    want, got = effects(model), adapter.deltas()
    assert set(got) == set(want) and len(want) == len(config.get("target_modules", "12"))
    for key, delta in want.items():
        assert np.abs(delta).max() > 1e-2 and delta.shape[0] != delta.shape[1]
        assert np.abs(got[key] - delta).max() <= 1e-12 * np.abs(delta).max()
    save_adapter(adapter, tmp_path / "ours")
    one, two = (
        read_tensors(tmp_path / n / "adapter_model.safetensors")[0] for n in ("peft", "ours")
    )
    assert {k: (v.shape, v.tobytes()) for k, v in one.items()} == {
        k: (v.shape, v.tobytes()) for k, v in two.items()
    }
    first, second = (json.loads((tmp_path / n / "adapter_config.json").read_text())
                     for n in ("peft", "ours"))  # fmt: skip
    for field in ("r", "lora_alpha", "use_qalora", "qalora_group_size", "use_rslora"):
        assert second[field] == first[field] or config.get("rank_pattern"), field
    again = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "ours"))
    for key, delta in effects(again).items():
        assert np.abs(want[key] - delta).max() <= 1e-12 * np.abs(delta).max()


def test_group_size_left_out_is_peft_s_default(tmp_path: Path) -> None:
    _, path = of_peft(tmp_path / "peft", target_modules=["fc"])
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("qalora_group_size") == 16
    file.write_text(json.dumps(config))
    assert variant_of(load_adapter(path).lowrank["fc.weight"]).constant_over == 16


def test_bound_and_saved_and_in_other_formats(tmp_path: Path) -> None:
    _, path = of_peft(tmp_path / "peft", qalora_group_size=12)
    adapter = load_adapter(path)
    want = adapter.deltas()
    bound = adapter.bind(Tiny().eval(), (torch.zeros(2, 96),))
    save_adapter(bound, tmp_path / "bound")
    assert variant_of(load_adapter(tmp_path / "bound").lowrank["fc.weight"]).constant_over == 12
    one, two = (
        read_tensors(tmp_path / n / "adapter_model.safetensors")[0] for n in ("peft", "bound")
    )
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}
    save_adapter(adapter, tmp_path / "k.safetensors", format="kohya")
    for key, delta in load_adapter(tmp_path / "k.safetensors").resolved(want).deltas().items():
        assert np.abs(delta - want[key]).max() <= 1e-6 * np.abs(delta).max()


def test_what_no_flag_says_is_plain_lora(tmp_path: Path) -> None:
    """One update of two without groups, or an a that left them: the same change, and a note."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    low = grouped(LowRank(draw(2, 8), draw(60, 2), 3.0), 12)
    plain = LowRank(draw(2, 60), draw(7, 2), 3.0)
    off = low.a.copy()
    off[0, 5] += 1
    for entries in ({"fc.weight": low, "up.weight": plain}, {"fc.weight": replace(low, a=off)}):
        save_adapter(Adapter(entries), tmp_path / "out", force=True)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert not config.get("use_qalora")
        again = load_adapter(tmp_path / "out")
        for key, delta in Adapter(entries).deltas().items():
            assert np.abs(again.deltas()[key] - delta).max() <= 1e-12 * np.abs(delta).max()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("qalora_group_size", 0, "qalora_group_size is 0"),
        ("qalora_group_size", "16", "qalora_group_size is '16'"),
        ("qalora_group_size", True, "qalora_group_size is True"),
        ("use_qalora", 3, "use_qalora is 3; expected true or false"),
        ("use_dora", True, "use_qalora and use_dora; expected"),
        ("use_bdlora", {"nblocks": 2}, "use_qalora and use_bdlora; expected"),
        ("init_lora_weights", "pissa", "use_qalora and pissa; expected"),
    ],
)
def test_refused(field: str, value: Any, words: str, tmp_path: Path) -> None:
    _, path = of_peft(tmp_path / "peft", target_modules=["fc"])
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(LoraFxError) as caught:
        load_adapter(path)
    assert words in caught.value.message and caught.value.exit_code == 2


def test_a_model_of_another_width(tmp_path: Path) -> None:
    """PEFT ignores the flag beside float layers, whose A has all inputs: that does not fit."""
    _, path = of_peft(tmp_path / "peft", target_modules=["fc"])
    model = nn.Sequential()
    model.fc = nn.Linear(6, 60)
    with pytest.raises(LoraFxError, match=r"A \[3, 96\] and B \[60, 3\]"):
        lora_fx.insert(model.eval(), (torch.zeros(2, 6),), adapter=path)
