"""Quantise: every way to read a weight, in every kind, beside W̃ + s·BA in fp64.

W̃ is made here from the codes in the tree, element by element, and not by the product's own op.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.quantised_parameters import forms, tensors_of
from lora_fx.ir.quantised import NF4, quantise
from lora_fx.passes.quantise import Quantise
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.quantise import KINDS, quantised
from tests.fx.train.saved_bytes import saved_bytes

THE_WEIGHT = "re:^weight"
RAGGED = 70  # neither a block of 32 nor one of 64 divides it


class One(nn.Module):
    """A weight, and how forward reads it; a linear layer makes its input."""

    def __init__(self, shape: tuple[int, ...], read: Callable[..., torch.Tensor], x: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, x)
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))
        self.bias = nn.Parameter(torch.randn(6))
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.first(x), self.weight, self.bias)


def _experts(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.expand(2, -1, -1) if x.dim() == 2 else x[:, 0].expand(2, -1, -1), w)


def _conv(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x.reshape(x.shape[0], 7, -1), w, b)


ROWS: dict[str, tuple[tuple[int, ...], Callable[..., torch.Tensor], int]] = {
    "linear": ((6, RAGGED), F.linear, RAGGED),
    "matmul": ((RAGGED, 6), lambda x, w, b: x @ w + b, RAGGED),
    "addmm": ((RAGGED, 6), lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w), RAGGED),
    "turned": ((6, RAGGED), lambda x, w, b: x @ w.t(), RAGGED),
    "left": ((6, RAGGED), lambda x, w, b: w @ x.mT, RAGGED),
    "einsum": ((6, RAGGED), lambda x, w, b: torch.einsum("bti,oi->bto", x, w), RAGGED),
    "parts": ((6, RAGGED), lambda x, w, b: x @ w[:4].t() + (x @ w[2:].t()), RAGGED),
    "experts": ((2, RAGGED, 6), _experts, RAGGED),
    "conv": ((6, 7, 3), _conv, 70),
    "twice": ((6, RAGGED), lambda x, w, b: F.linear(x, w) * F.linear(x.abs(), w, b), RAGGED),
}

FAST = {("linear", "nf4"), ("linear", "int8"), ("addmm", "nf4"), ("experts", "nf4")}
CASES = [
    pytest.param(n, k, marks=() if k == "int4" or (n, k) in FAST else pytest.mark.slow)
    for n in ROWS
    for k in KINDS
]


def built(name: str) -> tuple[One, torch.Tensor]:
    torch.manual_seed(0)
    return One(*ROWS[name]).eval(), torch.randn(3, 4, 5)


def quantised_one(name: str, kind: str) -> tuple[One, torch.Tensor, Captured]:
    model, x = built(name)
    return model, x, quantised(capture(model, (x,)), {kind: THE_WEIGHT})


def by_hand(cap: Captured, name: str) -> np.ndarray[Any, Any]:
    """W̃ in fp64 from the bytes of the tree, by the layouts that docs/quantised.md tells."""
    stored = forms(cap.model)[name]
    codes, scale = (t.numpy() for t in tensors_of(cap.model, name))
    shape = (*stored.shape[:-2], *stored.shape[:-3:-1]) if stored.turned else stored.shape
    count = math.prod(shape)
    flat = np.empty(count)
    if stored.format == "nf4":
        for i in range(count):
            byte = int(codes[i // 2])
            flat[i] = float(NF4[byte >> 4 if i % 2 == 0 else byte & 15]) * float(scale[i // 64])
    else:
        width = count // len(codes)
        for i in range(count):
            row, k = divmod(i, width)
            block, at = divmod(k, 32)
            if stored.bits == 8:
                code = int(codes[row, block, at]) - 128
            else:
                byte = int(codes[row, block, at // 2])
                code = (byte & 15 if at % 2 == 0 else byte >> 4) - 8
            flat[i] = np.float32(code) * scale[row, block]
    weight = flat.reshape(shape)
    return weight.swapaxes(-1, -2) if stored.turned else weight


class Made(TorchDispatchMode):
    """Sees the weights that are made from codes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        out: torch.Tensor = op(*args, **(kwargs or {}))
        if op is DEQUANTISE:
            self.weights.append(StorageWeakRef(out.untyped_storage()))
        return out


def filled(module: AdaptedModule) -> AdaptedModule:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".lora_B." in f".{name}":
                p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return module


def wanted(model: nn.Module, tensors: dict[str, Any], x: torch.Tensor) -> np.ndarray[Any, Any]:
    given = {n: torch.as_tensor(np.array(v)).double() for n, v in tensors.items()}
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return np.asarray(functional_call(wide, given, (x.double(),)).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest(kind: str) -> None:
    w = np.random.default_rng(0).standard_normal((5, RAGGED)).astype(np.float32)
    w[2] = 0
    q = quantise(w, kind)
    off = np.abs(q.dequantise() - w)
    if kind == "nf4":
        flat, off = w.reshape(-1), off.reshape(-1)
        for i, (value, miss) in enumerate(zip(flat, off, strict=True)):
            unit = np.abs(flat[i // 64 * 64 : i // 64 * 64 + 64]).max()
            assert miss <= np.abs(NF4 * unit - value).min() + 1e-7
    else:
        middle = 2 ** (int(kind[3:]) - 1)
        for i in range(0, RAGGED, 32):
            block, miss = np.abs(w[:, i : i + 32]), off[:, i : i + 32]
            largest = block.max(1, keepdims=True)
            step = largest / middle
            assert (miss[block == largest] <= 1e-6).all(), "the largest value is a code"
            # codes end one step earlier on the other side
            half = np.where(block <= step * (middle - 1), step / 2, step)
            assert (miss <= half + 1e-6).all()
    assert not q.dequantise()[2].any()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_insert_is_the_dequantised_weight_and_its_update(name: str, kind: str) -> None:
    model, x, cap = quantised_one(name, kind)
    assert forms(cap.model)["weight"].format == kind
    assert not forms(model), "the user's model stays as it is"
    module = filled(lora_fx.insert(cap, rank=2, include=THE_WEIGHT))
    base = by_hand(cap, "weight")
    held = {**{n: p.detach().numpy() for n, p in model.named_parameters()}, "weight": base}
    for rows in (3, 1, 5):
        given = torch.randn(rows, 4, 5)
        out = module(given).detach().numpy()
        plain = wanted(model, held, given)
        full = dict(held)
        for key, delta in module.adapter().deltas().items():
            region = eval(f"np.s_{key[key.index('[') :]}") if "[" in key else ...
            full["weight"] = np.array(full["weight"])
            full["weight"][region] += delta.reshape(full["weight"][region].shape)
        target = wanted(model, full, given)
        assert rel(out, target) < FOLD_TOL
        assert 0.05 < rel(target, plain) < 5, "an update that is seen"
    with module.base():
        assert rel(module(x).detach().numpy(), wanted(model, held, x)) < FOLD_TOL
    assert 0.002 < rel(wanted(model, held, x), model(x).detach().numpy()) < 0.6, "codes are seen"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_training_keeps_no_weight_and_has_its_gradients(name: str, kind: str) -> None:
    model, x, cap = quantised_one(name, kind)
    floats = copy.deepcopy(model)
    with torch.no_grad():
        floats.weight.copy_(torch.from_numpy(by_hand(cap, "weight")))
    ours = [lora_fx.insert(cap, rank=2, include=THE_WEIGHT, fast=f) for f in (True, False)]
    theirs = [
        lora_fx.insert(floats, (x,), rank=2, include=THE_WEIGHT, fast=f) for f in (True, False)
    ]
    found = []
    for module in (*ours, *theirs):
        filled(module).train()
        given, made = x.clone().requires_grad_(), Made()
        with made:
            y = module(given)
        alive = [r for r in made.weights if not r.expired()]
        assert bool(made.weights) is (module not in theirs)
        assert not alive, "W̃ is made again in backward"
        y.square().sum().backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        found.append((saved_bytes(module, partial(module, x))[0], {**grads, "x": given.grad}))
    (kept, grads), (slow_kept, slow), (float_kept, want), (slow_float_kept, _) = found
    assert set(grads) == set(want) == set(slow)
    for n, g in want.items():
        assert g is not None and bool(g.any())
        for other in (grads, slow):
            assert rel(other[n].numpy(), g.numpy()) < FOLD_TOL, n
    assert kept <= float_kept
    assert slow_kept <= slow_float_kept


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_second_run_changes_nothing(name: str, kind: str) -> None:
    _, _, cap = quantised_one(name, kind)
    graph = cap.fx_graph()
    codes = [t.clone() for t in tensors_of(cap.model, "weight")]
    before = str(graph.graph)
    for again in KINDS:  # what is stored as codes keeps its bytes
        assert not Quantise({"weight": again})(graph).modified
    assert str(graph.graph) == before
    assert all(map(torch.equal, codes, tensors_of(cap.model, "weight")))


def test_nothing_to_do_changes_nothing() -> None:
    model, x = built("linear")
    graph: FxGraph = capture(model, (x,)).fx_graph()
    before = str(graph.graph)
    assert not Quantise({})(graph).modified
    assert str(graph.graph) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "addmm", "turned", "experts", "conv"])
def test_onnx_runtime_computes_with_the_same_bytes(name: str, kind: str, tmp_path: Path) -> None:
    import onnx

    _, _, cap = quantised_one(name, kind)
    file = tmp_path / "m.onnx"
    report = lora_fx.export(cap, file, within=True)
    assert report.ok and all(p.rel < 2e-6 for p in report.parity)
    made = onnx.load(file)
    ops = [n.op_type for n in made.graph.node if n.domain == "com.microsoft"]
    matrix = name in ("linear", "addmm", "turned")
    assert ops == (["MatMulBnb4" if kind == "nf4" else "MatMulNBits"] if matrix else [])
    held = {i.name: onnx.numpy_helper.to_array(i) for i in made.graph.initializer}
    codes, scale = (t.numpy() for t in tensors_of(cap.model, "weight"))
    if matrix:
        assert np.array_equal(held["weight"], codes)
        assert np.array_equal(held["weight_scale"], scale)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a kind": ({"quantise": "nf5"}, "unknown kind 'nf5'"),
    "no text": ({"quantise": True}, "quantise=True is no kind of quantised weights"),
    "a name": ({"quantise": "nf4=blah"}, "selector 'blah' matches no target"),
    "dora": ({"quantise": "int4", "variant": "dora"}, "reads W itself"),
    "pissa": ({"quantise": "int4", "init": "pissa"}, "reads W itself"),
    "trained whole": (
        {"quantise": f"int4={THE_WEIGHT}", "also_train": "weight"},
        "it is trained whole",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name: str) -> None:
    model, x = built("linear")
    options, said = REFUSED[name]
    with pytest.raises(LoraFxError, match=said) as caught:
        lora_fx.insert(model, (x,), rank=2, **options)
    assert caught.value.hint


@pytest.mark.parametrize("mode", ["merged", "fold"])
def test_an_update_is_not_folded_into_codes(mode: str, tmp_path: Path) -> None:
    _, _, cap = quantised_one("linear", "int4")
    module = filled(lora_fx.insert(cap, rank=2, include=THE_WEIGHT))
    with pytest.raises(LoraFxError, match="quantised") as caught:
        lora_fx.fold(module) if mode == "fold" else lora_fx.export(module, tmp_path / "m.onnx")
    assert "switch" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_casts_leave_the_codes_values() -> None:
    _, x, cap = quantised_one("linear", "int4")
    module = lora_fx.insert(cap, rank=2, include=THE_WEIGHT)
    want = module(x)
    module.to(torch.bfloat16).to(torch.float32)
    held = {n: b.dtype for n, b in module.named_buffers()}
    assert held == {"weight_scale": torch.float32}
    with torch.no_grad():
        module.first.weight.copy_(cap.model.first.weight)
        module.first.bias.copy_(cap.model.first.bias)
        module.bias.copy_(cap.model.bias)
    assert torch.equal(module(x), want)


def test_embeddings_and_whole_tensors_stay_floats_unless_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.table(ids)))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 20, (2, 5))
    cap = capture(model, (ids,))
    plain = quantised(cap, "int4")
    assert list(forms(plain.model)) == ["fc.weight"]
    assert any("table.weight: left in float" in n for n in plain.notes)
    named = quantised(cap, ["int4", "int8=table"])
    assert {n: s.format for n, s in forms(named.model).items()} == {
        "table.weight": "int8", "fc.weight": "int4",
    }  # fmt: skip
    assert named.model.head.weight is not None
    assert torch.equal(named.model.head.weight, named.model.table.weight)
    module = lora_fx.insert(named, rank=2)
    assert torch.equal(module(ids), named.model(ids))
    scales = {n: b.clone() for n, b in module.named_buffers(remove_duplicate=False)}
    module.to(torch.bfloat16)
    after = dict(module.named_buffers(remove_duplicate=False))
    assert set(scales) == {"table.weight_scale", "head.weight_scale", "fc.weight_scale"}
    assert all(torch.equal(after[n], b) and after[n].dtype == b.dtype for n, b in scales.items())
    assert {t.key: (t.parameter.format, t.parameter.bits) for t in lora_fx.find(named).targets} == {
        "table.weight": ("int8", 8), "fc.weight": ("int4", 4),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["merged", "switch"])
def test_level_four_takes_x_in_int8_and_is_held_to_its_own_gate(mode: str, tmp_path: Path) -> None:
    model, x = built("linear")
    worst = {}
    for level in (0, 4):
        file = tmp_path / f"{level}.onnx"
        report = lora_fx.export(
            model, file, (x,), quantise="int4", accuracy_level=level, mode=mode, within=True
        )
        worst[level] = max(p.rel for p in report.parity)
        assert {p.tol for p in report.parity} == {2e-6 if level == 0 else 8 * 2.0**-7}
    assert worst[0] < 2e-6 and 1e-4 < worst[4] < 3e-2
    again = lora_fx.verify(tmp_path / "4.onnx", tmp_path / "4.onnx")
    assert again.ok and {p.tol for p in again.parity} == {8 * 2.0**-7}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantise": "nf4", "accuracy_level": 4}, "for products over int4 or int8 codes"),
        ({"quantise": "int4", "accuracy_level": 2}, "accuracy level 2 is not available"),
        ({"quantise": "int4", "accuracy_level": 4, "mode": "batch"}, "in mode batch"),
        ({"quantise": "int4", "accuracy_level": 4, "mode": "train"}, "in mode train"),
        ({"quantise": "int4", "precision": "int8"}, "both set how weights are stored"),
    ],
)
def test_options_that_exclude_each_other(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, x = built("linear")
    with pytest.raises(LoraFxError, match=said):
        lora_fx.export(model, tmp_path / "m.onnx", (x,), **options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_knows_the_base_that_it_was_trained_on() -> None:
    """The numbers that codes stand for are the base: floats and other codes are other weights."""
    model, x = built("linear")
    made = {k: lora_fx.insert(model, (x,), rank=2, quantise=k) for k in ("int4", "int8")}
    made["floats"] = lora_fx.insert(model, (x,), rank=2)
    for name, module in made.items():
        adapter = module.adapter()
        for other in made:
            again = lora_fx.insert(
                model, (x,), adapter=adapter, quantise=None if other == "floats" else other
            )
            said = any("trained on other weights" in n for n in again.report().notes)
            assert said is (name != other), (name, other)


class Gain(nn.Module):
    """A weight beside whose name another tensor or number stands."""

    def __init__(self, gain: object) -> None:
        super().__init__()
        self.first = nn.Linear(5, 32)
        self.weight = nn.Parameter(torch.randn(6, 32))
        if isinstance(gain, torch.Tensor) and not isinstance(gain, nn.Parameter):
            self.register_buffer("weight_scale", gain)
        else:
            self.weight_scale: Any = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.linear(self.first(x), self.weight).mT * self.weight_scale).mT


GAINS = {
    "parameter": nn.Parameter(torch.full((6, 1), 2.0)),
    "buffer": torch.full((6, 1), 2.0),
    "number": 2.0,
}


@pytest.mark.parametrize("kind", GAINS)
def test_what_stands_where_scales_would_is_the_models(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Gain(GAINS[kind]).eval(), torch.randn(3, 5)
    assert {t.key for t in lora_fx.find(model, (x,)).targets} == {"first.weight", "weight"}
    cap = quantised(capture(model, (x,)), "int4")
    assert list(forms(cap.model)) == ["first.weight"]
    assert any("has a weight_scale already" in n for n in cap.notes)
    held = {"first.weight": by_hand_16(cap)}
    out = lora_fx.insert(cap, rank=2)(x).detach().numpy()
    assert rel(out, wanted(model, held, x)) < FOLD_TOL


def by_hand_16(cap: Captured) -> np.ndarray[Any, Any]:
    """As `by_hand`, for rows of one block."""
    codes, scale = (t.numpy() for t in tensors_of(cap.model, "first.weight"))
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)[:, :5]
    return (nibbles.astype(np.float64) - 8) * scale


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model, x = built("linear")
    with torch.no_grad():
        model.weight[2, 3] = value
    with pytest.raises(LoraFxError, match="weight: it holds NaN or infinite numbers"):
        quantised(capture(model, (x,)), {"int4": THE_WEIGHT})


def test_a_kind_given_twice_names_both() -> None:
    model, x = built("linear")
    cap = capture(model, (x,))
    assert {*forms(quantised(cap, ["int4=first", f"int4={THE_WEIGHT}"]).model)} == {
        "first.weight", "weight",
    }  # fmt: skip
    with pytest.raises(LoraFxError, match=r"first\.weight: int4 and nf4 name it"):
        quantised(cap, ["int4=first", "nf4=first"])


def test_codes_are_not_trained_whole() -> None:
    _, _, cap = quantised_one("linear", "int4")
    with pytest.raises(LoraFxError, match="weight is quantised, and cannot be trained whole"):
        lora_fx.insert(cap, rank=2, include="first", also_train="weight")


def test_a_model_of_codes_alone_is_cast() -> None:
    torch.manual_seed(0)
    parts = (nn.Linear(40, 30, bias=False), nn.ReLU(), nn.Linear(30, 6, bias=False))
    x = torch.randn(3, 40)
    module = filled(lora_fx.insert(nn.Sequential(*parts).eval(), (x,), rank=2, quantise="nf4"))
    want = module(x).detach().numpy()
    half = module.half()(x.half())
    assert half.dtype == torch.float16
    assert rel(half.detach().float().numpy(), want) < 5e-3
    assert rel(module.float()(x).detach().numpy(), want) < 5e-3


def test_floats_of_zero_points_are_not_rounded_by_casts() -> None:
    model, x = built("linear")
    with torch.no_grad():
        model.weight.fill_(0.5)  # two bits hold its codes, whose zero is 128
    module = lora_fx.insert(quantised(capture(model, (x,)), {"int8": THE_WEIGHT}), rank=2)
    module.bfloat16()
    assert {b.dtype for _, b in module.named_buffers()} == {torch.float32}


def test_a_report_counts_weights_and_not_bytes() -> None:
    model, x = built("linear")
    reports = [lora_fx.insert(model, (x,), rank=2, quantise=q).report() for q in (None, "int4")]
    assert reports[0].frozen == reports[1].frozen == sum(p.numel() for p in model.parameters())


class Both(nn.Module):
    """One op that reads two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.v = nn.Linear(5, 40), nn.Parameter(torch.randn(6, 40) / 6)
        self.w = nn.Parameter(torch.randn(9, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi,po->bp", self.first(x), self.v, self.w)


def test_an_op_of_two_weights_keeps_none() -> None:
    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(3, 5)
    module = lora_fx.insert(model, (x,), rank=2, include="first", quantise="int8=re:^[vw]$")
    made = Made()
    with made:
        y = module.train()(x)
    assert len(made.weights) == 2 and all(r.expired() for r in made.weights)
    y.square().sum().backward()
    grads = [p.grad for n, p in module.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)


def test_a_batch_of_adapters_beside_codes_of_a_kernel(tmp_path: Path) -> None:
    """Codes of a kernel are numbers in the file, and rows take branches beside these."""
    _, _, cap = quantised_one("conv", "int8")
    one = filled(lora_fx.insert(cap, rank=2, include=THE_WEIGHT)).adapter()
    report = lora_fx.export(
        cap, tmp_path / "m.onnx", adapters=[one], mode="batch", provider="cpu", within=True
    )
    assert report.ok
