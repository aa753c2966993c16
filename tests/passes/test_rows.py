"""The key test, over every row: run(fold) = run(insert) = the explicit W + s·b·a in fp64."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.fx.capture.capture import Captured
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.open import capture
from tests.table import ROWS, Model, Row, example

RANK = 2


def captured(row: Row) -> tuple[Model, torch.Tensor, Captured]:
    return _captured(row.name)


@lru_cache
def _captured(name: str) -> tuple[Model, torch.Tensor, Captured]:
    row = next(r for r in ROWS if r.name == name)
    model, x = Model(row).eval(), example(row)
    model.requires_grad_(False)
    return model, x, capture(model, (x,))


def change(cap: Captured, use: str = "") -> dict[str, LowRank]:
    """A random update of every target, large enough to see."""
    result = {}
    for t in find(cap.fx_graph()).targets:
        a, b = draw(t.key, t.layout, RANK, 3, "probe")
        result[t.key] = LowRank(a, b * 0.5, 3.0, t.layout, use=use)
    return result


def explicit(row: Row, x: torch.Tensor, deltas: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The model in fp64 with ΔW added to the stored tensors; regions by numpy indexing."""
    model = Model(row).double()
    for key, value in deltas.items():
        if key.endswith("~"):
            model.change = torch.from_numpy(value)
            continue
        name, _, region = key.partition("[")
        index = eval(f"np.s_[{region[:-1]}]") if region else ...  # our own keys, in a test
        stored = getattr(model, name).detach().numpy()
        stored[index] += value.reshape(stored[index].shape)
    with torch.no_grad():
        return model(x if row.ids else x.double()).double().numpy()


def run(graph: Any, root: torch.nn.Module, x: torch.Tensor) -> np.ndarray[Any, Any]:
    root.__dict__.update(graph.bodies)
    with torch.no_grad():
        out = torch.fx.GraphModule(root, graph.graph)(x)
    return np.asarray(out[0].numpy())


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_found(row: Row) -> None:
    _, _, cap = captured(row)
    found = find(cap.fx_graph())
    assert tuple(t.key for t in found.targets) == row.keys
    assert row.op in found.targets[0].uses
    assert not found.refusals
    assert found.reached_share == 1.0
    assert found.flops["reached"] > 0 or row.op.startswith("embedding")


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_insert_and_fold_equal_the_explicit_sum(row: Row) -> None:
    model, x, cap = captured(row)
    updates = change(cap)
    base = explicit(row, x, {})
    want = explicit(row, x, Adapter(updates).deltas())
    assert 0.05 < rel(want, base) < 5, "a test of a no-op proves nothing"
    outputs = {}
    for step in (Insert(updates), Fold(updates)):
        root = Model(row).requires_grad_(False)
        graph = cap.fx_graph(root=root)
        assert step(graph).modified
        graph.lint()
        outputs[type(step).__name__] = run(graph, root, x)
        assert not step(graph).modified, "a second run must change nothing"
    assert rel(outputs["Insert"], want) < FOLD_TOL
    assert rel(outputs["Fold"], want) < FOLD_TOL
    assert rel(outputs["Fold"], outputs["Insert"]) < FOLD_TOL
    with torch.no_grad():  # with gradients, torch has another kernel for an LSTM
        want = model(x).numpy()
    np.testing.assert_array_equal(run(cap.fx_graph(), model, x), want)


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.name.startswith(("gath", "group"))], ids=lambda r: r.name
)
def test_another_number_of_rows(row: Row) -> None:
    """As many matrices are picked as there are rows: no size of the example may stay."""
    _, x, cap = captured(row)
    updates = change(cap)
    other = x if "as many" in row.name else torch.cat([x, -x[:3]])
    root = Model(row).requires_grad_(False)
    graph = cap.fx_graph(root=root)
    Insert(updates)(graph)
    want = explicit(row, other, Adapter(updates).deltas())
    assert rel(run(graph, root, other), want) < FOLD_TOL
    adds = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    formed = any(n.args[0].op == "get_attr" and n.args[0].target == "w" for n in adds)
    assert formed == (row.name == "gathered, turned over"), "W + s·B·A"


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_zero_b_changes_nothing(row: Row) -> None:
    model, x, cap = captured(row)
    module = lora_fx.insert(cap, rank=1, include="*", dead="allow")
    assert set(module.updates) == set(row.keys)
    with torch.no_grad():  # torch runs a GRU by another kernel where a weight wants a gradient
        np.testing.assert_array_equal(module(x).numpy(), model(x).numpy())
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1)
    with module.base(), torch.no_grad():
        np.testing.assert_array_equal(module(x).numpy(), model(x).numpy())
    assert rel(module(x).detach().numpy(), model(x).numpy()) > 1e-3


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_gradients_reach_every_factor(row: Row) -> None:
    _, x, cap = captured(row)
    module = lora_fx.insert(cap, rank=1, include="*", dead="allow")
    module.train()
    torch.manual_seed(0)
    (module(x) * torch.randn_like(module(x))).sum().backward()
    for name, p in module.named_parameters():
        if p.requires_grad and "lora_B" in name:
            alive = p.grad is not None and bool(p.grad.abs().max() > 0)
            assert alive != (name.removeprefix("lora_B.") in row.dead), name


def _transposed(u: LowRank) -> LowRank:
    """The factors of one matrix read the other way round, at the same shapes."""
    return replace(u, a=u.a[..., ::-1].copy(), b=u.b)


MUTATIONS = {
    "scale": lambda u: replace(u, alpha=u.alpha * 1.01),
    "alpha over rank": lambda u: replace(u, variant="rslora"),
    "order of in": _transposed,
    "order of out": lambda u: replace(u, b=u.b[..., ::-1, :].copy()),
}


@pytest.mark.parametrize("broken", MUTATIONS)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_broken_fold_is_seen(row: Row, broken: str) -> None:
    """Mutation test: a wrong scale, alpha, or axis order fails the key test on every row."""
    _, x, cap = captured(row)
    updates = change(cap)
    want = explicit(row, x, Adapter(updates).deltas())
    wrong = {k: MUTATIONS[broken](u) for k, u in updates.items()}
    for step in (Insert(wrong), Fold(wrong)):
        root = Model(row).requires_grad_(False)
        graph = cap.fx_graph(root=root)
        step(graph)
        assert rel(run(graph, root, x), want) > 100 * FOLD_TOL


@pytest.mark.parametrize("row", [r for r in ROWS if "[" in "".join(r.keys)], ids=lambda r: r.name)
def test_a_shifted_region_is_seen(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation test of the region's offset."""
    _, x, cap = captured(row)
    updates = change(cap)
    want = explicit(row, x, Adapter(updates).deltas())
    import lora_fx.passes.fold as fold

    original = fold.fold_value

    def shifted(base: Any, pairs: Any) -> Any:
        moved = []
        for target, low in pairs:
            region = list(target.region)
            i = next(k for k, (lo, hi) in enumerate(region) if hi - lo < base.shape[k])
            lo, hi = region[i]
            step = 1 if hi < base.shape[i] else -1
            region[i] = (lo + step, hi + step)
            moved.append((replace(target, region=tuple(region)), low))
        return original(base, moved)

    monkeypatch.setattr(fold, "fold_value", shifted)
    root = Model(row).requires_grad_(False)
    graph = cap.fx_graph(root=root)
    Fold(updates)(graph)
    assert rel(run(graph, root, x), want) > 100 * FOLD_TOL


def test_the_lookup_of_a_tied_weight_is_left_alone_by_default() -> None:
    row = next(r for r in ROWS if r.name == "tied")
    model, x, cap = captured(row)
    module = lora_fx.insert(cap, rank=2)
    (update,) = module.updates.values()
    assert update.use == "op:matmul"
    a, b = draw("w", update.layout, 2, 1, "probe")
    module.load_adapter(Adapter({"w": replace(update, a=a, b=b)}))  # as 0.1 wrote it
    w = model.w.double()
    delta = torch.from_numpy(module.adapter().deltas()["w@op:matmul"])
    want = torch.tanh(torch.nn.functional.embedding(x, w)) @ (w + delta).t()
    assert rel(module(x).detach().numpy(), want.numpy()) < FOLD_TOL
    folded = lora_fx.fold(module)
    assert rel(folded(x).numpy(), want.numpy()) < FOLD_TOL
    assert folded.folded[0].stored_as == "w_folded"
    assert folded.folded[0].grew == w.numel() * 4
    assert torch.equal(folded.w, model.w)
