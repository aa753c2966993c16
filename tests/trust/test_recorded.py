"""Recorded runs beside the live model: where weights decide what a model does, a graph is wrong.

On 1358f462 a recorded run was proven against itself, and every verb said that all was well.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.cli import main
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.pt2.captured import open_program
from lora_fx.passes.proofs import recorded_capture as recorded
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb
from tests.trust.test_rungs import RECORDED as READING
from tests.trust.test_rungs import Two


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def ends(self, x: Tensor) -> Tensor:
        every: Tensor = sum(e(x) for e in self.experts) + self.gate(x).mean(-1, keepdim=True)
        return self.b(torch.tanh(self.a(x))) + 0.1 * every


class Converges(Net):
    """A loop that ends where a product of weights stands still."""

    def forward(self, x: Tensor) -> Tensor:
        square = self.b.weight @ self.a.weight
        v = torch.ones(4)
        for _ in range(200):
            u = square @ v
            u = u / u.norm()
            near = min((u - v).norm().item(), (u + v).norm().item())
            v = u
            if near < 1e-3:
                break
            x = 0.9 * x + 0.1 * torch.tanh(self.ends(x))
        return self.ends(x)


class LargestRows(Net):
    """The largest rows of a weight are used alone."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a.weight.abs().sum(1).topk(3).indices.tolist()
        h = torch.tanh(self.a(x))
        return self.ends(x) + h[:, rows] @ self.b.weight[:, rows].T


class LeavesEarly(Net):
    """A part is left out where a weight is short."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.ends(x)
        if self.a.weight.norm().item() > 2.0:
            y = y * 3 + torch.relu(self.b(self.a(x)))
        return y


class RoutesByWeights(Net):
    """One expert for all, chosen by the gate's own weights."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = int(self.gate.weight.sum(1).argmax())
        return self.ends(x) + 5 * self.experts[chosen](x)


class RoutesRows(Net):
    """Experts by rows, of which one that no row chose was left out; inputs decide nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.ends(x)
        chosen = self.gate(torch.ones_like(x)).argmax(-1)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if rows.numel() > 0:
                y = y.index_add(0, rows, 2 * expert(x[rows]))
        return y


class CountsSteps(Net):
    """As many steps as a sum of weights says."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(self.b.weight.abs().sum().item() * 4) % 5):
            x = torch.tanh(self.ends(x))
        return self.ends(x)


DECIDED = [Converges, LargestRows, LeavesEarly, RoutesByWeights, RoutesRows, CountsSteps]
INCLUDE = ["a", "b", "gate", "experts.*"]


def example() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", DECIDED)
def test_weights_that_decide_are_found_out(kind: type[Net]) -> None:
    model = kind().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert lora_fx.capture(model, (example(),)).recorded
    with pytest.raises(lora_fx.LoraFxError, match="depends on its weights") as found:
        lora_fx.insert(model, (example(),), rank=2, include=INCLUDE, dead="keep")
    assert found.value.exit_code == 1 and "--exclude" in found.value.hint
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "decides"),
    [(LargestRows, "a"), (LeavesEarly, "a"), (RoutesByWeights, "gate"), (CountsSteps, "b")],
)
def test_the_hint_leads_on(kind: type[Net], decides: str) -> None:
    """What decides is named, and without it the rest is taken."""
    with pytest.raises(lora_fx.LoraFxError, match=rf"its weights \({decides}.weight\)") as found:
        lora_fx.insert(kind().eval(), (example(),), rank=2, include=INCLUDE, dead="keep")
    left_out = f"{decides}.weight"
    assert f"exclude={left_out!r}" in str(found.value)
    module = lora_fx.insert(
        kind().eval(), (example(),), rank=2, include=INCLUDE, exclude=left_out, dead="keep"
    )
    assert execution_of(module).captured.recorded and f"{decides}.weight" not in module.updates


class OfABuffer(Net):
    """The order of a tensor that no adapter changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2.0, 0.0, 1.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.ends(x)[:, self.order.argsort().tolist()]


class OfAFrozenWeight(LeavesEarly):
    """The norm of a weight that is left out of the adapter."""


class OfTheGap(Net):
    """Reads weights, by a condition that none of them changes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ends(x) if self.a.weight.abs().sum().item() >= 0 else x


class TellsANorm(Net):
    """Gives a norm of a weight beside its numbers, which no update reaches: a twin."""

    def forward(self, x: Tensor) -> Any:
        y = self.ends(x)
        kept = (x.abs().sum(1) >= 0).nonzero()[:, 0]
        return {"y": y[kept] if kept.numel() > 1 else y, "norm": self.a.weight.norm() + 0 * y.sum()}


TWINS: list[tuple[type[nn.Module], Any]] = [
    *((kind, "*") for kind in READING),
    (OfABuffer, INCLUDE),
    (OfAFrozenWeight, ["b", "gate", "experts.*"]),
    (OfTheGap, INCLUDE),
    (TellsANorm, ["b", "gate", "experts.*"]),
]


@pytest.mark.parametrize(("kind", "include"), TWINS)
def test_what_weights_do_not_decide_is_taken(kind: type[nn.Module], include: Any) -> None:
    torch.manual_seed(0)
    module = lora_fx.insert(kind().eval(), (example(),), rank=2, include=include)
    assert execution_of(module).captured.recorded
    assert "was not run" not in str(module.report())
    perturb(module)
    lora_fx.fold(module)


class LoopsInTraining(Net):
    """As many steps as a norm says, where it trains; eval mode has one way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.ends(x)
        steps = int(self.a.weight.norm().item() * 3) if self.training else 0
        for _ in range(steps):
            y = 1.1 * y + 0.01
        return y


class BranchesInTraining(Net):
    """A noise of another size where a weight is long, behind a dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.25), nn.BatchNorm1d(4)

    def noise(self) -> float:
        return 2.0 if self.b.weight.norm().item() > 1.5 else 0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.drop(self.ends(x)))
        return y + self.noise() * torch.randn_like(y) if self.training else y


class PlainInTraining(BranchesInTraining):
    """A twin: weights are read, and decide nothing."""

    def noise(self) -> float:
        return 2.0 if self.b.weight.abs().sum().item() >= 0 else 0.5


@pytest.mark.parametrize(("kind", "decides"), [(LoopsInTraining, "a"), (BranchesInTraining, "b")])
def test_weights_that_decide_in_training_are_found_out(kind: type[Net], decides: str) -> None:
    model = kind().eval()
    cap = lora_fx.capture(model, (example(),))
    assert not cap.recorded
    with pytest.raises(lora_fx.LoraFxError, match=rf"its weights \({decides}.weight\)"):
        lora_fx.insert(cap, rank=2, include=INCLUDE, dead="keep")
    module = lora_fx.insert(cap, rank=2, include=INCLUDE, exclude=f"{decides}.weight", dead="keep")
    assert execution_of(module).captured.recorded_in_training
    perturb(module)
    recorded.prove_as_it_is(module)


@pytest.mark.parametrize("norm_stats", ["frozen", "update"])
def test_what_weights_do_not_decide_in_training_is_taken(norm_stats: Any) -> None:
    model = PlainInTraining().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module = lora_fx.insert(model, (example(),), rank=2, include=INCLUDE, norm_stats=norm_stats)
    assert execution_of(module).captured.recorded_in_training
    perturb(module)
    assert not recorded.prove_as_it_is(module)
    assert "was not run" not in str(module.report())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.norm.training and model.drop.training


class Threshold(Two):
    """Another path from a norm on that no drawn a and b reach."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        if self.a.weight.norm().item() > 1000:
            y = y * 2
        return y


def far() -> AdaptedModule:
    """A module whose adapter has gone over the threshold since insert."""
    torch.manual_seed(0)
    module = lora_fx.insert(Threshold().eval(), (example(),), rank=2, include="*")
    a, b = insertion_of(module).slots()["a.weight"]
    a.data += 40
    b.data += 40
    return module


VERBS: dict[str, Any] = {
    "fold": lambda module, path: lora_fx.fold(module),
    "fold an adapter": lambda module, path: lora_fx.fold(
        execution_of(module).captured, adapter=module.adapter()
    ),
    "insert": lambda module, path: lora_fx.insert(
        execution_of(module).captured, adapter=module.adapter(), dead="allow"
    ),
    "export": lambda module, path: lora_fx.export(module, path / "x.onnx"),
    "export an adapter": lambda module, path: lora_fx.export(
        execution_of(module).captured, path / "x.onnx", adapters=module.adapter()
    ),
    "switch": lambda module, path: lora_fx.export(module, path / "x.onnx", mode="switch"),
    "load": lambda module, path: lora_fx.export(
        execution_of(module).captured,
        path / "x.onnx",
        mode="load",
        adapters={"a": module.adapter()},
    ),
    "verify": lambda module, path: lora_fx.verify(module, module),
    "verify an adapter": lambda module, path: lora_fx.verify(
        execution_of(module).captured, execution_of(module).captured, adapter=module.adapter()
    ),
    "save": lambda module, path: save_program(module, path / "x.pt2"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_runs_the_live_model(verb: str, tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="depends on its weights"):
        VERBS[verb](far(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_live_model_runs_with_the_adapter_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = lora_fx.insert(OfTheGap().eval(), (example(),), rank=2, include=INCLUDE)
    perturb(module)
    seen: list[dict[str, Tensor]] = []
    run = recorded._live

    def watched(captured: Any, changed: Any, named: Any) -> Any:
        seen.append(dict(changed))
        return run(captured, changed, named)

    monkeypatch.setattr(recorded, "_live", watched)
    original = {k: v.clone() for k, v in execution_of(module).captured.model.state_dict().items()}
    lora_fx.fold(module)
    deltas = module.adapter().deltas()
    assert seen and set(seen[0]) == set(deltas)
    for name, value in seen[0].items():
        change = (value.double() - original[name].double()).numpy()
        np.testing.assert_allclose(change, deltas[name], atol=1e-6)
        assert np.abs(change).max() > 1e-2
    assert all(
        torch.equal(v, original[k])
        for k, v in execution_of(module).captured.model.state_dict().items()
    )


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_other_variants(variant: str) -> None:
    module = lora_fx.insert(
        OfTheGap().eval(), (example(),), rank=2, include=INCLUDE, variant=variant
    )
    assert "was not run" not in str(module.report())


class Weighted(Two):
    """A weight that is computed from others cannot be set in the live model."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        kept = (x.abs().sum(1) >= 0).nonzero()[:, 0]
        h = self.a(x)
        return self.b(h[kept] * 1.5 if kept.numel() > 1 else h)


def test_a_weight_that_others_read_too_is_said() -> None:
    module = lora_fx.insert(TellsANorm().eval(), (example(),), rank=2, include=INCLUDE)
    assert "of 'a.weight', which other ops read too" in str(module.report())


def test_what_could_not_be_run_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = lora_fx.insert(Weighted().eval(), (example(),), rank=2, include="a")
    said = "the live model was not run with W + s·b·a of 'a.weight~', which is computed"
    assert said in str(module.report())
    plain = lora_fx.insert(OfTheGap().eval(), (example(),), rank=2, include=INCLUDE)
    save_program(plain, tmp_path / "m.pt2")
    notes = open_program(tmp_path / "m.pt2", (), None, None).notes
    assert any("holds one recorded run, not the live model" in n for n in notes)


MODEL = """
import torch
from tests.trust.test_recorded import LargestRows, OfTheGap
def wrong():
    return LargestRows().eval(), (torch.randn(3, 4),)
def right():
    return OfTheGap().eval(), (torch.randn(3, 4),)
"""


def test_train_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((12, 4)).astype("f4")
    np.savez("data.npz", x=x, y=x[:, ::-1])
    line = "data.npz -o adapter --label y --loss mse --steps 3 --batch-size 3 --rank 2 --include a"
    codes = {}
    for name in ("wrong", "right"):
        with pytest.raises(SystemExit) as stop:
            main(["train", f"model.py:{name}", *line.split()])
        codes[name] = stop.value.code
    error = capsys.readouterr().err
    assert codes == {"wrong": 1, "right": 0} and "depends on its weights (a.weight)" in error


def test_the_original_is_as_it_was() -> None:
    model = OfTheGap().train()
    copied = copy.deepcopy(model.state_dict())
    module = lora_fx.insert(model, (example(),), rank=2, include=INCLUDE)
    assert model.training and not insertion_of(module).changes_anything()
    assert all(torch.equal(v, copied[k]) for k, v in model.state_dict().items())
