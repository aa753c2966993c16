"""Functions, methods, and sizes at which a model takes another path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.fx.module.test_module import perturb


def test_size_one_that_takes_another_path_gets_a_graph_of_its_own() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(x)
            return y * 100 if x.shape[0] == 1 else y

    model = Branch().eval()
    m = lora_fx.insert(model, (torch.randn(3, 6),), rank=2)
    for rows in (5, 1, 3, 1):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(m(x), model(x))


def test_functions_and_methods() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(x))

    x = torch.randn(3, 6)
    m = lora_fx.insert(model, (x,), rank=2)
    assert list(m.updates) == ["layer.weight"]
    torch.testing.assert_close(m(x), model(x))
    perturb(m)
    assert not torch.allclose(m(x), model(x))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x)
            return out

    two = Two()
    m = lora_fx.insert(two.encode, (x,), rank=2)
    assert list(m.updates) == ["fc.weight"]
    torch.testing.assert_close(m(x), two.encode(x))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x) * y.sum()
            return out

    model, x = Pair().eval(), torch.randn(3, 6)
    m = lora_fx.insert(model, (x, x), rank=2)
    y = torch.randn(3, 6)
    torch.testing.assert_close(m(x, y), model(x, y))


def test_a_model_that_cannot_be_copied_keeps_its_computed_tensors() -> None:
    """The old weight_norm sets a plain attribute, and such a module is captured as it is."""
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Linear(6, 4)).eval()
    before = model.weight
    lora_fx.insert(model, (torch.randn(3, 6),), rank=2)
    assert model.weight is before and type(before) is torch.Tensor


def test_the_two_graphs_run_on_the_models_own_tensors() -> None:
    """Not on those of the weightless copy that was captured."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU()), torch.randn(3, 4)
    captured = lora_fx.capture(model, (x,))
    for graph in (captured.eval, captured.train):
        assert graph.get_parameter("0.weight") is model[0].weight
        (out,) = torch.utils._pytree.tree_leaves(graph(x))
        torch.testing.assert_close(out, model(x))


def test_a_sequential_that_was_inserted_into_is_indexed_as_before() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    m = lora_fx.insert(model, (x,), rank=2)
    assert m[0] is m["0"] and m[-1] is m["2"]
    assert list(m[:2]) == [m[0], m[1]]


def test_a_bound_forward_has_no_hooks_in_any_dtype() -> None:
    """In another dtype the hooks of the module ran, where those of a bound method never do."""
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    model.register_forward_hook(lambda _module, _args, y: y * 100)
    x = torch.randn(3, 6)
    m = lora_fx.insert(model.forward, (x,), rank=2).double()
    torch.testing.assert_close(m(x.double()), model.double().forward(x.double()))


def test_a_forward_of_another_name_is_captured_in_another_dtype() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def run(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(x)
            return y

        forward = run
        del run

    model, x = Other().eval(), torch.randn(3, 6)
    m = lora_fx.insert(model, (x,), rank=2).double()
    torch.testing.assert_close(m(x.double()), model.double()(x.double()))


def caches() -> dict[str, Any]:
    """Caches of transformers, by how they come to be theirs."""
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

    class OfAModel(DynamicCache):  # type: ignore[misc]
        """MiniMax has one."""

    class OfItsCache(OfAModel):
        pass

    class WithoutBaseCache:
        """Reformer has one."""

    WithoutBaseCache.__module__ = "transformers.models.reformer.modeling_reformer"
    return {
        "dynamic": DynamicCache(),
        "of two": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "plain": Cache(layers=[]),
        "of a model": OfAModel(),
        "of its cache": OfItsCache(),
        "without base": WithoutBaseCache(),
    }


class Remembers(nn.Module):
    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.memory = lambda: memory  # no child, and nothing that a copy would copy

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.fc(x), self.memory()


@pytest.mark.parametrize("name", caches())
def test_a_cache_is_no_output(name: str) -> None:
    model = Remembers(caches()[name]).eval()
    captured = lora_fx.capture(model, (torch.randn(3, 6),))
    assert [n for n in captured.notes if "a key-value cache is not a tensor" in n]
    (out,) = lora_fx.insert(model, (torch.randn(3, 6),), rank=2)(torch.ones(2, 6))
    assert out.shape == (2, 4)


@dataclass
class Cache:
    """The twin: another library's, of a tensor."""

    scores: torch.Tensor


def test_a_cache_of_nobody_we_know_is_an_output() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> Cache:
            return Cache(self.fc(x))

    model = Scores().eval()
    module = lora_fx.insert(model, (torch.randn(3, 6),), rank=2)
    x = torch.randn(2, 6)
    torch.testing.assert_close(module(x).scores, model(x).scores)
