"""Every variant and every start over every row: branches = folded = W' by hand in fp64."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import slots_of, with_values
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.adapter.starts import INITS, OF_DATA, initial
from lora_fx.adapter.variant import VARIANTS, variant_of
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.nodes import is_marked
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold, fold_rows
from lora_fx.passes.insert import Insert
from lora_fx.targets.found import Found
from lora_fx.targets.plan import Entry, Plan
from lora_fx.targets.target import Target
from tests.passes.test_rows import captured, run
from tests.table import ROWS, Model, Row

TOL = 5e-6
RANK = 2


def moments(found: Found) -> dict[str, Any]:
    """Statistics as a calibration pass would bring them."""
    rng = np.random.default_rng(5)
    result = {}
    for t in found.targets:
        batch, n, m = t.layout.batch_shape, t.layout.in_size, t.layout.out_size
        x = rng.standard_normal((*batch, n + 3, n))
        gradient = rng.standard_normal((*batch, m, n))
        inputs = np.swapaxes(x, -1, -2) @ x
        result[t.key] = SimpleNamespace(inputs=inputs, gradient=gradient)
    return result


def started(cap: Any, variant: str, init: str) -> tuple[Found, dict[str, LowRank]]:
    graph = cap.fx_graph()
    found = find(graph)
    if variant == "qalora":  # the largest group that divides the inputs of all
        variant += f":{math.gcd(*(t.layout.in_size for t in found.targets))}"
    entries = {t.key: Entry(min(RANK, t.layout.max_rank), 3.0) for t in found.targets}
    updates, _ = initial(found, Plan(entries), variant, 1, init, graph.read, moments(found))
    return found, updates


def trained(key: str, low: LowRank) -> LowRank:
    """What training could have made of an update: all that trains has moved."""
    held = slots_of(key, low)
    assert low.layout is not None
    variant = variant_of(low)
    if low.variant in ("loha", "vera"):
        values = {s.field: s.value for s in held} | variant.drawn(low, key, 3)
        return with_values(low, values)
    a, b = draw(key, low.layout, low.rank - low.frozen, 3, "probe")
    a = a[..., :: a.shape[-1] // held[0].value.shape[-1]]  # of QA-LoRA one column a group
    moved = {"a": a, "b": b * np.float32(0.5 * variant_of(low).alpha(low) / low.alpha)}
    values = {s.field: moved.get(s.field, s.value) if s.trained else s.value for s in held}
    if "magnitude" in values:
        step = np.random.default_rng(2).uniform(0.7, 1.4, values["magnitude"].shape)
        values["magnitude"] = (values["magnitude"] * step).astype(np.float32)
    return with_values(low, values)


def by_hand(row: Row, t: Target, low: LowRank, stored: Array) -> Array:
    """W' of a key in its region, fp64, axis by axis of the stored tensor."""
    part = tuple(slice(lo, hi) for lo, hi in t.region)
    w = stored.astype(np.float64)[part]
    low = replace(low, alpha=float(low.alpha))
    plain = replace(low, magnitude=None, frozen=0)
    v = w + Adapter({t.key: plain}).deltas()[t.key]
    if low.magnitude is None:
        return np.asarray(v)
    layout = t.layout
    split = v.reshape(layout.shape)
    own = [*layout.batch, *layout.out]
    sides = tuple(i for i in range(split.ndim) if i not in own)
    length = np.sqrt(np.sum(split * split, axis=sides, keepdims=True))
    sizes = low.magnitude.astype(np.float64).reshape([layout.shape[i] for i in own])
    order = np.argsort(own)
    sizes = sizes.transpose(order).reshape(length.shape)
    return np.asarray((split * (sizes / length)).reshape(v.shape))


def explicit(row: Row, x: torch.Tensor, new: dict[str, tuple[Target, Array]]) -> Array:
    model = Model(row).double()
    for key, (t, value) in new.items():
        part = tuple(slice(lo, hi) for lo, hi in t.region)
        if key.endswith("~"):
            assert row.effective is not None
            model.change = torch.from_numpy(value) - row.effective(model).detach()
            continue
        getattr(model, t.parameter.name).detach().numpy()[part] = value
    with torch.no_grad():
        return np.asarray(model(x if row.ids else x.double()).double().numpy())


def refused(found: Found, init: str) -> bool:
    """A side of 1 has no even rank, and no two singular vectors."""
    return init in ("orthogonal", "lora-ga") and any(t.layout.max_rank < 2 for t in found.targets)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_branch_and_fold_are_the_weight_by_hand(row: Row, init: str) -> None:
    _, x, cap = captured(row)
    found = find(cap.fx_graph())
    if refused(found, init):
        with pytest.raises(LoraFxError):
            started(cap, "lora", init)
        return
    base = explicit(row, x, {})
    for variant in {"kaiming": tuple(VARIANTS), "pissa": ("lora", "dora")}.get(init, ("lora",)):
        _, start = started(cap, variant, init)
        for updates, moved in (
            (start, False),
            ({k: trained(k, u) for k, u in start.items()}, True),
        ):
            graph = cap.fx_graph()
            new = {
                k: (found[k], by_hand(row, found[k], u, graph.read(found[k].parameter.name)))
                for k, u in updates.items()
            }
            want = explicit(row, x, new) if moved else base
            assert not moved or rel(want, base) > 0.02, "a test of a no-op proves nothing"
            for step in (Insert(updates), Fold(updates)):
                root = Model(row).requires_grad_(False)
                before = {n: p.clone() for n, p in root.named_parameters()}
                rewritten = cap.fx_graph(root=root)
                assert step(rewritten).modified
                rewritten.lint()
                got = run(rewritten, root, x)
                assert rel(got, want) < TOL, (variant, init, type(step).__name__, moved)
                if isinstance(step, Insert):
                    assert not step(rewritten).modified
                    kept = dict(root.named_parameters())
                    assert all(torch.equal(kept[n], w) for n, w in before.items()), "the base"


class Watched(torch.fx.Interpreter):
    """Keeps every value, so that those of one run can be compared."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def changed_by(node: torch.fx.Node) -> torch.fx.Node | None:
    """The base's own value under sums that insert added; None for nodes within a branch."""
    while is_marked(node):
        if node.target is not torch.ops.aten.add.Tensor:
            return None
        node = node.all_input_nodes[0]
    return node


@pytest.mark.parametrize("init", [i for i in INITS if i not in OF_DATA])
def test_a_start_is_an_exact_zero(init: str) -> None:
    """But for orthogonal ones, b·a of which is zero to rounding, and DoRA's quotient.

    Within one run: of two runs of a product, torch may give other bits to the second.
    """
    for row in ROWS:
        _, x, cap = captured(row)
        found = find(cap.fx_graph())
        if refused(found, init) or init == "orthogonal":
            continue
        _, updates = started(cap, "lora", init)
        root = Model(row).requires_grad_(False)
        graph = cap.fx_graph(root=root)
        Insert(updates)(graph)
        root.__dict__.update(graph.bodies)
        watched = Watched(torch.fx.GraphModule(root, graph.graph))
        with torch.no_grad():
            watched.run(x)
        sums = [(n, changed_by(n)) for n in watched.seen if is_marked(n)]
        pairs = [(n, base) for n, base in sums if base is not None]
        assert pairs or graph.bodies, row.name
        for n, base in pairs:
            got, want = watched.seen[n], watched.seen[base]
            if row.name == "matmul left":  # torch gives the frozen half's product other bits
                assert rel(got.numpy(), want.numpy()) < FOLD_TOL
            else:
                assert torch.equal(got, want), (row.name, n)


def test_rows_of_dora_can_be_folded_apart() -> None:
    """A matrix is folded in blocks; where rows are not DoRA's own, in one go."""
    for name, turned in (("linear", False), ("matmul", True)):
        row = next(r for r in ROWS if r.name.startswith(name))
        _, _, cap = captured(row)
        found, start = started(cap, "dora", "kaiming")
        (key,) = start
        t, low = found[key], trained(key, start[key])
        assert (t.layout.out == (1,)) is turned
        stored = cap.fx_graph().read(t.parameter.name)
        some = fold_rows(stored, [(t, low)], slice(1, 3))
        np.testing.assert_allclose(some, by_hand(row, t, low, stored)[1:3], rtol=1e-12)


def test_variants_say_what_trains_and_how_fast() -> None:
    row = ROWS[0]
    _, _, cap = captured(row)
    fields = {}
    for name, variant in ((n, v) for n, v in VARIANTS.items() if not v.made_of):
        _, updates = started(cap, name, "pissa")
        (key,) = updates
        held = slots_of(key, updates[key])
        fields[name] = {s.field for s in held if s.trained}
        assert {s.field for s in held} >= {"a", "b", "a0", "b0"}
        rates = variant.rates(1e-3)
        assert rates["b"] / rates["a"] == (16.0 if name == "lora+" else 1.0)
    assert fields == {
        "lora": {"a", "b"}, "rslora": {"a", "b"}, "dora": {"a", "b", "magnitude"},
        "lora-fa": {"b"}, "lora+": {"a", "b"},
    }  # fmt: skip


def test_a_row_without_direction_is_no_dora() -> None:
    row = next(r for r in ROWS if r.name.startswith("linear"))
    _, _, cap = captured(row)
    graph = cap.fx_graph()
    found = find(graph)
    (t, *_) = found.targets
    zeroed = graph.read(t.parameter.name).copy()
    zeroed[1] = 0
    with pytest.raises(LoraFxError, match=f"{t.key!r}: row 1 .* zero"):
        initial(found, Plan({t.key: Entry(2, 4.0)}), "dora", 0, "kaiming", lambda name: zeroed)


def test_ranks_that_a_start_cannot_have() -> None:
    row = next(r for r in ROWS if r.name.startswith("linear"))
    _, _, cap = captured(row)
    graph = cap.fx_graph()
    found = find(graph)
    (t, *_) = found.targets
    plan = Plan({t.key: Entry(3, 6.0)})
    with pytest.raises(LoraFxError, match="even rank, not 3"):
        initial(found, plan, "lora", 0, "orthogonal")
    top = t.layout.max_rank
    plan = Plan({t.key: Entry(top, 2.0 * top)})
    updates, notes = initial(found, plan, "lora", 0, "lora-ga", moments=moments(found))
    low = updates[t.key]
    assert low.frozen == top // 2 and low.scale == 2.0 and "lowered" in notes[0]
    with pytest.raises(LoraFxError, match="calibration could not read"):
        initial(found, plan, "lora", 0, "eva", moments={})
    with pytest.raises(LoraFxError, match="unknown init 'svd'"):
        initial(found, plan, init="svd")
    with pytest.raises(LoraFxError, match="unknown variant 'boft'"):
        initial(found, plan, "boft")
    assert dataclasses.is_dataclass(low)
