"""Plans: what the methods are worth, against numbers gathered by torch's own hooks; the verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.plan import plan
from lora_fx.targets.budget import Budget
from lora_fx.targets.rank_methods import METHODS
from lora_fx.targets.rank_plan import read_plan
from tests.table import ROWS, Model, example

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)
    def forward(self, x):
        return self.head(self.blocks(x).mean(1))

def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.zeros(2, 3, 8),), {}
"""
space: dict[str, Any] = {}
exec(MODEL, space)
X = torch.randn(30, 3, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 9.0)
Y = torch.arange(30) % 5
DATA = [{"x": X[:18], "labels": Y[:18]}, {"x": X[18:], "labels": Y[18:]}]


def net() -> nn.Module:
    module: nn.Module = space["build"]()[0]
    return module


def seen(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x [rows, in], dy [rows, out] of the loss of one example, ∂L/∂W of one linear, fp64."""
    model = net()
    layer: Any = model.get_submodule(name)
    kept: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.update(x=args[0].detach(), y=out)

    layer.register_forward_hook(hook)
    F.cross_entropy(model(X), Y).backward()
    dy = kept["y"].grad
    assert dy is not None
    rows = [t.flatten(0, -2).double().numpy() for t in (kept["x"], dy * len(X), layer.weight.grad)]
    return rows[0], rows[1], rows[2]


def gains(method: str, key: str) -> np.ndarray[Any, Any]:
    """What a method gives a target, by the pass."""
    from lora_fx.passes.verbs.calibrate import calibrate
    from lora_fx.passes.verbs.open import capture
    from lora_fx.targets.moments import STATISTICS
    from lora_fx.targets.rank_methods import TargetStatistics

    cap = capture(net(), (X[:2],))
    target = lora_fx.find(net(), (X[:2],))[key]
    way = METHODS[method]
    moments = calibrate(cap, {key: ""}, DATA, "ce", way.wanted or STATISTICS).moments[key]
    weight = net().get_parameter(key).detach().double().numpy()
    made = way.gains(
        TargetStatistics(
            target.layout, Budget.of("params:1").cost(target, ""), moments, lambda: weight
        )
    )
    assert made is not None and made.shape == (target.layout.max_rank,)
    return made


def test_kfac_is_the_spectrum_of_output_gradients_times_the_power_of_inputs() -> None:
    for name, positions in (("blocks.0.up", 3), ("head", 1)):
        x, dy, _ = seen(name)
        sigma = np.linalg.svd(dy, compute_uv=False) ** 2 / len(dy)
        want = positions * sigma * np.square(x).sum(1).mean()
        got = gains("kfac", f"{name}.weight")
        np.testing.assert_allclose(got, want[: len(got)], rtol=1e-4, atol=1e-5 * want[0])


def test_importance_is_the_mean_of_weight_times_gradient() -> None:
    _, _, gradient = seen("blocks.1.down")
    weight = net().get_parameter("blocks.1.down.weight").detach().numpy()
    want = np.abs(weight * gradient).mean() / np.arange(1, 9)
    np.testing.assert_allclose(gains("importance", "blocks.1.down.weight"), want, rtol=1e-5)


def test_eva_is_the_share_of_the_inputs_that_is_explained() -> None:
    x, _, _ = seen("blocks.1.up")
    sigma = np.linalg.svd(x, compute_uv=False) ** 2
    np.testing.assert_allclose(
        gains("eva", "blocks.1.up.weight"), sigma / sigma.sum(), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_keeps_its_budget_and_the_scale(method: str, tmp_path: Path) -> None:
    made = plan(net(), (X[:2],), data=DATA, budget="uniform:2", method=method, scale=3.0)
    assert made.limit == 4 * 2 * 32 + 2 * 13 and 0.98 * made.limit <= made.used <= made.limit
    assert {r.alpha / r.rank for r in made.rows if r.rank} == {3.0}
    if method == "uniform":
        assert {r.rank for r in made.rows} == {2}
    else:
        assert made.examples == 30
        assert method == "eva" or len({r.rank for r in made.rows}) > 1
    made.save(tmp_path / "plan.json")
    module = lora_fx.insert(net(), (X[:2],), plan=tmp_path / "plan.json")
    assert {k: (u.rank, u.scale) for k, u in module.updates.items()} == {
        r.key: (r.rank, 3.0) for r in made.rows if r.rank
    }
    assert sum(u.a.size + u.b.size for u in module.updates.values()) == made.used
    lora_fx.save_adapter(module.adapter(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "adapter"))
    for key, update in module.updates.items():
        layer: Any = theirs.base_model.model.get_submodule(key.removesuffix(".weight"))
        assert layer.r["default"] == update.rank and layer.scaling["default"] == 3.0


def test_flops_are_those_of_the_branches() -> None:
    """2 · rows · (in + out) a rank; the budget is a share of the weight matmuls."""
    made = plan(net(), (X[:2],), data=DATA, budget="flops:25%", method="kfac")
    whole = 2 * 6 * 4 * 8 * 24 + 2 * 2 * 8 * 5
    costs = {r.key: r.cost for r in made.rows}
    assert made.limit == whole // 4 and costs["blocks.0.up.weight"] == 2 * 6 * 32
    assert costs["head.weight"] == 2 * 2 * 13 and 0.98 * made.limit <= made.used <= made.limit
    with pytest.raises(
        LoraFxError, match=r"one rank of the cheapest target 'head.weight' takes 52"
    ):
        plan(net(), (X[:2],), budget="flops:0.1%")


def test_what_a_method_cannot_read_gets_the_rank_of_uniform() -> None:
    row = next(r for r in ROWS if r.name == "gru")
    x = example(row)
    data = [{"x": x}]
    made = plan(Model(row), (x,), data=data, budget="uniform:2", method="kfac", loss=_square)
    assert [r.rank for r in made.rows] == [2, 2]
    assert any("w: method kfac finds no data for it" in n for n in made.notes)
    seen = plan(Model(row), (x,), data=data, budget="uniform:2", method="importance", loss=_square)
    assert seen.used <= seen.limit and not seen.notes


def test_a_target_that_no_gradient_reaches_has_no_rank() -> None:
    row = next(r for r in ROWS if r.name == "no_grad")
    x = example(row)
    for method in ("kfac", "importance"):
        made = plan(
            Model(row), (x,), data=[{"x": x}], budget="uniform:2", method=method, loss=_square,
            include="w,v",
        )  # fmt: skip
        ranks = {r.key: r.rank for r in made.rows}
        assert ranks == {"w": 0, "v": 4} and "w: no gradient reaches it" in made.notes
        assert made.limit == 2 * 14 + 2 * 11, "four of 11, a fifth does not fit"
        assert list(lora_fx.insert(Model(row), (x,), plan=made).updates) == ["v"]
    own = nn.Parameter(torch.ones(()))
    for loss in (_square, lambda out, labels: own * out.detach().mean()):
        with pytest.raises(LoraFxError, match="no gradient reaches any"):
            plan(Model(row), (x,), data=[{"x": x}], method="kfac", loss=loss, include="w")


def _square(out: Any, labels: Any) -> Tensor:
    value: Tensor = out.square().mean()
    return value


def test_the_head_of_a_tied_table_is_planned_without_its_lookup() -> None:
    row = next(r for r in ROWS if r.name == "tied")
    x = example(row)
    data = [{"x": x}]
    made = plan(Model(row), (x,), data=data, budget="uniform:2", method="kfac", loss=_square)
    (only,) = made.rows
    module = lora_fx.insert(Model(row), (x,), plan=made, dead="allow")
    (update,) = module.updates.values()
    assert only.key == "w@op:matmul" and update.use == "op:matmul" and update.rank == 2


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"targets": {"blocks.0.upp.weight": 3}}')
    with pytest.raises(LoraFxError, match=r"plan\.json names 'blocks.0.upp.weight'") as e:
        lora_fx.insert(net(), (X[:2],), plan=path)
    assert "blocks.0.up" in str(e.value.hint)
    path.write_text('{"targets": {"head": 6}}')
    with pytest.raises(LoraFxError, match=r"plan\.json names 'head'"):
        lora_fx.insert(net(), (X[:2],), plan=path)
    path.write_text('{"targets": {"head.weight": 6}}')
    above = r"plan\.json: rank 6 of 'head.weight' is larger than its smaller side 5"
    with pytest.raises(LoraFxError, match=above):
        lora_fx.insert(net(), (X[:2],), plan=str(path))
    with pytest.raises(LoraFxError, match="include has no effect"):
        lora_fx.insert(net(), (X[:2],), plan={"head.weight": 2}, include="head")
    for wrong in ({"method": "gora"}, {"budget": "rank:2"}, {"method": "kfac"}, {"scale": 0.0}):
        with pytest.raises(LoraFxError):
            plan(net(), (X[:2],), **wrong)


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    np.savez("data.npz", x=X.numpy(), labels=Y.numpy())
    args = ["plan", "model.py:build", "data.npz", "-o", "plan.json", "--budget", "uniform:2"]
    assert (
        run(*args, "--method", "kfac", "--json", "--report", "page.html", "--exclude", "head") == 0
    )
    result = json.loads(capsys.readouterr().out)
    want = plan(
        net(), (X[:2],), data=[{"x": X, "labels": Y}], budget="uniform:2", method="kfac",
        exclude="head",
    )  # fmt: skip
    assert read_plan("plan.json") == want.ranks
    assert {t["key"]: t["rank"] for t in result["targets"]} == {r.key: r.rank for r in want.rows}
    assert result["used"] == want.used and result["examples"] == 30
    assert "Planned" in Path("page.html").read_text()
    assert run("insert", "model.py:build", "-o", "start", "--plan", "plan.json") == 0
    trained = ["train", "model.py:build", "data.npz", "--plan", "plan.json", "--steps", "2"]
    assert run(*trained, "-o", "adapter") == 0
    for folder in ("start", "adapter"):
        low = lora_fx.load_adapter(folder).lowrank
        assert {k: u.rank for k, u in low.items()} == {r.key: r.rank for r in want.rows if r.rank}
    capsys.readouterr()
    assert run("insert", "model.py:build", "-o", "x", "--plan", "plan.json", "--rank", "4") == 2
    assert "--rank has no effect with --plan plan.json" in capsys.readouterr().err
    assert run("plan", "model.py:build", "-o", "other.json", "--method", "eva") == 2
    assert run("plan", "model.py:build", "-o", "other.json") == 0
    capsys.readouterr()
    assert run("plan", "model.py:build", "data.npz", "-o", "with_data.json") == 0
    assert "data has no effect: method 'uniform' reads none" in capsys.readouterr().err
    assert read_plan("with_data.json") == read_plan("other.json")
    assert run(*args) == 2, "plan.json exists"


class Fused(nn.Module):
    """q, k and v in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        out: Tensor = self.head(F.scaled_dot_product_attention(q, k, v).mean(1))
        return out


def test_parts_of_a_fused_weight_have_ranks_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Fused().eval()
    made = plan(model, (X[:2],), data=DATA, budget="uniform:2", method="kfac", include="q,k,v")
    assert [r.key for r in made.rows] == [f"c_attn.weight[{i}:{i + 8}]" for i in (0, 8, 16)]
    assert made.limit == 3 * 2 * 16 and made.used == made.limit
    made.save(tmp_path / "plan.json")
    module = lora_fx.insert(model, (X[:2],), plan=tmp_path / "plan.json")
    assert {k: u.rank for k, u in module.updates.items()} == {
        r.key: r.rank for r in made.rows if r.rank
    }


@pytest.mark.slow
def test_planned_ranks_are_worth_their_cost() -> None:
    """Seeds that docs/plan.md does not report; there the gains were .058 and .071.

    Of sixteen the mean has a standard error of .01: another processor, which adds in another order,
    has had .043 and .023.
    """
    pytest.importorskip("sklearn")
    from tests.benchmarks import ranks as benchmark

    runs = [benchmark.one(seed, 1, ["uniform", "kfac", "importance"]) for seed in range(200, 216)]
    for method in ("kfac", "importance"):
        gains = [run[method][0] - run["uniform"][0] for run in runs]
        assert np.mean(gains) > 0, (method, gains)
        assert all(run[method][2] <= 1728 for run in runs)
