"""An example argument that is None stays None, unless that is the forward's own default.

On 1358f462 None was left out whatever the default: a forward without one ended in "missing 1
required positional argument", one whose default is a number was captured under that number (1.0
off), and `**kwargs` did not have the name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.session import open_session
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb


class Net(nn.Module):
    """Two layers and something between them that a factor decides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 4)

    def between(self, x: Tensor, factor: Any) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(hidden if factor is None else hidden * factor)


class Positional(Net):
    def forward(self, x: Tensor, factor: Any, other: Any = None) -> Tensor:
        return self.between(x, factor)


class First(Net):
    def forward(self, factor: Any, x: Tensor) -> Tensor:
        return self.between(x, factor)


class PositionalOnly(Net):
    def forward(self, factor: Any, x: Tensor, /) -> Tensor:
        return self.between(x, factor)


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, factor: Any) -> Tensor:
        return self.between(x, factor)


class AnotherDefault(Net):
    def forward(self, x: Tensor, factor: Any = 2.0) -> Tensor:
        return self.between(x, factor)


class DefaultOfText(Net):
    def forward(self, x: Tensor, factor: Any = "double") -> Tensor:
        return self.between(x, 2.0 if factor == "double" else factor)


class Keywords(Net):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.between(x, more["factor"])


class NamedOrNot(Net):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.between(x, 0.5 if "factor" in more else 2.0)


class Rest(Net):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.between(x, len(rest) if rest[0] is None else rest[0])


class Pair(Net):
    def forward(self, x: Tensor, pair: tuple[Any, Any]) -> Tensor:
        return self.between(x, pair[1]) * pair[0]


class Nested(Net):
    def forward(self, x: Tensor, more: Mapping[str, Any]) -> Tensor:
        return self.between(x, more["factors"][0])


class Nones(Net):
    def forward(self, pair: Any, x: Tensor) -> Tensor:
        return self.between(x, pair[0])


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, tuple[type[Net], tuple[Any, ...], dict[str, Any]]] = {
    "positional": (Positional, (X, None), {}),
    "positional by name": (Positional, (X,), {"factor": None}),
    "all by name": (Positional, (), {"factor": None, "x": X, "other": None}),
    "first": (First, (None, X), {}),
    "positional only": (PositionalOnly, (None, X), {}),
    "keyword only": (KeywordOnly, (X,), {"factor": None}),
    "another default": (AnotherDefault, (X, None), {}),
    "another default by name": (AnotherDefault, (X,), {"factor": None}),
    "a default of text": (DefaultOfText, (X, None), {}),
    "keywords": (Keywords, (X,), {"factor": None}),
    "named or not": (NamedOrNot, (X,), {"factor": None}),
    "the rest": (Rest, (X, None, None), {}),
    "in a tuple": (Pair, (X, (torch.full((3, 1), 0.5), None)), {}),
    "in a list in a dict": (Nested, (X, {"factors": [None, 1]}), {}),
    "nothing but None": (Nones, ([None, [None]], X), {}),
}


def explicit(model: Net, adapter: Any) -> Net:
    """The model with W + s·BA for each weight, in fp64."""
    wide = copy.deepcopy(model).double()
    for key, low in adapter.lowrank.items():
        delta = low.scale * low.b.astype(np.float64) @ low.a.astype(np.float64)
        with torch.no_grad():
            wide.get_parameter(key).add_(torch.from_numpy(delta))
    return wide


def run(model: nn.Module, name: str) -> Any:
    """The model on the arguments of a row, in its own dtype."""
    _, args, kwargs = CALLS[name]
    dtype = next(model.parameters()).dtype
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(dtype), (args, kwargs))
    return model(*args, **kwargs).detach().numpy()


@pytest.mark.parametrize("name", CALLS)
def test_every_verb_runs_the_call(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, args, kwargs = CALLS[name]
    model = kind().eval()
    base = run(copy.deepcopy(model).double(), name)
    assert {t.key for t in lora_fx.find(model, args, kwargs).targets} == {
        "up.weight", "down.weight",
    }  # fmt: skip

    module = lora_fx.insert(model, args, kwargs, rank=2)
    assert rel(run(module, name), base) < 1e-6
    perturb(module)
    adapter = module.adapter()
    want = run(explicit(model, adapter), name)
    assert rel(want, base) > 0.05, "the adapter decides"
    assert rel(run(module, name), want) < 1e-6
    module.train()
    module(*args, **kwargs).sum().backward()

    folded = lora_fx.fold(model, args, kwargs, adapter=adapter)
    assert rel(run(folded, name), want) < 1e-6

    lora_fx.attach(model, args, kwargs, adapter=adapter)
    assert rel(run(model, name), want) < 1e-6
    lora_fx.detach(model)


@pytest.mark.parametrize("mode", ["merged", "switch"])
@pytest.mark.parametrize("name", ["first", "another default", "in a tuple"])
def test_an_export_runs_the_call(name: str, mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, args, kwargs = CALLS[name]
    model = kind().eval()
    module = lora_fx.insert(model, args, kwargs, rank=2)
    perturb(module)
    adapter = module.adapter()
    file = tmp_path / "model.onnx"
    adapters = {"a": adapter} if mode == "switch" else adapter
    assert lora_fx.export(model, file, args, kwargs, adapters=adapters, mode=mode)
    feeds = {"x": X.numpy()}
    if name == "in a tuple":
        feeds["pair_0"] = args[1][0].numpy()
    if mode == "switch":
        session = Session(file, provider="cpu")
        session.load("a", tmp_path / "a.onnx_adapter")
        (got,) = session.run(feeds, adapter="a").values()
    else:
        (got,) = open_session(file, "cpu").run(feeds).values()
    assert rel(got, run(explicit(model, adapter), name)) < 2e-6


def test_a_file_runs_the_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = lora_fx.insert(First().eval(), (None, X), rank=2)
    perturb(module)
    save_program(module, tmp_path / "model.pt2")
    again = load_program(tmp_path / "model.pt2")
    got = again(factor=None, x=X).detach().numpy()
    assert rel(got, run(module, "first")) < 1e-6


@pytest.mark.parametrize(
    ("kind", "without", "with_none"),
    [
        (Positional, {"factor": 3.0}, {"factor": 3.0, "other": None}),
        (AnotherDefault, {}, {"factor": 2.0}),
    ],
)
def test_what_is_the_default_is_no_other_program(
    kind: type[Net], without: dict[str, Any], with_none: dict[str, Any]
) -> None:
    """The twin: to give an argument its default is to leave it out."""
    captured = lora_fx.capture(kind().eval(), (X,), without)
    assert captured.signature.bind((X,), with_none).keys() == captured.named.keys()


def test_none_and_a_tensor_are_two_programs() -> None:
    torch.manual_seed(0)
    model, factor = First().eval(), torch.rand(3, 5)
    module = lora_fx.insert(model, (None, X), rank=2)
    for given in (None, factor, None):
        np.testing.assert_allclose(
            module(given, X).detach().numpy(), model(given, X).detach().numpy(), atol=1e-6
        )
