"""Models that people have, at the first try: each is inserted, folded, attached to and exported.

On 788628f: Counts, Autocast, Noise and Dropped were refused ("the branches differ"),
attach refused Many and Nested ("no input is named"), Loop ended in a raw TypeError and Edges in a
raw IndexError, Pixels and Empty were refused, LSTM and GRU had one length, and a row that a boolean
mask leaves out everywhere was the mean of all values in ONNX Runtime and 0 in torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.module.execution import execution_of
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)


class Counts(Layer):
    """A buffer counts the calls, and the result shows it."""

    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.n.add_(1)
        return self.lin(x) + self.n


class Autocast(Layer):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.lin(x).float()


class Noise(Layer):
    def forward(self, x: Tensor) -> Any:
        return self.lin(x + 0.1 * torch.randn_like(x))


class Dropped(Layer):
    def forward(self, x: Tensor) -> Any:
        return self.lin(F.dropout(x, 0.5, True))


class Many(Layer):
    def forward(self, *xs: Tensor) -> Any:
        return self.lin(xs[0]) + self.lin(xs[1])


class Nested(Layer):
    def forward(self, batch: dict[str, Any], ys: tuple[Tensor, Tensor]) -> Any:
        return {"out": self.lin(batch["x"]) + batch["more"][0], "b": [self.lin(y) for y in ys]}


class Loop(Layer):
    def forward(self, x: Tensor) -> Any:
        def goes_on(i: Tensor, h: Tensor) -> Tensor:
            return i < 3

        def step(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, torch.tanh(self.lin(h))

        loop: Any = torch._higher_order_ops.while_loop
        return loop(goes_on, step, (torch.tensor(0), x))[1]


class Empty(Layer):
    def forward(self, x: Tensor, more: Tensor) -> Any:
        return self.lin(torch.cat([x, more], 1))


class Edges(Layer):
    """A graph network: what one input holds are rows of the other."""

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        h = self.lin(x)
        return h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])


class Pixels(nn.Module):
    """A loss for each pixel: the labels have the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        y = self.conv(x)
        return {"loss": F.cross_entropy(y, labels), "logits": y}


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], *, batch_first: bool) -> None:
        super().__init__()
        self.r: nn.RNNBase = kind(4, 5, batch_first=batch_first, bidirectional=batch_first)
        self.out = nn.Linear(10 if batch_first else 5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.r(x)[0])


class Masked(Layer):
    """Attention with a boolean mask, from which a row may be left out everywhere."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        q = self.lin(x)[:, None]
        whole = mask[:, None, None, :].expand(-1, -1, x.shape[1], -1)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=whole)


torch.manual_seed(0)
X = torch.randn(2, 5, 4)
LEFT = torch.tensor([[True] * 5, [False] * 5])
Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]


@dataclasses.dataclass
class Inner:
    y: Tensor


@dataclasses.dataclass
class Outer:
    mean: Tensor
    inner: Inner


class Fields(Layer):
    """Dataclasses that torch does not know."""

    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return Outer(y.mean(), Inner(y))


CASES: dict[str, Case] = {
    "a dataclass of dataclasses": (Fields, (X,)),
    "a buffer counts": (Counts, (X,)),
    "autocast": (Autocast, (X,)),
    "noise": (Noise, (X,)),
    "dropout that stays on": (Dropped, (X,)),
    "*args": (Many, (X, 2 * X)),
    "nested inputs": (Nested, ({"x": X, "more": [X]}, (X, X + 1))),
    "a loop": (Loop, (X,)),
    "an empty part": (Empty, (X, X[:, :0])),
    "a graph network": (Edges, (torch.randn(6, 4), torch.randint(0, 6, (2, 9)))),
    "a loss of pixels": (Pixels, (torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8)))),
    "LSTM": (lambda: Recurrent(nn.LSTM, batch_first=True), (torch.randn(2, 6, 4),)),
    "LSTM, time first": (lambda: Recurrent(nn.LSTM, batch_first=False), (torch.randn(2, 6, 4),)),
    "GRU": (lambda: Recurrent(nn.GRU, batch_first=False), (torch.randn(2, 6, 4),)),
    "a row that is all masked": (Masked, (X, LEFT)),
}
RANDOM = ("noise", "dropout that stays on")
NARROW = ("autocast",)
"""ONNX Runtime's CPU has no product in bfloat16."""


def outputs(module: Any, args: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        made = pytree.tree_leaves(copy.deepcopy(module)(*copy.deepcopy(args)))
    return [y for y in made if isinstance(y, Tensor)]


def near(ours: list[Tensor], theirs: list[Tensor], tol: float = 1e-5) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=tol, atol=tol) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_insert_fold_attach_and_files(case: str, tmp_path: Path) -> None:
    make, args = CASES[case]
    torch.manual_seed(1)
    model = make().eval()
    tol = 2e-2 if case in NARROW else 1e-5
    module = lora_fx.insert(copy.deepcopy(model), args, rank=2)
    assert near(outputs(module, args), outputs(model, args), tol)
    perturb(module)
    adapted = outputs(module, args)
    assert not near(adapted, outputs(model, args), tol)
    explicit = copy.deepcopy(model)
    weights = dict(explicit.named_parameters())
    with torch.no_grad():
        for key, u in module.adapter().lowrank.items():
            change = u.scale * (u.b.astype(np.float64) @ u.a.astype(np.float64))
            weights[key].add_(torch.from_numpy(change.reshape(weights[key].shape)))
    assert near(adapted, outputs(explicit, args), tol)
    assert near(outputs(lora_fx.fold(copy.deepcopy(module)), args), adapted, tol)

    live = copy.deepcopy(model)
    lora_fx.attach(live, args, rank=2, adapter=module.adapter())
    assert near(outputs(live, args), adapted, tol)

    save_program(module, tmp_path / "m.pt2")
    assert near(outputs(load_program(tmp_path / "m.pt2"), args), adapted, tol)
    if case in RANDOM:
        assert any(
            "draws random numbers in eval mode" in n for n in execution_of(module).captured.notes
        )
        with pytest.raises(LoraFxError, match="draws random numbers in eval mode"):
            lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
        return
    if case in NARROW:
        return
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    names = [i.name for i in session.get_inputs()]
    feeds = {n: x.numpy() for n, x in zip(names, leaves, strict=True)}
    got = [torch.from_numpy(np.asarray(y)) for y in session.run(None, feeds)]
    assert near(got, adapted, 2e-5)
    if len(args) == 1 and case.startswith(("LSTM", "GRU")):
        longer = torch.randn(3, 11, 4)
        (y,) = session.run(None, {names[0]: longer.numpy()})
        assert near([torch.from_numpy(y)], outputs(explicit, (longer,)), 2e-5)


def test_a_recurrent_model_keeps_its_length_free() -> None:
    for kind in (nn.LSTM, nn.GRU):
        module = lora_fx.insert(Recurrent(kind, batch_first=True).eval(), CASES["LSTM"][1], rank=2)
        assert not execution_of(module).captured.pinned
        before = dict(torch.ops.aten.lstm.input.py_kernels)
    assert torch.ops.aten.lstm.input.py_kernels == before, "torch is as it was"


def test_an_input_may_be_given_under_either_name(tmp_path: Path) -> None:
    model, args = Nested().eval(), CASES["nested inputs"][1]
    module = lora_fx.insert(model, args, rank=2)
    for names in (("batch.x", "ys.1"), ("batch_x", "ys_1")):
        given = dict.fromkeys(names, X.numpy())
        report = lora_fx.export(module, tmp_path / f"{names[0]}.onnx", provider="cpu", inputs=given)
        assert report


@pytest.mark.parametrize("mode", ["merged", "switch", "load", "batch"])
def test_a_bfloat16_model_is_a_file_in_float32_and_says_so(mode: str, tmp_path: Path) -> None:
    """Its weights are the model's own; the oracle is W + s·BA of them, in fp64."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16().eval()
    args = (X.bfloat16(),)
    module = lora_fx.insert(copy.deepcopy(model), args, rank=2)
    perturb(module)
    adapter = module.adapter()
    file = tmp_path / "m.onnx"
    if mode == "merged":
        report = lora_fx.export(module, file, provider="cpu")
    else:
        report = lora_fx.export(
            model, file, mode=mode, args=args, adapters={"a": adapter}, provider="cpu"
        )
    assert report and any("the file is in float32" in w for w in report.warnings)
    exact = copy.deepcopy(model).double()
    weights = dict(exact.named_parameters())
    with torch.no_grad():
        for key, u in adapter.lowrank.items():
            change = u.scale * (u.b.astype(np.float64) @ u.a.astype(np.float64))
            if mode == "merged":  # there the sum is stored in the weight's own dtype
                w = (weights[key] + torch.from_numpy(change)).bfloat16().double()
                weights[key].copy_(w)
            else:
                weights[key].add_(torch.from_numpy(change))
        want = exact(X.bfloat16().double()).float()
    if mode == "merged":
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].type == "tensor(float)"
        (y,) = session.run(None, {"input": X.bfloat16().float().numpy()})
        assert near([torch.from_numpy(y)], [want], 1e-2)
        assert not near([torch.from_numpy(y)], [model.float()(X)], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_that_is_all_masked_is_0_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Masked().to(dtype).eval()
    module = lora_fx.insert(model, (X.to(dtype), torch.ones(2, 5, dtype=torch.bool)), rank=2)
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = X.numpy().astype(np.float16 if dtype is torch.float16 else np.float32)
    (y,) = session.run(None, {"x": x, "mask": LEFT.numpy()})
    assert np.abs(y[0]).max() > 0 and np.abs(y[1]).max() == 0


def test_bfloat16_is_kept_on_request_and_other_dtypes_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16().eval()
    module = lora_fx.insert(model, (X.bfloat16(),), rank=2)
    with pytest.raises(LoraFxError, match="ONNX Runtime cannot load it"):
        lora_fx.export(module, tmp_path / "m.onnx", provider="cpu", precision="bfloat16")
    with pytest.raises(LoraFxError, match="unknown precision 'fp8'") as error:
        lora_fx.export(module, tmp_path / "m.onnx", provider="cpu", precision="fp8")
    assert "float32, bfloat16, float16 or int8" in error.value.hint
    assert not list(tmp_path.iterdir())
    assert lora_fx.export(module, tmp_path / "h.onnx", provider="cpu", precision="float16")


def test_an_adapter_may_be_given_as_a_path(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    module = lora_fx.insert(model, (X,), rank=2)
    perturb(module)
    want = outputs(module, (X,))
    lora_fx.save_adapter(module.adapter(), tmp_path / "a")
    for path in (tmp_path / "a", str(tmp_path / "a")):
        other = lora_fx.insert(model, (X,), rank=2)
        other.load_adapter(path)
        live = copy.deepcopy(model)
        lora_fx.attach(live, (X,), adapter=path)
        inserted = lora_fx.insert(model, (X,), adapter=path)
        for made in (other, live, inserted, lora_fx.fold(model, (X,), adapter=path)):
            assert near(outputs(made, (X,)), want)
    file, many = tmp_path / "m.onnx", tmp_path / "s.onnx"
    assert lora_fx.export(model, file, (X,), adapters=tmp_path / "a", provider="cpu")
    (y,) = ort.InferenceSession(file).run(None, {"input": X.numpy()})
    assert near([torch.from_numpy(y)], want)
    ways = (("switch", path), ("switch", {"a": path}), ("load", [path]), ("batch", [path]))
    for i, (mode, given) in enumerate(ways):
        target = many.with_name(f"s{i}") / "s.onnx"
        target.parent.mkdir()
        assert lora_fx.export(model, target, (X,), mode=mode, adapters=given, provider="cpu")


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_without_heads_is_exported(rank: int, tmp_path: Path) -> None:
    class Bare(Layer):
        def forward(self, x: Tensor) -> Any:
            return F.scaled_dot_product_attention(self.lin(x), x, x, is_causal=rank == 3)

    x = X if rank == 3 else X[0]
    module = lora_fx.insert(Bare().eval(), (x,), rank=2)
    perturb(module)
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    (y,) = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    assert near([torch.from_numpy(y)], outputs(module, (x,)))


def test_colours_of_another_program_do_not_reach_a_message() -> None:
    assert one_line("\x1b[96mstep 3/3\x1b[0m\nfailed") == "step 3/3 failed"
