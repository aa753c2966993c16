"""An adapter knows its base: verified, refused, or said to be unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.base_fingerprint import ENDS, compared, sample_of
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import Tensors
from lora_fx.files.tensor_files import write_tensors
from lora_fx.fx.quantised_parameters import forms, numbers


def same_base(recorded: Any, held: Tensors) -> tuple[bool | None, str]:
    return compared(recorded, lambda name, dtype: sample_of(name, held.get(name), dtype))


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(96, 112)  # more than both ends
        self.down = nn.Linear(112, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


X = torch.ones(2, 96)


def saved(model: nn.Module, path: Path, dtype: Any = np.float32) -> Path:
    state = {k: v.float().numpy().astype(dtype) for k, v in model.state_dict().items()}
    write_tensors(path, state, {"format": "pt"})
    return path


def trained(model: nn.Module, *, live: bool = False) -> Adapter:
    """An adapter that has moved."""
    x = X.to(next(model.parameters()).dtype)
    adapted = (lora_fx.attach if live else lora_fx.insert)(model, (x,), rank=2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    adapter: Adapter = adapted.adapter()
    return adapter


@pytest.mark.parametrize("live", [False, True], ids=["insert", "attach"])
def test_its_own_base_and_another(live: bool, tmp_path: Path) -> None:
    lora_fx.save_adapter(trained(Net(), live=live), tmp_path / "adapter")
    own = saved(Net(), tmp_path / "own.safetensors")
    report = lora_fx.merge(own, tmp_path / "adapter", tmp_path / "m.safetensors")
    assert report.details["base_verified"] is True
    assert not any("verified" in w for w in report.warnings)
    other = saved(Net(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(LoraFxError, match=r"trained on other weights.*other\.safetensors"):
        lora_fx.merge(other, tmp_path / "adapter", tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()
    report = lora_fx.merge(other, tmp_path / "adapter", tmp_path / "n.safetensors", any_base=True)
    assert report.details["base_verified"] is False
    assert any("other weights" in w for w in report.warnings)
    said = {
        f["check"]: f["severity"]
        for f in lora_fx.doctor(other, tmp_path / "adapter").details["findings"]
    }
    assert said["base"] == "error"
    assert lora_fx.doctor(own, tmp_path / "adapter")


def test_a_bf16_file_loaded_as_fp32_and_the_reverse(tmp_path: Path) -> None:
    model = Net().bfloat16().float()  # as from_pretrained(dtype=float32) gives it
    file = saved(model, tmp_path / "b.safetensors", ml_dtypes.bfloat16)
    report = lora_fx.merge(file, trained(model), tmp_path / "m.safetensors")
    assert report.details["base_verified"] is True
    half = trained(Net().bfloat16())
    assert half.metadata["base"]["dtype"] == "bfloat16"
    wide = saved(Net(), tmp_path / "w.safetensors")
    assert lora_fx.merge(wide, half, tmp_path / "n.safetensors").details["base_verified"] is True


def test_a_change_at_either_end_is_seen(tmp_path: Path) -> None:
    adapter = trained(Net())
    for at, seen in ((0, True), (ENDS - 1, True), (ENDS, False), (-ENDS, True), (-1, True)):
        model = Net()
        with torch.no_grad():
            model.up.weight.view(-1)[at] += 1
        file = saved(model, tmp_path / f"{at}.safetensors")
        assert same_base(adapter.metadata["base"], tensors(file))[0] is not seen


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    own = saved(Net(), tmp_path / "own.safetensors")
    adapter = trained(Net())
    for change in (None, {"version": 2}, {"dtype": "int8"}, "x"):
        metadata: dict[str, Any] = dict(adapter.metadata)
        base = metadata.pop("base")
        if change is not None:
            metadata["base"] = {**base, **change} if isinstance(change, dict) else change
        out = tmp_path / "m.safetensors"
        report = lora_fx.merge(own, Adapter(adapter.entries, metadata), out, force=True)
        assert report.details["base_verified"] is False
        assert any("not verified" in w for w in report.warnings)
    lacks = {"up.weight": tensors(own)["up.weight"]}
    said = "the checkpoint has no tensor 'down.weight'"
    assert same_base(adapter.metadata["base"], lacks) == (None, said)


def test_what_becomes_of_an_adapter_keeps_its_base(tmp_path: Path) -> None:
    own, other = (saved(Net(seed=i), tmp_path / f"{i}.safetensors") for i in range(2))
    adapter = trained(Net())
    part = Adapter({"up.weight": adapter.entries["up.weight"]}, adapter.metadata)
    lora_fx.save_adapter(part, tmp_path / "part")
    assert lora_fx.merge(own, tmp_path / "part", tmp_path / "m.safetensors").details[
        "base_verified"
    ]
    with pytest.raises(LoraFxError, match="other weights"):
        lora_fx.merge(other, tmp_path / "part", tmp_path / "n.safetensors")


def test_extract_knows_its_base(tmp_path: Path) -> None:
    own, other = (saved(Net(seed=i), tmp_path / f"{i}.safetensors") for i in range(2))
    adapter = lora_fx.extract(own, other, rank=3)
    assert lora_fx.merge(own, adapter, tmp_path / "m.safetensors").details["base_verified"]
    with pytest.raises(LoraFxError, match="other weights"):
        lora_fx.merge(other, adapter, tmp_path / "n.safetensors")


def test_a_second_merge_is_not_refused(tmp_path: Path) -> None:
    """The base of the second is the output of the first: other weights, for a known reason."""
    first, second = trained(Net()), trained(Net())
    second = Adapter(
        {k: v for k, v in second.entries.items() if k.startswith("up")}, second.metadata
    )
    own = saved(Net(), tmp_path / "own.safetensors")
    lora_fx.merge(own, first, tmp_path / "m.safetensors")
    report = lora_fx.merge(tmp_path / "m.safetensors", second, tmp_path / "n.safetensors")
    assert any("into which other adapters were merged" in w for w in report.warnings)


def test_programs_keep_it(tmp_path: Path) -> None:
    from lora_fx.passes.verbs.open import load_program
    from lora_fx.passes.verbs.program import save_program

    module = lora_fx.insert(Net(), (X,), rank=2)
    save_program(module, tmp_path / "x.pt2")
    again = load_program(tmp_path / "x.pt2").adapter()
    assert again.metadata["base"] == module.adapter().metadata["base"]


# --- on a model ----------------------------------------------------------------------------------


def base_notes(model: Any) -> list[str]:
    return [n for n in model.report().notes if "other weights" in n or "not verified" in n]


@pytest.mark.parametrize("live", [False, True], ids=["insert", "attach"])
def test_a_model_says_that_it_is_another_base(live: bool) -> None:
    put = lora_fx.attach if live else lora_fx.insert
    adapter = trained(Net())
    assert base_notes(put(Net(), (X,), adapter=adapter)) == []
    other = put(Net(seed=1), (X,), adapter=adapter)
    (note,) = base_notes(other)
    assert "the adapter was trained on other weights" in note and "2 tensors" in note
    other.load_adapter(trained(Net(seed=1)))
    assert base_notes(other) == []
    other.load_adapter(adapter)
    assert base_notes(other) == [note]
    other.load_adapter(Adapter(adapter.entries))  # does not say: nor does merge refuse it
    assert base_notes(other) == []


def test_a_base_of_codes_is_the_weights_that_they_stand_for(tmp_path: Path) -> None:
    """So a float base is another one, and what was dequantised from the codes is the same."""
    from lora_fx.passes.verbs.open import load_program
    from lora_fx.passes.verbs.program import save_program

    model = lora_fx.insert(Net(), (X,), rank=2, quantise="int8")
    adapter = model.adapter()
    held = forms(model)
    assert held and set(adapter.metadata["base"]["names"]) == set(held)
    assert base_notes(lora_fx.insert(Net(), (X,), adapter=adapter, quantise="int8")) == []
    for other in (None, "nf4"):
        (note,) = base_notes(lora_fx.insert(Net(), (X,), adapter=adapter, quantise=other))
        assert "the adapter was trained on other weights" in note
    floats = Net()
    with torch.no_grad():
        for name in held:
            floats.get_parameter(name).copy_(numbers(model, name, torch.float32))
    assert base_notes(lora_fx.insert(floats, (X,), adapter=adapter)) == []
    save_program(model, tmp_path / "x.pt2")
    again = load_program(tmp_path / "x.pt2").adapter()
    assert again.metadata["base"] == adapter.metadata["base"]
    for kind, same in (("int8", True), ("int4", False)):
        path, given = tmp_path / f"{kind}.onnx", {"mode": "switch", "provider": "cpu"}
        report = lora_fx.export(Net(), path, (X,), adapters={kind: adapter}, quantise=kind, **given)
        assert same is not any("was trained on other weights" in w for w in report.warnings)


def test_each_loaded_adapter_is_compared() -> None:
    model = lora_fx.insert(Net(), (X,), rank=2)
    model.load_adapter(trained(Net()), "own")
    model.load_adapter(trained(Net(seed=1)), "foreign")
    (note,) = base_notes(model)
    assert note.startswith("the adapter 'foreign' was trained on other weights")


def test_a_model_that_cannot_be_compared(tmp_path: Path) -> None:
    adapter = trained(Net())
    (note,) = base_notes(lora_fx.insert(Net().bfloat16(), (X.bfloat16(),), adapter=adapter))
    assert "not verified" in note and "is bfloat16 here and was float32" in note
    half = trained(Net().bfloat16())
    wide = Net().bfloat16().float()
    assert base_notes(lora_fx.insert(wide, (X,), adapter=half)) == []
    torn = Adapter(adapter.entries, {**adapter.metadata, "base": {"version": 2}})
    (note,) = base_notes(lora_fx.insert(Net(), (X,), adapter=torn))
    assert "not verified" in note and "damaged" in note
    more = {**adapter.metadata["base"], "names": ["up.weight", "gone.weight"]}
    lacks = Adapter(adapter.entries, {**adapter.metadata, "base": more})
    (note,) = base_notes(lora_fx.insert(Net(), (X,), adapter=lacks))
    assert "not verified" in note and "'gone.weight'" in note
