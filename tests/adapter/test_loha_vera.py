"""LoHa and VeRA beside PEFT's wheel: the same start, the same losses, the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapter.as_lora import as_lora
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Hadamard
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.onnx import Session

VARIANTS = ("loha", "vera")
LAYERS = {"loha": "conv,up,down", "vera": "up,down"}
"""PEFT's VeRA has linear layers alone."""


class Net(nn.Module):
    """A convolution and two linear layers, whose sides all differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 2), padding=1)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        out: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return out


X = torch.randn(8, 3, 7, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(len(X)) % 5


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def inserted(variant: str) -> AdaptedModule:
    return lora_fx.insert(net(), (X[:2],), rank=3, include=LAYERS[variant], variant=variant)


def of(module: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(module(X).double().numpy())


def steps(module: nn.Module, groups: Any) -> list[float]:
    """Train ten steps of AdamW; return the losses."""
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.0)
    losses = []
    module.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    module.eval()
    return losses


def trained_by_both(variant: str, folder: Path) -> tuple[AdaptedModule, nn.Module]:
    """Train both from one file; return both, whose losses were equal step for step."""
    module = inserted(variant)
    assert lora_fx.save_adapter(module.adapter(), folder) == ()
    theirs = peft.PeftModel.from_pretrained(net(), str(folder), is_trainable=True)
    base = of(module)
    assert rel(of(theirs.eval()), base) < 1e-6
    losses = steps(module, module.parameter_groups(0.05, weight_decay=0.0))
    expected = steps(theirs, [p for p in theirs.parameters() if p.requires_grad])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert losses[-1] < 0.98 * losses[0]
    assert rel(of(module), base) > 0.05
    return module, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_that_of_peft_step_for_step(variant: str, tmp_path: Path) -> None:
    module, theirs = trained_by_both(variant, tmp_path / "start")
    assert rel(of(module), of(theirs)) < 1e-6
    lora_fx.save_adapter(module.adapter(), tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    other = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert set(ours) == set(other)
    for name, tensor in ours.items():
        assert rel(tensor.numpy(), other[name].numpy()) < 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_peft_folds_merges_and_trains_on(variant: str, tmp_path: Path) -> None:
    _, theirs = trained_by_both(variant, tmp_path / "start")
    expected = of(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = lora_fx.load_adapter(tmp_path / "theirs")
    folded = lora_fx.fold(net(), (X[:2],), adapter=adapter)
    assert rel(of(folded), expected) < 1e-6
    again = lora_fx.insert(net(), (X[:2],), adapter=adapter)
    assert rel(of(again), expected) < 1e-6
    assert {variant_of(update).name for update in again.updates.values()} == {variant}
    steps(again, again.parameter_groups(0.05, weight_decay=0.0))
    assert rel(of(again), expected) > 0.01

    save_file(net().state_dict(), tmp_path / "base.safetensors")
    lora_fx.merge(
        tmp_path / "base.safetensors", [tmp_path / "theirs"], tmp_path / "out.safetensors"
    )
    merged = net()
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert rel(of(merged), expected) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["merged", "switch", "load", "batch"])
def test_every_mode_of_export(variant: str, mode: Any, tmp_path: Path) -> None:
    module = lora_fx.insert(net(), (X[:2],), rank=2, include=LAYERS[variant], variant=variant)
    steps(module, module.parameter_groups(0.05, weight_decay=0.0))
    lora_fx.save_adapter(module.adapter(), tmp_path / "a")
    adapters = tmp_path / "a" if mode == "merged" else [tmp_path / "a"]
    report = lora_fx.export(
        net(), tmp_path / "x.onnx", (X[:2],), adapters=adapters, mode=mode, provider="cpu"
    )
    assert report


def test_loha_says_the_rank_and_alpha_that_it_was_given(tmp_path: Path) -> None:
    module = lora_fx.insert(net(), (X[:2],), rank=3, alpha=5.0, include="up", variant="loha")
    assert "up.weight: rank 3, alpha 5" in str(module.report())
    update = module.updates["up.weight"]
    assert (update.rank, update.scale) == (9, 5.0 / 3)
    lora_fx.save_adapter(module.adapter(), tmp_path / "a")
    entry = lora_fx.load_adapter(tmp_path / "a").entries["up.weight"]
    assert isinstance(entry, Hadamard) and (entry.rank, entry.alpha) == (3, 5.0)


def test_vera_has_no_alpha_and_one_a_and_b() -> None:
    with pytest.raises(LoraFxError, match="alpha has no effect with variant vera"):
        lora_fx.insert(net(), (X[:2],), alpha=4.0, variant="vera")
    up, down = (inserted("vera").updates[f"{name}.weight"] for name in ("up", "down"))
    assert (up.scale, down.scale) == (1.0, 1.0)
    a = up.variant_tensors["projection_a"]
    np.testing.assert_array_equal(a, down.variant_tensors["projection_a"][:, :6])
    b = down.variant_tensors["projection_b"]
    np.testing.assert_array_equal(b, up.variant_tensors["projection_b"][:5])


def test_what_peft_cannot_hold_is_kept_and_said(tmp_path: Path) -> None:
    module = lora_fx.insert(net(), (X[:2],), rank=3, include="conv,up", variant="vera")
    steps(module, module.parameter_groups(0.05, weight_decay=0.0))
    notes = lora_fx.save_adapter(module.adapter(), tmp_path / "a")
    assert any("'conv.weight': PEFT's VeRA has linear layers alone" in note for note in notes)
    again = lora_fx.insert(net(), (X[:2],), adapter=lora_fx.load_adapter(tmp_path / "a"))
    assert rel(of(again), of(module)) < 1e-6


def damaged(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Replace or remove a tensor of a folder."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("base_model.vera_A", None, "no tensor 'base_model.vera_A'"),
        ("base_model.vera_B", torch.zeros(10, 2), r"expected \[r, in\], \[out, r\]"),
        ("base_model.model.up.vera_lambda_d", None, "stands alone"),
        ("base_model.model.up.vera_lambda_d", torch.zeros(4), "vera_lambda_d"),
        ("base_model.model.up.vera_lambda_b", torch.zeros(11), "has 11 numbers"),
    ],
)
def test_damaged_files_of_vera(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    lora_fx.save_adapter(inserted("vera").adapter(), tmp_path / "a")
    with pytest.raises(LoraFxError, match=message):
        lora_fx.load_adapter(damaged(tmp_path / "a", name, tensor))


def test_an_adapter_of_the_wrong_width_is_refused(tmp_path: Path) -> None:
    lora_fx.save_adapter(inserted("vera").adapter(), tmp_path / "a")
    adapter = lora_fx.load_adapter(tmp_path / "a")
    low = adapter.entries["up.weight"]
    assert isinstance(low, LowRank)
    with pytest.raises(LoraFxError, match=r"update of 'down\.weight' has A"):
        lora_fx.insert(
            net(), (X[:2],), adapter=lora_fx.Adapter({"down.weight": low}, adapter.metadata)
        )


def test_a_weight_of_vera_is_saved(tmp_path: Path) -> None:
    module = inserted("vera")
    steps(module, module.parameter_groups(0.05, weight_decay=0.0))
    half = module.adapter().weighted(0.5)
    lora_fx.save_adapter(half, tmp_path / "half")
    expected = of(lora_fx.fold(net(), (X[:2],), adapter=half))
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "half")).eval()
    assert rel(of(theirs), expected) < 1e-6
    assert rel(expected, of(module)) > 0.01


def test_a_file_of_peft_does_not_tell_the_inputs(tmp_path: Path) -> None:
    """Where they are known, it is taken rightly; where they are not, it is refused."""
    _, theirs = trained_by_both("vera", tmp_path / "start")
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = lora_fx.load_adapter(tmp_path / "a")
    with pytest.raises(LoraFxError, match="format kohya needs the inputs of each layer"):
        lora_fx.save_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(LoraFxError, match="another form needs the inputs of each layer"):
        as_lora(adapter, rank=2)
    file = tmp_path / "x.onnx"
    lora_fx.export(net(), file, (X[:2],), adapters=[tmp_path / "start"], mode="switch")
    session = Session(file, provider="cpu")
    session.load("a", tmp_path / "a")
    (out,) = session.run({"x": X.numpy()}, "a").values()
    assert rel(out, of(theirs)) < 2e-6
    bound = lora_fx.insert(net(), (X[:2],), adapter=adapter).adapter()
    lora_fx.save_adapter(bound, tmp_path / "bound")
    again = lora_fx.load_adapter(tmp_path / "bound")
    lora_fx.save_adapter(again, tmp_path / "b.safetensors", format="kohya")
