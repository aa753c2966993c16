"""A DoRA that was evaluated on one base, and the files of a base: each is told by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import BASE_NUMBER, Evaluation, evaluated
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def layer(scale: float = 1.0) -> nn.Sequential:
    """One base, or another."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        net[0].weight.mul_(scale)
    return net


def dora(seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2, 4), np.float32)
    b = rng.standard_normal((6, 2), np.float32)
    magnitude = rng.uniform(0.5, 1.5, 6).astype(np.float32)
    return Adapter({"0.weight": LowRank(a, b, 2.0, magnitude=magnitude)})


def weight_of(net: nn.Sequential) -> np.ndarray:
    return net[0].weight.detach().double().numpy()


def of_base(net: nn.Sequential) -> Adapter:
    """The adapter that an export writes for this base."""
    return Evaluation(lambda key: weight_of(net))(dora())


def test_the_second_evaluation_keeps_the_base_of_the_first() -> None:
    first = of_base(layer())
    again = Evaluation(lambda key: weight_of(layer()))(first)
    assert again.metadata[BASE_NUMBER] == first.metadata[BASE_NUMBER] > 1
    on_other_base = Evaluation(lambda key: weight_of(layer(1.7)))
    on_other_base(dora(1))  # whose hashes stay
    for adapter in (first, replace(first, metadata={})):
        with pytest.raises(LoraFxError, match="computed from another base") as caught:
            on_other_base(adapter)
        assert "PEFT folder" in caught.value.hint


def output(module: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    return module(X).detach().numpy()


def attached(net: nn.Sequential, adapter: Adapter) -> np.ndarray:
    lora_fx.attach(net, (X,), adapter=adapter)
    return output(net)


def reloaded(net: nn.Sequential, adapter: Adapter) -> np.ndarray:
    module = lora_fx.insert(net, (X,), adapter=dora()).eval()
    module.load_adapter(adapter)
    return output(module)


VERBS: dict[str, Callable[[nn.Sequential, Adapter], np.ndarray]] = {
    "insert": lambda net, adapter: output(lora_fx.insert(net, (X,), adapter=adapter).eval()),
    "fold": lambda net, adapter: output(lora_fx.fold(net, (X,), adapter=adapter)),
    "attach": attached,
    "load_adapter": reloaded,
}


@pytest.mark.parametrize("verb", VERBS)
def test_torch_takes_it_on_its_own_base_alone(verb: str) -> None:
    served = evaluated(dora().lowrank["0.weight"], weight_of(layer()), "w")
    new = layer().double()
    with torch.no_grad():
        gains = served.variant_tensors["gains"].astype(np.float64)
        changed = weight_of(layer()) * (1 + gains[:, None])
        changed += served.scale * (served.b.astype(np.float64) @ served.a)
        new[0].weight.copy_(torch.from_numpy(changed))
        want = new(X.double()).numpy()
    assert rel(VERBS[verb](layer(), of_base(layer())), want) < 1e-6
    with pytest.raises(LoraFxError, match="computed from another base than this model"):
        VERBS[verb](layer(1.7), of_base(layer()))


@pytest.mark.parametrize("mode", ["switch", "load", "batch", "merged"])
def test_a_file_takes_it_on_its_own_base_alone(mode: str, tmp_path: Path) -> None:
    adapter = of_base(layer())
    given = {"adapters": adapter} if mode == "merged" else {"adapters": {"de": adapter}}
    assert lora_fx.export(layer(), tmp_path / "m.onnx", (X,), mode=mode, probe="none", **given)
    other = tmp_path / "other"
    other.mkdir()
    if mode != "merged":  # beside another DoRA, which was evaluated first
        given = {"adapters": {"fr": dora(1), "de": adapter}}
    with pytest.raises(LoraFxError, match="computed from another base than this model"):
        lora_fx.export(layer(1.7), other / "m.onnx", (X,), mode=mode, probe="none", **given)
    assert not list(other.iterdir())


@pytest.mark.parametrize("format", ["peft", "kohya", "onnx_adapter"])
def test_no_format_stores_it(format: str, tmp_path: Path) -> None:
    name = "x.onnx_adapter" if format == "onnx_adapter" else "x.safetensors"
    with pytest.raises(LoraFxError, match=r"'0\.weight' is DoRA of one base") as caught:
        lora_fx.save_adapter(of_base(layer()), tmp_path / name, format=format)
    assert "as it was trained" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_merge_says_what_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(layer().state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(LoraFxError, match=r"DoRA of one base.*a merge does not take") as caught:
        lora_fx.merge(
            tmp_path / "base.safetensors", [of_base(layer())], tmp_path / "out.safetensors"
        )
    assert "as it was trained" in caught.value.hint
    lora_fx.merge(tmp_path / "base.safetensors", [dora()], tmp_path / "out.safetensors")


@dataclass(frozen=True)
class Portable:
    """A portable file with a whole tensor, beside its base and alone."""

    path: Path
    moved: Path
    whole: Adapter


@pytest.fixture
def portable(tmp_path: Path) -> Portable:
    whole = Adapter({"0.weight": Full(np.ones((6, 4), np.float32))})
    lora_fx.export(
        layer(), tmp_path / "m.onnx", (X,), adapters={"whole": whole, "de": dora()}, mode="switch",
        target="portable", probe="none",
    )  # fmt: skip
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "m.onnx", moved)
    return Portable(tmp_path / "m.onnx", moved / "m.onnx", whole)


def test_the_base_file_is_missed_by_name(portable: Portable) -> None:
    session = Session(portable.moved)
    name = open_session(portable.moved).input_names[0]
    feeds = {name: X.numpy()}
    message = "'0.weight', and the file of the base's value, X.base.safetensors, is not there"
    with pytest.raises(LoraFxError, match=message) as caught:
        session.run(feeds)
    assert "beside the model" in caught.value.hint
    with pytest.raises(LoraFxError, match=message):
        open_session(portable.moved).run(feeds)
    with pytest.raises(LoraFxError, match=message):
        session.load("de", dora())
    session.load("whole", portable.whole)  # which has a value for it
    assert session.run(feeds, adapter="whole")


def test_a_session_reads_a_replaced_weight_from_the_base_file(portable: Portable) -> None:
    session = Session(portable.path)
    session.load("trained", dora())
    session.load("written", portable.path.with_name("de.safetensors"))
    feeds = {open_session(portable.path).input_names[0]: X.numpy()}
    (by_adapter,) = session.run(feeds, adapter="trained").values()
    (by_file,) = session.run(feeds, adapter="written").values()
    assert np.array_equal(by_adapter, by_file)
    want = output(lora_fx.fold(layer(), (X,), adapter=dora()))
    assert rel(by_adapter, want) < 1e-6
