"""Cases that once went wrong without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank, draw
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.onnx.session import open_session
from lora_fx.passes.proofs.parity import prove, torch_run


class Of(nn.Module):
    """A function of (module, x) over parameters of given shapes."""

    def __init__(self, f: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.f = f

    def forward(self, x: torch.Tensor, flag: bool = False) -> Any:
        return self.f(self, x, flag) if self.f.__code__.co_argcount == 3 else self.f(self, x)


def random(module: Any, seed: int = 1) -> Adapter:
    new = {}
    for k, u in module.updates.items():
        a, b = draw(k, u.layout, u.rank, seed, "probe")
        new[k] = replace(u, a=a, b=b)
    return replace(module.adapter(), entries={**module.adapter().entries, **new})


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)).eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def test_a_module_with_an_adapter_is_not_adapted_again() -> None:
    m = lora_fx.insert(two(), (X,), rank=2)
    folded = lora_fx.fold(m)
    for wrong in (m, folded):
        with pytest.raises(LoraFxError, match="holds an adapter already"):
            lora_fx.insert(wrong)
    with pytest.raises(LoraFxError, match="folded already"):
        lora_fx.fold(folded, adapter=m.adapter())
    with pytest.raises(LoraFxError, match="brings its own targets"):
        lora_fx.insert(two(), (X,), adapter=m.adapter(), include="0")


def test_export_with_another_adapter_leaves_the_callers(tmp_path: Path) -> None:
    m = lora_fx.insert(two(), (X,), rank=2)
    other = random(m)
    lora_fx.export(m, tmp_path / "m.onnx", adapters=other, provider="cpu")
    assert not any(u.b.any() for u in m.adapter().lowrank.values())
    got = open_session(tmp_path / "m.onnx", "cpu").run({"input": X.numpy()})["output"]
    assert rel(got, two()(X).detach().numpy()) > 0.05
    with pytest.raises(LoraFxError, match="folded already"):
        lora_fx.export(lora_fx.fold(m), tmp_path / "n.onnx", adapters=other)


def test_a_weight_edited_in_place_is_refused() -> None:
    def edited(m: Any, x: torch.Tensor) -> torch.Tensor:
        w = m.w.clone()
        w[0] = 0
        return F.linear(x, w)

    found = lora_fx.find(Of(edited, w=(5, 8)).eval(), (X,))
    assert not found.targets and "in-place edit" in found.refusals[0].reason


def test_a_later_call_reads_the_layout_of_the_first() -> None:
    def f(m: Any, x: torch.Tensor, flag: bool) -> torch.Tensor:
        return F.linear(x, m.w) if flag else torch.tanh(x @ m.w) + F.linear(x, m.w)

    model = Of(f, w=(8, 8)).eval()
    m = lora_fx.insert(model, (X,), rank=2)
    m.load_adapter(random(m))
    delta = torch.from_numpy(m.adapter().deltas()["w"]).float()
    want = F.linear(X, model.w + delta).detach().numpy()
    assert rel(m(X, True).detach().numpy(), want) < 2e-6
    assert rel(lora_fx.fold(m)(X, True).detach().numpy(), want) < 2e-6


def test_a_later_call_may_read_the_whole_but_no_other_parts() -> None:
    def f(m: Any, x: torch.Tensor, how: int) -> torch.Tensor:
        if how == 1:
            return F.linear(x, m.w)
        if how == 2:
            return F.linear(x, m.w[2:8])
        return F.linear(x, m.w[:6]).sum(-1) + F.linear(x, m.w[6:])[:, 0]

    model = Of(f, w=(10, 8)).eval()
    m = lora_fx.insert(model, (X,), rank=2)
    assert list(m.updates) == ["w[0:6]", "w[6:10]"]
    m.load_adapter(random(m))
    wide = model.w.detach().double()
    for delta, rows in zip(m.adapter().deltas().values(), (slice(0, 6), slice(6, 10)), strict=True):
        wide[rows] += torch.from_numpy(delta)
    want = F.linear(X.double(), wide).numpy()
    for module in (m, lora_fx.fold(m)):
        assert rel(module(X, 1).detach().numpy(), want) < 1e-6
        with pytest.raises(LoraFxError, match="reads other parts"):
            module(X, 2)


def noisy(m: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = F.linear(x, m.w)
    return {"y": y, "noise": torch.sin(y * 1e3)}


def test_a_noisy_output_does_not_widen_the_gate_of_the_others() -> None:
    """sin(1000 y) has 1 000 times the rounding of y; a lost fold in y is seen."""
    m = lora_fx.insert(Of(noisy, w=(5, 8)).eval(), (X,), rank=2)
    m.load_adapter(Adapter({k: replace(u, alpha=2e-3) for k, u in random(m).lowrank.items()}))
    with m.base(), torch.no_grad():
        base = m(X)["y"].numpy()
    assert 3e-5 < rel(base, m(X)["y"].detach().numpy()) < 3e-4

    def lost(feeds: Any) -> Any:
        """The unadapted y beside the right noise: only y is wrong."""
        x = torch.from_numpy(feeds["x"])
        with torch.no_grad():
            right = m(x)
            with m.base():
                return {"y": m(x)["y"].numpy(), "noise": right["noise"].numpy()}

    assert not all(p.ok for p in prove(lost, m))
    assert all(p.ok for p in prove(torch_run(m), m))


def test_a_lost_fold_in_bfloat16_is_seen() -> None:
    """An effect between 4 and 8 epsilons passed as rounding once."""
    x, eps = X.bfloat16(), 2.0**-7
    m = lora_fx.insert(two().bfloat16(), (x,), rank=2)
    unit = random(m).lowrank
    for alpha in np.geomspace(0.005, 4, 60):
        m.load_adapter(Adapter({k: replace(u, alpha=float(alpha)) for k, u in unit.items()}))
        named = execution_of(m).sample()
        with m.base():
            base = execution_of(m).flat(named)["output"]
        if 4.5 * eps < rel(base, execution_of(m).flat(named)["output"]) < 7.5 * eps:
            break
    else:
        pytest.fail("no alpha gives an effect in the range that this test is about")
    (lost, *_) = prove(torch_run(lora_fx.fold(two().bfloat16(), (x,), adapter=nothing(m))), m)
    assert not lost.ok


def nothing(m: Any) -> Adapter:
    return Adapter({k: replace(u, b=np.zeros_like(u.b)) for k, u in m.adapter().lowrank.items()})


def test_a_function_that_branches_on_batch_1_is_right_there() -> None:
    layer = nn.Linear(8, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x)
        return y * 100 if x.shape[0] == 1 else y

    m = lora_fx.insert(f, (X,), rank=2)
    torch.testing.assert_close(m(X), f(X))
    torch.testing.assert_close(m(X[:1]), f(X[:1]))


def test_a_module_that_cannot_be_copied_is_captured_live_and_says_so() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.lock = nn.Linear(8, 4), nn.BatchNorm1d(4), threading.Lock()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.norm(self.fc(x)) * (100 if x.shape[0] == 1 else 1)
            return out

    model = Locked().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    m = lora_fx.insert(model, (X,), rank=2)
    assert "cannot be copied" in str(m.report()) and "cannot be copied" in str(
        lora_fx.find(model, (X,))
    )
    torch.testing.assert_close(m(X[:1]), model(X[:1]))
    m.train()(X).sum().backward()
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(LoraFxError, match="cannot be traced in"):
        m.to(torch.bfloat16)(X.bfloat16())


def test_whole_tensors_go_back_when_an_adapter_has_none() -> None:
    model = two()
    m = lora_fx.insert(model, (X,), rank=2, also_train="2")
    with torch.no_grad():
        m.get_parameter("2.weight").add_(1.0)
    plain = Adapter(dict(random(m).lowrank))
    assert torch.equal(lora_fx.fold(m, adapter=plain).get_parameter("2.bias"), model[2].bias)
    m.load_adapter(plain)
    assert torch.equal(m.get_parameter("2.weight"), model[2].weight)


def test_whole_tensors_are_checked_by_bind() -> None:
    cap = lora_fx.capture(two(), (X,))
    for key, shape, words in (
        ("nope.weight", (3, 3), "not in the model"),
        ("2.weight", (3, 3), "the model's is [5, 7]"),
    ):
        adapter = Adapter({key: Full(np.zeros(shape, np.float32))})
        with pytest.raises(LoraFxError) as info:
            lora_fx.verify(cap, adapter)
        assert words in info.value.message


def test_also_train_of_a_tied_alias_is_one_tensor() -> None:
    class Lm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.fc = nn.Embedding(30, 8), nn.Linear(8, 8)
            self.lm_head = nn.Linear(8, 30, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.lm_head(self.fc(self.wte(ids)))
            return out

    m = lora_fx.insert(
        Lm().eval(),
        (torch.zeros(2, 5, dtype=torch.long),),
        rank=2,
        also_train="lm_head",
        include="*",
    )
    assert list(m.updates) == ["fc.weight"] and list(m.adapter().full) == ["wte.weight"]
    m.load_adapter(m.adapter())


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: torch.einsum("bi,i->bi", x, m.v) @ m.w,
        lambda m, x: F.linear(x, m.v).unsqueeze(-1) + x @ m.w,
        lambda m, x: torch.einsum("bi,i->b", x, m.v).unsqueeze(-1) + x @ m.w,
        lambda m, x: torch.einsum("ij,ij->ij", x[:3], m.s) @ m.w,
        lambda m, x: torch.einsum("bi,io,o->bo", x, m.w, m.o) + x @ m.w,
    ],
)
def test_what_is_no_matrix_product_is_refused(f: Callable[..., Any]) -> None:
    model = Of(f, v=(8,), w=(8, 5), s=(3, 8), o=(5,)).eval()
    m = lora_fx.insert(model, (torch.randn(3, 8),), rank=2)
    assert list(m.updates) == ["w"] and insertion_of(m).found.refusals
    m.load_adapter(random(m))
    assert rel(lora_fx.fold(m)(X).detach().numpy(), m(X).detach().numpy()) < 1e-6


def test_plans_and_patterns() -> None:
    with pytest.raises(LoraFxError, match=r"rank 0 of 0\.weight"):
        lora_fx.insert(two(), (X,), plan={"0.weight": 0})
    with pytest.raises(LoraFxError, match="not a regular expression"):
        lora_fx.insert(two(), (X,), rank=2, include="re:(")
    with pytest.raises(LoraFxError, match="no weights"):
        lora_fx.fold(
            two().to("meta"),
            (X,),
            adapter=Adapter(
                {
                    "0.weight": LowRank(
                        np.zeros((2, 8), np.float32), np.zeros((7, 2), np.float32), 1.0
                    )
                }
            ),
        )


def test_a_mask_made_in_forward_computes_the_weight() -> None:
    found = lora_fx.find(
        Of(lambda m, x: F.linear(x, m.w * torch.tril(torch.ones(8, 8))), w=(8, 8)).eval(), (X,)
    )
    assert not found.unreached and [t.key for t in found.targets] == ["w~"]
