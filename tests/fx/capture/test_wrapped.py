"""A model inside torch.compile or a parallel wrapper has its own names in every verb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured

KEYS = ["up.weight", "down.weight"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return self.down(torch.relu(self.up(x))) * scale


class ModuleNamedModule(nn.Module):
    """A class of the user's with such a child is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        return 2 * self.module(x)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "data_parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "compile_of_ddp": lambda m: compiled(nn.parallel.DistributedDataParallel(m)),
    "ddp_of_compile": lambda m: nn.parallel.DistributedDataParallel(compiled(m)),
    "plain": lambda m: m,
}


def made(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, WRAPPED[name](model), torch.randn(3, 6)


@pytest.mark.parametrize("name", WRAPPED)
def test_keys_are_the_models_own(name: str, group: None, tmp_path: Path) -> None:
    model, wrapped, x = made(name)
    assert [t.key for t in lora_fx.find(wrapped, (x,)).targets] == KEYS
    inserted = lora_fx.insert(wrapped, (x,), rank=2)
    assert [*inserted.adapter().entries] == KEYS
    nn.init.normal_(inserted.get_parameter("up.lora_B.weight"), std=0.5)
    adapter = inserted.adapter()
    assert [*adapter.bind(wrapped, (x,)).entries] == KEYS
    folded = lora_fx.fold(wrapped, (x,), adapter=adapter)
    assert (folded(x) - model(x)).abs().max() > 0.05
    torch.testing.assert_close(folded(x), inserted.eval()(x), rtol=1e-5, atol=1e-6)
    assert [n for n, _ in folded.named_parameters()] == [n for n, _ in model.named_parameters()]
    path = tmp_path / "m.onnx"
    assert lora_fx.export(wrapped, path, (x,), adapters=adapter)
    assert lora_fx.verify(Captured(wrapped, (x,)), path, adapter=adapter)


@pytest.mark.parametrize("name", ["compile", "data_parallel"])
def test_attach_and_detach(name: str, group: None) -> None:
    model, wrapped, x = made(name)
    before, names = wrapped(x), [*model.state_dict()]
    assert lora_fx.attach(wrapped, (x,), rank=2) is wrapped
    assert [*model.adapter().entries] == KEYS
    nn.init.normal_(model.get_parameter("up.lora_B.weight"), std=0.5)
    assert (wrapped(x) - before).abs().max() > 0.05
    torch.testing.assert_close(wrapped(x), model(x))
    with pytest.raises(LoraFxError, match="attached to this model already"):
        lora_fx.attach(wrapped, (x,))
    with pytest.raises(LoraFxError, match="an adapter is attached to this Net"):
        lora_fx.insert(wrapped, (x,))
    assert lora_fx.detach(wrapped) is wrapped
    assert [*model.state_dict()] == names
    torch.testing.assert_close(wrapped(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ddp", "compile_of_ddp", "ddp_of_compile"])
def test_attach_names_what_a_parallel_wrapper_would_not_synchronise(name: str, group: None) -> None:
    model, wrapped, x = made(name)
    with pytest.raises(LoraFxError, match="DistributedDataParallel synchronises") as error:
        lora_fx.attach(wrapped, (x,), rank=2)
    assert "model.module" in error.value.hint
    assert type(model) is Net


def test_a_child_of_that_name_is_no_wrapper() -> None:
    keys = [t.key for t in lora_fx.find(ModuleNamedModule(), (torch.randn(3, 6),)).targets]
    assert keys == ["module.weight"]


def test_a_compiled_module_of_ours_is_the_module() -> None:
    _, _, x = made("plain")
    inserted = lora_fx.insert(Net(), (x,), rank=2).eval()
    nn.init.normal_(inserted.get_parameter("up.lora_B.weight"), std=0.5)
    folded = lora_fx.fold(compiled(inserted))
    torch.testing.assert_close(folded(x), inserted(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(LoraFxError, match="holds an adapter already"):
        lora_fx.insert(compiled(inserted), (x,))
