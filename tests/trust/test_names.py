"""Parameters of odd names: right in every verb under their own name, or refused by it.

On 3911131 the modules `a[0]` and `u@v` ended insert in a false "is no parameter", the parameter
`u@v` was inserted and then read as a use in export, merge and .pt2, `a[0]` got another update in an
ONNX merge, and `u@op:linear` beside a tied `u` gave other numbers without a word.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx.session import open_session
from lora_fx.passes.verbs.insert_onnx import insert_onnx
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb


class Modules(nn.Module):
    """Linear modules under these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for n in names:
            self.add_module(n, nn.Linear(4, 4))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for n in self.names:
            x = getattr(self, n)(x)
        return x


class Products(nn.Module):
    """Parameters under these names, each read by x @ w."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for n in names:
            self.register_parameter(n, nn.Parameter(torch.randn(4, 4)))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for n in self.names:
            x = x @ getattr(self, n)
        return x


class Keys(nn.Module):
    """Keys of a ParameterDict."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.d = nn.ParameterDict({n: nn.Parameter(torch.randn(4, 4)) for n in names})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.d.values():
            x = F.linear(x, w)
        return x


class Tied(Products):
    """Each table is looked up, and multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] > 0).long()
        return super().forward(x) + sum(F.embedding(ids, getattr(self, n)) for n in self.names)


WORKS = [
    (Modules, "a[0]"), (Modules, "a", "a[0]"), (Modules, "w", "w[:, 0:2]"), (Modules, "w~"),
    (Modules, "self"), (Modules, "lora_A"), (Keys, "a b"), (Keys, "a,b", "é"), (Keys, "x/y", "0"),
    (Keys, "role:q", "class:Linear"), (Products, "a", "b[0]c"), (Products, "]a["),
]  # fmt: skip
ONE_OF_TWO = [  # the other one works
    (Products, "a", "a[0]"), (Products, "w", "w[:, 0:2]"), (Products, "u", "u@op:matmul"),
    (Products, "u", "u@v"), (Modules, "u", "u@v"), (Tied, "u", "u@op:embedding"),
    (Keys, "a", "a[0:2]@x"),
    (Products, "a", "[0]"),
]  # fmt: skip
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def built(kind: Any, *names: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(*names)
    return model.eval()


def said(row: tuple[Any, ...]) -> str:
    return "-".join([row[0].__name__, *row[1:]])


@pytest.mark.parametrize("row", [*WORKS, *ONE_OF_TWO], ids=said)
def test_a_name_is_right_in_every_verb(row: tuple[Any, ...], tmp_path: Path) -> None:
    model = built(*row)
    cap = lora_fx.capture(model, (X,))
    module = lora_fx.insert(cap, rank=2, include="*")
    perturb(module)
    adapter, by_hand = module.adapter(), copy.deepcopy(model)
    parameters = dict(by_hand.named_parameters())
    refused = {r.key for r in lora_fx.find(cap).refusals}
    assert {*adapter} == {n for n, p in parameters.items() if p.dim() == 2} - refused
    assert len(refused) == (row in ONE_OF_TWO)
    with torch.no_grad():
        for key, delta in adapter.deltas().items():
            parameters[key].add_(torch.from_numpy(np.asarray(delta)).float())
    want = by_hand(X)

    def same(got: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    same(module.eval()(X))
    lora_fx.save_adapter(adapter, tmp_path / "peft")
    same(lora_fx.fold(cap, adapter=tmp_path / "peft")(X))
    lora_fx.export(module, tmp_path / "merged.onnx", provider="cpu")
    lora_fx.export(cap, tmp_path / "base.onnx", provider="cpu")
    lora_fx.merge(tmp_path / "base.onnx", [tmp_path / "peft"], tmp_path / "again.onnx")
    for file in ("merged.onnx", "again.onnx"):
        same(torch.from_numpy(open_session(tmp_path / file, "cpu").run({"x": X.numpy()})["output"]))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    lora_fx.merge(tmp_path / "base.safetensors", [tmp_path / "peft"], out, other_readers=True)
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-5, atol=1e-5)
    extracted = lora_fx.extract(tmp_path / "base.safetensors", out, rank=4)
    same(lora_fx.fold(cap, adapter=extracted)(X))
    if not {"é"} & {*row}:  # torch's own names of .pt2 files are held to a small alphabet
        save_program(module, tmp_path / "x.pt2")
        same(load_program(tmp_path / "x.pt2").eval()(X))
    lora_fx.attach(model, (X,), adapter=adapter)
    same(model(X))
    lora_fx.detach(model)


@pytest.mark.parametrize("row", ONE_OF_TWO, ids=said)
@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_a_name_that_reads_as_another_key_is_refused_by_it(row: tuple[Any, ...], verb: str) -> None:
    model = built(*row)
    refused = lora_fx.find(model, (X,)).refusals[0]
    assert refused.key.removesuffix(".weight").removeprefix("d.") == row[2]
    assert refused.reason.endswith("rename it") and "fold" in refused.verbs
    with pytest.raises(LoraFxError, match="no weight matmul"):
        getattr(lora_fx, verb)(built(row[0], row[2]), (X,), rank=2)
    if row[2] == "u@v":  # the others mean parts and uses that are there
        with pytest.raises(LoraFxError, match=r"matches no target: .*rename it"):
            getattr(lora_fx, verb)(model, (X,), rank=2, include=row[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_A", "the name 'lora_A' of 'lora_A.w' is taken"),
        ("self", "self holds weights, .* uses the name self"),
    ],
)
@pytest.mark.parametrize("verb", [lora_fx.insert, lora_fx.attach])
def test_a_tensor_where_code_or_branches_lie_is_refused_by_name(
    verb: Any, name: str, message: str
) -> None:
    with pytest.raises(LoraFxError, match=message):
        verb(built(Products, "w", name), (X,), rank=2)


def test_an_extracted_update_of_a_square_matrix_is_turned_for_the_model(tmp_path: Path) -> None:
    """Tensor names do not say which axis is in; the model does: W + ΔW was W + ΔWᵀ."""
    base, tuned = built(Products, "w"), built(Products, "w")
    dict(tuned.named_parameters())["w"].data += torch.outer(torch.arange(4.0), torch.ones(4))
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    paths = (tmp_path / f"{n}.safetensors" for n in ("base", "tuned"))
    folded = lora_fx.fold(base, (X,), adapter=lora_fx.extract(*paths, rank=2))
    torch.testing.assert_close(folded(X), tuned(X), rtol=1e-5, atol=1e-5)


class Sizes(nn.Module):
    """Two lengths, one of them within a dict; outputs of one, of both, and of half of one."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y = self.lin(x), self.lin(more["y"])
        return {"one": x, "both": torch.cat([x, y], 1), "half": y[:, ::2]}


NAMED = {"x": {0: "rows", 1: "left"}, "more.y": {0: "rows", 1: "right"}}
DIMS = {
    "x": ["rows", "left", 4], "more_y": ["rows", "right", 4], "one": ["rows", "left", 4],
    "both": ["rows", "left + right", 4], "half": ["rows", "((right + 1)//2)", 4],
}  # fmt: skip


def dims_of(path: Path) -> dict[str, list[str | int]]:
    """The dimensions of a file's inputs and outputs, but for those of adapters."""
    graph = onnx.load(path).graph
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
        if "lora" not in v.name and v.name != "adapter_ids"
    }


@pytest.mark.parametrize("given", ["text", "Dim", ".pt2"])
def test_dimensions_keep_their_names_in_every_file(given: str, tmp_path: Path) -> None:
    """On 3911131 a nested input had torch's (`s25`), and torch's Dim was written as its repr."""
    model: Any = Sizes().eval()
    args = (torch.randn(2, 5, 4), {"y": torch.randn(2, 7, 4)})
    dims: Any = NAMED
    if given == "Dim":
        dims = {n: {d: torch.export.Dim(s) for d, s in row.items()} for n, row in NAMED.items()}
    model = lora_fx.capture(model, args, dynamic=dims)
    module = lora_fx.insert(model, rank=2)
    perturb(module)
    adapter = module.adapter()
    if given == ".pt2":
        save_program(lora_fx.fold(model, adapter=lora_fx.Adapter({})), tmp_path / "m.pt2")
        model = str(tmp_path / "m.pt2")
    modes: dict[str, Any] = {"merged": None, "switch": None, "load": None, "batch": {"a": adapter}}
    for mode, adapters in modes.items():
        path = tmp_path / f"{mode}.onnx"
        lora_fx.export(model, path, mode=mode, adapters=adapters, provider="cpu")
        assert dims_of(path) == DIMS
    base = (tmp_path / "merged.onnx").rename(tmp_path / "base.onnx")
    lora_fx.merge(base, [adapter], tmp_path / "merge.onnx")
    insert_onnx(base, tmp_path / "insert.onnx", rank=2)
    lora_fx.export(base, tmp_path / "fast.onnx", optimise=True, provider="cpu")
    lora_fx.export(base, tmp_path / "again.onnx", mode="load", provider="cpu")
    for name in ("merge", "insert", "fast", "again"):
        assert dims_of(tmp_path / f"{name}.onnx") == DIMS
