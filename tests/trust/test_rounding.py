"""Rounding that is the runtime's, or turns a choice, is no difference; a wrong adapter is one.

On 1358f462 every row of TINY, BATCH_NORMS and CHOICES here was refused by one of its verbs, with
"report this model". In each of them a wrong update has to be found all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import (
    Choice,
    Gate,
    Parity,
    compare_fairly,
    demand,
    nearest_choice,
    tied,
    wide_gate,
)
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.attach.attachment import Attachment
from lora_fx.fx.capture.capture import Captured
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.proofs.attached import InGraph
from lora_fx.passes.proofs.onnx_reference import reference_of
from lora_fx.passes.proofs.parity import prove
from lora_fx.passes.proofs.run_comparison import spread
from lora_fx.passes.verbs import export_merged

ROWS = 40


class Tiny(nn.Module):
    """A head whose results are so small that one step of a sigmoid is seen beside them."""

    def __init__(self, shift: float, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 12)
        self.shift, self.last = shift, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))) + self.shift)


TINY: dict[str, Callable[[], nn.Module]] = {
    "a sigmoid of -8": lambda: Tiny(-8.0, torch.sigmoid),
    "a sigmoid of -12": lambda: Tiny(-12.0, torch.sigmoid),
    "a product of two": lambda: Tiny(-6.0, lambda y: torch.sigmoid(y) * torch.sigmoid(y.flip(-1))),
    "the most of a row": lambda: Tiny(-11.0, lambda y: torch.sigmoid(y).amax(-1)),
    "a sigmoid less its end": lambda: Tiny(11.0, lambda y: 1 - torch.sigmoid(y)),
    "a mean": lambda: Tiny(-11.0, lambda y: torch.sigmoid(y).mean(-1)),
}
TAILS: dict[str, Callable[[], nn.Module]] = {
    "a tail of softmax": lambda: Tiny(0.0, lambda y: torch.softmax(y * 9, -1)[..., :2]),
    "small weights": lambda: Tiny(0.0, lambda y: y * 1e-7),
    "a sigmoid of 0": lambda: Tiny(0.0, torch.sigmoid),
}
"""Twins, which were accepted and are held to the gate that they had."""


class Scores(nn.Module):
    """Forty scores that rounding alone orders, and what is chosen by them."""

    def __init__(self, choose: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.score, self.head = nn.Linear(16, 1, bias=False), nn.Linear(16, 5)
        self.places = nn.Parameter(torch.randn(1, ROWS, 8) * 1e-6)
        self.choose = choose

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x[:, :1] + self.places))
        return self.choose(self, hidden, self.score(hidden).squeeze(-1))


def _topk(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    values, picked = scores.topk(4, -1)
    apart = hidden + torch.arange(float(ROWS))[None, :, None]
    return m.head(apart.gather(1, picked[..., None].expand(-1, -1, 16))), values, picked


def _sort(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    order = scores.argsort(-1)
    numbers = torch.arange(float(ROWS)).expand(order.shape[0], -1)
    return numbers.gather(1, order) * m.head(hidden).sum((1, 2))[:, None]


def _argmax(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    best = scores.argmax(-1)
    return m.head(hidden) * best[:, None, None], best


def _threshold(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    above = scores > scores.mean(-1, keepdim=True)
    return (m.head(hidden) * above[..., None]).sum(1), above


def _maximum(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    best = scores.max(-1)
    return m.head(hidden) + best.indices[:, None, None], best.values


def _nonzero(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    picked = (scores[0] > scores[0].mean()).nonzero().squeeze(-1)
    return m.head(hidden[0]).index_select(0, picked), picked


CHOICES = {
    "topk": _topk,
    "argsort": _sort,
    "argmax": _argmax,
    "a threshold": _threshold,
    "max and its place": _maximum,
    "nonzero": _nonzero,
}


class Norms(nn.Module):
    """Convolutions and batch norms whose statistics are badly scaled.

    The mean is far larger than the deviation, so what the runtime folds cancels.
    """

    def __init__(self, mean: float, variance: float, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            norm = nn.BatchNorm2d(8)
            conv = nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1)
            assert norm.running_mean is not None and norm.running_var is not None
            assert conv.bias is not None
            nn.init.constant_(norm.running_var, variance)
            with torch.no_grad():
                conv.bias += mean
            nn.init.constant_(norm.running_mean, mean)
            layers += [conv, norm, nn.Tanh()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


def adapted(model: nn.Module, *args: Tensor, size: float = 0.5) -> tuple[Any, Adapter]:
    """A module with drawn values in its adapter, and the adapter."""
    module = lora_fx.insert(model.eval(), args, rank=2, include="*", dead="drop")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.normal_(0, size, generator=generator)
    return module, module.adapter()


def written(model: nn.Module, module: Any, adapter: Adapter, x: Tensor, folder: Path) -> None:
    """Every file of a model with an adapter, in each mode, and a merge of an .onnx file."""
    lora_fx.export(module, folder / "m.onnx", provider="cpu")
    for mode in ("switch", "load"):
        path, adapters = folder / f"{mode}.onnx", {f"a_{mode}": adapter}
        lora_fx.export(model, path, (x,), mode=mode, adapters=adapters, provider="cpu")
    lora_fx.export(model, folder / "b.onnx", (x,), provider="cpu")
    lora_fx.merge(folder / "b.onnx", adapter, folder / "n.onnx", run=True)


@pytest.mark.parametrize("name", TINY)
def test_a_step_of_a_sigmoid_is_no_difference(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = TINY[name]().eval(), torch.randn(2, 8)
    written(model, *adapted(model, x), x, tmp_path)


@pytest.mark.parametrize("name", TAILS)
def test_small_numbers_that_round_well_keep_their_gate(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = TAILS[name]().eval(), torch.randn(2, 8)
    module, _ = adapted(model, x)
    report = lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    assert max(p.tol for p in report.parity) < 1e-4


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_compared_by_what_they_are_among(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Scores(CHOICES[name]).eval(), torch.randn(2, 3, 8)
    module, adapter = adapted(model, x, size=1.0)
    report = lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    rows = report.details["unproven"]
    assert any(
        "depends on a choice among nearly equal numbers, which rounding changes" in row["reason"]
        for row in rows
    )
    assert max(p.tol for p in report.parity) < 1e-4
    lora_fx.export(
        model, tmp_path / "s.onnx", (x,), mode="switch", adapters={"a": adapter}, provider="cpu"
    )
    if name != "nonzero":  # whose rows are not those of the batch
        lora_fx.export(
            model, tmp_path / "b.onnx", (x,), mode="batch", adapters={"a": adapter}, provider="cpu"
        )


@pytest.mark.parametrize("name", CHOICES)
def test_the_rounding_of_a_file_is_that_of_the_choices_that_it_made(
    name: str, tmp_path: Path
) -> None:
    """Inputs moved by half a unit turn its choices, which is no rounding of what follows."""
    torch.manual_seed(0)
    model, x = Scores(CHOICES[name]).eval(), torch.randn(2, 3, 8)
    path = tmp_path / "m.onnx"
    lora_fx.export(model, path, (x,), provider="cpu")
    with reference_of(path, OnnxGraph(onnx_ir.load(path)), "cpu", None) as reference:
        run = reference.run(None)

        def turns(feeds: dict[str, Any]) -> bool:
            return max([*spread(run(feeds), run, None, feeds)][-1].values()) > 1e-2

        drawn = ({"x": torch.randn(2, 3, 8).numpy()} for _ in range(300))
        feeds = next(filter(turns, drawn))  # which they are is the processor's to say
        choices = reference.choices(None, feeds)
        rounding = [*choices.own(dict)][-1]
    assert {*run(feeds)} <= {*choices.outputs} <= {*rounding}
    assert choices.values and all(choices.among[n] for n in choices.values)
    assert 0 < max(rounding.values()) < 1e-4


class Unseen(Scores):
    """The same, where no graph shows it: a branch by a value."""

    def forward(self, x: Tensor) -> Any:
        if float(x.abs().max()) > 1e9:
            raise ValueError("too large")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Scores, Unseen])
@pytest.mark.parametrize("name", CHOICES)
def test_a_live_model_is_compared_by_what_it_chooses_among(name: str, kind: type[Scores]) -> None:
    torch.manual_seed(0)
    model, x = kind(CHOICES[name]).eval(), torch.randn(2, 3, 8)
    lora_fx.attach(model, (x,), rank=2, include="*", dead="drop")


class Chaotic(nn.Module):
    """Layers whose weights are small, and which amplify what an adapter as large as these adds."""

    def __init__(self, layer: Callable[[nn.Linear, Tensor], Tensor], alone: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(10))
        self.layer, self.alone = layer, alone
        self.first = nn.Linear(8, 16)
        for m in self.layers:
            nn.init.normal_(m.weight, 0, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.alone and float(x.abs().max()) > 1e9:
            raise ValueError("too large")
        for m in self.layers:
            y = self.layer(m, y)
        return y


CHAOTIC: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sines": lambda m, y: torch.sin(m(y)),
    "cosines": lambda m, y: torch.cos(2 * m(y)),
    "sines and what they are of": lambda m, y: 0.5 * y + torch.sin(m(y)),
    "a wave of two parts": lambda m, y: torch.sin(m(y)) * torch.cos(m(y.flip(-1))),
    "bumps": lambda m, y: torch.exp(-((m(y) - 1) ** 2)) + 0.1 * m(y).tanh(),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", CHAOTIC)
def test_a_live_model_that_drawn_updates_make_chaotic_is_compared_with_smaller_ones(
    name: str, alone: bool
) -> None:
    torch.manual_seed(0)
    model = Chaotic(CHAOTIC[name], alone).eval()
    lora_fx.attach(model, (torch.randn(2, 3, 8),), rank=2)


def other_first(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """Let the reference of attach have another update of `first` than the live model."""
    init, put, adapter_of = InGraph.__init__, InGraph.put, Attachment.adapter

    def changed(adapter: Adapter) -> Adapter:
        first = adapter.entries["first.weight"]
        assert isinstance(first, LowRank)
        other = replace(first, alpha=first.alpha * wrong)
        return replace(adapter, entries={**adapter.entries, "first.weight": other})

    def in_graph(self: InGraph, state: Attachment, cap: Captured, adapter: Adapter) -> None:
        init(self, state, cap, changed(adapter))

    monkeypatch.setattr(InGraph, "__init__", in_graph)
    monkeypatch.setattr(InGraph, "put", lambda self, u: put(self, changed(Adapter(u)).lowrank))
    monkeypatch.setattr(Attachment, "adapter", lambda self: changed(adapter_of(self)))


FACTORS = (1.01, *(pytest.param(factor, marks=pytest.mark.slow) for factor in (0.0, 0.99)))
"""What an update is multiplied by."""


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", CHAOTIC)
@pytest.mark.parametrize("wrong", FACTORS)
def test_a_wrong_branch_of_a_chaotic_live_model_is_found(
    wrong: float, name: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Chaotic(CHAOTIC[name], alone).eval()
    other_first(monkeypatch, wrong)
    with pytest.raises(LoraFxError, match="differs from the reference"):
        lora_fx.attach(model, (torch.randn(2, 3, 8),), rank=2)


@pytest.mark.parametrize("kind", [Scores, Unseen])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("wrong", FACTORS)
def test_a_wrong_branch_of_a_live_model_that_chooses_is_found(
    wrong: float, name: str, kind: type[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = kind(CHOICES[name]).eval(), torch.randn(2, 3, 8)
    other_first(monkeypatch, wrong)
    with pytest.raises(LoraFxError, match="differs from the reference"):
        lora_fx.attach(model, (x,), rank=2, include="*", dead="drop")


# |mean|/√variance is at most 3,200: times the unit of fp32 that stays below the ceiling of 1e-3.
@pytest.mark.parametrize(
    ("mean", "variance"), [(0.0, 1.0), (300.0, 1e-2), (1e3, 1e-1), (3e3, 1.0), (-300.0, 1e-2)]
)
def test_what_the_runtime_folds_is_its_rounding(
    mean: float, variance: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Norms(mean, variance).eval(), torch.randn(2, 3, 12, 12)
    written(model, *adapted(model, x, size=0.05), x, tmp_path)


def _scale(u: LowRank) -> LowRank:
    return replace(u, alpha=u.alpha * 1.5)


def _alpha(u: LowRank) -> LowRank:
    return replace(u, alpha=u.alpha / u.rank)


def _transposed(u: LowRank) -> LowRank:
    return replace(u, b=np.ascontiguousarray(u.b[..., ::-1, :]))


def _offset(u: LowRank) -> LowRank:
    return replace(u, a=np.roll(u.a, 1, -1))


def _lost(u: LowRank) -> LowRank:
    return replace(u, b=np.zeros_like(u.b))


MUTATIONS = {f.__name__[1:]: f for f in (_scale, _alpha, _transposed, _offset, _lost)}
WRONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    **{f"tiny: {n}": (make, (2, 8), 0.5) for n, make in TINY.items()},
    **{f"choice: {n}": (lambda f=f: Scores(f), (2, 3, 8), 1.0) for n, f in CHOICES.items()},  # type: ignore[misc]
    "norms": (lambda: Norms(3e3, 1e-2), (2, 3, 12, 12), 0.05),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_found_in_each(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong one is folded: by the fold's own proof, and by the file's where that is absent."""
    make, shape, size = WRONG[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(*shape)
    module, adapter = adapted(model, x, size=size)
    for mutation, change in MUTATIONS.items():
        key = next(k for k in adapter.lowrank if k.startswith(("first", "second", "body.3")))
        entries = {k: change(u) if k == key else u for k, u in adapter.lowrank.items()}
        if np.allclose(*(s.scale * s.b @ s.a for s in (entries[key], adapter.lowrank[key]))):
            continue
        wrong = lora_fx.fold(model, (x,), adapter=Adapter(entries))
        with monkeypatch.context() as patch:
            patch.setattr(export_merged, "fold", lambda _, wrong=wrong: wrong)
            with pytest.raises(NoEffectError, match="the fold differs"):
                lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
            # and where that proof is left out, the file's has to find it
            patch.setattr(export_merged, "prove", _of_the_file_alone)
            patch.setattr(export_merged, "demand", _but_of_nothing)
            with pytest.raises(LoraFxError, match=r"differs from torch|hides the adapter"):
                lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
        assert not list(tmp_path.iterdir()), mutation


FILLS = {"-1e9": -1e9, "-inf": -np.inf, "the least": float(np.finfo(np.float32).min)}
"""What masks put in the place of scores: beside it no difference of scores would be seen."""


def _masked(choose: Callable[..., Any], fill: float) -> Callable[..., Any]:
    def masked(m: Any, hidden: Tensor, scores: Tensor) -> Any:
        return choose(m, hidden, scores.masked_fill(torch.arange(scores.shape[-1]) < 3, fill))

    return masked


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", ["topk", "argmax"])
def test_masked_scores_are_chosen_from_as_others(name: str, fill: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Scores(_masked(CHOICES[name], FILLS[fill])).eval(), torch.randn(2, 3, 8)
    module, _ = adapted(model, x, size=1.0)
    lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")


class Gathers(nn.Module):
    """Its scores show in what they choose alone, and some of them are masked."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.score, self.head = nn.Linear(16, 1), nn.Linear(16, 5)
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        scores = self.score(hidden).squeeze(-1)
        best = scores.masked_fill(torch.arange(x.shape[1]) < 2, self.fill).topk(2, -1).indices
        y: Tensor = self.head(hidden.gather(1, best[..., None].expand(-1, -1, 16)))
        return y


class Masked(nn.Module):
    """Outputs of which a mask leaves some out, as actions that are not allowed."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 6)
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y.masked_fill(torch.arange(6) < 2, self.fill)


@pytest.mark.parametrize("fill", FILLS)
def test_a_wrong_update_of_masked_outputs_is_found(
    fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted on 1358f462: beside -1e9 every difference is small."""
    torch.manual_seed(0)
    model, x = Masked(FILLS[fill]).eval(), torch.randn(4, 8)
    module, adapter = adapted(model, x, size=0.5)
    lora_fx.export(module, tmp_path / "right.onnx", provider="cpu")
    entries: Any = {
        key: replace(u, alpha=u.alpha * 1.01) if key == "second.weight" else u
        for key, u in adapter.lowrank.items()
    }
    wrong = lora_fx.fold(model, (x,), adapter=Adapter(entries))
    monkeypatch.setattr(export_merged, "fold", lambda _: wrong)
    with pytest.raises(NoEffectError, match="the fold differs"):
        lora_fx.export(module, tmp_path / "wrong.onnx", provider="cpu")


@pytest.mark.parametrize("fill", FILLS)
def test_a_wrong_update_of_masked_scores_is_found(
    fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Gathers(FILLS[fill]).eval(), torch.randn(4, 9, 8)
    module: Any = lora_fx.insert(model, (x,), rank=2, include="*", dead="keep")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.normal_(0, 0.5, generator=generator)
    adapter = module.adapter()
    entries: Any = {
        key: replace(u, b=-u.b) if key == "score.weight" else u
        for key, u in adapter.lowrank.items()
    }
    wrong = lora_fx.fold(model, (x,), adapter=Adapter(entries))
    monkeypatch.setattr(export_merged, "fold", lambda _: wrong)
    with pytest.raises(NoEffectError, match="the fold differs"):
        lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    monkeypatch.setattr(export_merged, "prove", _of_the_file_alone)
    monkeypatch.setattr(export_merged, "demand", _but_of_nothing)
    with pytest.raises(LoraFxError, match="differs from torch"):
        lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")


class Inside(nn.Module):
    """A sigmoid in the midst, of whose step the small outputs show nothing."""

    def __init__(self, between: Callable[[], nn.Module], small: float) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(8, 16), between()
        self.second, self.third = nn.Linear(16, 12), nn.Linear(16, 12)
        self.small = small

    def forward(self, x: Tensor) -> Any:
        hidden = self.between(self.first(x))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.second(hidden) * self.small, self.third(hidden) * self.small


INSIDE: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: Inside(nn.SiLU, 1e-5),
    "silu, smaller": lambda: Inside(nn.SiLU, 1e-6),
    "sigmoid": lambda: Inside(nn.Sigmoid, 1e-5),
    "lstm": lambda: Inside(lambda: nn.LSTM(16, 16), 1e-5),
    "gru": lambda: Inside(lambda: nn.GRU(16, 16), 1e-5),
    "gate": lambda: Inside(lambda: nn.Sequential(nn.Linear(16, 32), nn.GLU()), 1e-5),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_sigmoid_in_the_midst_widens_no_gate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that is one part in a hundred off is found by the file's own proof."""
    torch.manual_seed(0)
    model, x = INSIDE[name]().eval(), torch.randn(2, 3, 8)
    module, adapter = adapted(model, x, size=0.2)
    lora_fx.export(module, tmp_path / "right.onnx", provider="cpu")
    entries: Any = {
        key: replace(u, alpha=u.alpha * 1.01) if key == "second.weight" else u
        for key, u in adapter.lowrank.items()
    }
    wrong = lora_fx.fold(model, (x,), adapter=Adapter(entries))
    monkeypatch.setattr(export_merged, "fold", lambda _: wrong)
    monkeypatch.setattr(export_merged, "prove", _of_the_file_alone)
    monkeypatch.setattr(export_merged, "demand", _but_of_nothing)
    with pytest.raises(LoraFxError, match="differs from torch"):
        lora_fx.export(module, tmp_path / "wrong.onnx", provider="cpu")


def _of_the_file_alone(ours: Any, reference: Any, **given: Any) -> list[Parity]:
    return [] if given["of"] == "fold" else prove(ours, reference, **given)


def _but_of_nothing(parity: Any, what: str) -> None:
    if parity:
        demand(parity, what)


@pytest.mark.parametrize(
    ("top", "effect", "most", "tells"),
    [
        (1.0, 0.5, 1e-3, np.inf),
        (1e-3, 0.5, 1e-3, np.inf),  # sixteen steps are below the ceiling
        (4e-4, 0.4, 2.384e-3, 0.1),
        (8e-6, 0.4, 0.1192, 0.1),
        (8e-6, 0.04, 0.1192, 0.01),
        (8e-6, 1e-3, 0.1192, 1e-3),  # an output that the adapter hardly moves: the ceiling
        (8e-6, 0.0, 0.1192, 0.25),  # nothing to lose
    ],
)
def test_the_gate_of_a_tiny_output_is_below_the_effect(
    top: float, effect: float, most: float, tells: float
) -> None:
    expected = np.array([top], np.float32)
    gate = wide_gate(2e-6, expected, lambda: expected * np.float32(1 - effect))
    assert gate.first == 2e-6
    assert gate.most == pytest.approx(most, rel=1e-3)
    assert gate.tells == pytest.approx(tells, rel=1e-3)


@pytest.mark.parametrize(
    ("off", "own", "ok", "blank"),
    [
        (0.005, 0.003, True, False),  # below a quarter of the effect
        (0.02, 0.01, True, True),  # rounding, but as large as what an adapter would do
        (0.02, 0.001, False, False),  # more than rounding
        (0.2, 0.9, False, False),  # more than sixteen steps
    ],
)
def test_what_rounding_hides_proves_nothing(off: float, own: float, ok: bool, blank: bool) -> None:
    want = {"y": np.array([8e-6])}
    gates = {"y": Gate(2e-6, 0.12, 0.01)}
    found = compare_fairly({"y": want["y"] * (1 + off)}, want, {}, gates, lambda: [{"y": own}])
    assert (found.ok, found.blank) == (ok, blank)


SCORE = np.array([[1.0, 1.0 + 1e-6, 0.5], [0.2, 0.9, 0.9]])


@pytest.mark.parametrize(
    ("ours", "theirs", "among", "near"),
    [
        ([0, 2], [1, 1], [SCORE], True),
        ([0, 0], [1, 1], [SCORE], False),
        ([[0, 1], [2, 1]], [[1, 0], [1, 2]], [SCORE], True),
        ([[0, 2], [2, 1]], [[1, 0], [1, 2]], [SCORE], False),
        ([True, False], [False, False], [np.array([0.5, 9.0])], True),  # beside some constant
        ([True, True], [False, False], [np.array([0.5, 9.0])], False),  # two that are far apart
        ([True, True], [True, False], [np.array([1.0, 2.0]), np.array([0.0, 2.0])], True),
        ([True, True], [True, False], [np.array([1.0, 2.0]), np.array([0.0, 1.0])], False),
        ([0, 2, 3], [0, 2, 2], [np.array([0.5, 2.1, 3.0])], True),  # a cast, at its border
        ([0, 3, 3], [0, 2, 2], [np.array([0.5, 2.1, 3.0])], False),  # two that are far apart
        ([1, 3, 3], [0, 2, 3], [np.array([0.99, 1.99, 2.0])], True),  # two borders
        ([0, 2, 4], [0, 2, 2], [np.array([0.5, 2.1, 3.0])], False),  # past the next class
        ([3, 2, 3], [3, 2, 2], [np.array([0.5, 2.1, 3.0])], False),  # classes of something else
        ([True], [False], [np.array([[1.0, 2.0]]), np.array([3.0, 4.0])], False),
        ([0, 1, 2], [0, 1], [SCORE], False),
        ([0, 7], [1, 1], [SCORE], False),
    ],
)
def test_only_near_equal_numbers_are_tied(
    ours: list[Any], theirs: list[Any], among: list[Any], near: bool
) -> None:
    assert tied(np.array(ours), np.array(theirs), among) is near


@pytest.mark.parametrize(
    ("value", "among", "name"),
    [
        ([1], {"x": [[2.0, 2.0 + 1e-5, 0.5]]}, "first"),
        ([0], {"x": [[2.0, 2.0, 0.5]]}, "first"),
        ([0], {"x": [[2.0, 2.0, 0.5]], "constant": [1.0]}, "first"),
        ([2], {"x": [[2.0, 2.0, 0.5]]}, ""),  # not the largest of them
        ([1], {"x": [[2.0, 2.1, 0.5]]}, ""),  # floats that no rounding parts
        ([[1]], {"x": [[2.0, 2.0, 0.5]]}, ""),
        ([True], {"x": [[2.0, 2.0, 0.5]]}, ""),
        ([1], {}, ""),
        ([2], {"y": [[0.5, 0.5, 2.00002]]}, "second"),
        ([True, True], {"z": [0.3, 0.7]}, "more than 0.2"),
        ([False, True], {"z": [0.3, 0.7]}, "more than 0.4"),
    ],
)
def test_a_choice_is_found_by_what_it_is_among(value: Any, among: Any, name: str) -> None:
    def choice(value: Any, **among: Any) -> Choice:
        return Choice(np.array(value), {n: np.array(v) for n, v in among.items()})

    others = {
        "second": choice([2], a=[[0.5, 0.5, 2.0]]),
        "first": choice([0], b=[[2.0, 2.0, 0.5]]),
        "more than 0.4": choice([False, True], c=[0.3, 0.7]),
        "more than 0.2": choice([True, True], d=[0.3, 0.7]),
    }
    assert nearest_choice(choice(value, **among), others) == name


def test_a_file_that_chooses_otherwise_is_another(tmp_path: Path) -> None:
    """The least is no rounding of the most, though both are near the others."""
    torch.manual_seed(0)

    def least(m: Any, hidden: Tensor, scores: Tensor) -> Any:
        values, picked = (hidden.sum(-1)).topk(2, -1, largest=False)
        return m.head(hidden), values, picked

    def most(m: Any, hidden: Tensor, scores: Tensor) -> Any:
        values, picked = (hidden.sum(-1)).topk(2, -1, largest=True)
        return m.head(hidden), values, picked

    one, x = Scores(least).eval(), torch.randn(2, 3, 8)
    one.places.data.mul_(1e6)
    other = Scores(most).eval()
    other.load_state_dict(one.state_dict())
    lora_fx.export(one, tmp_path / "m.onnx", (x,), provider="cpu")
    assert lora_fx.verify(tmp_path / "m.onnx", lora_fx.capture(one, (x,)))
    assert not lora_fx.verify(tmp_path / "m.onnx", lora_fx.capture(other, (x,)))
    assert not lora_fx.verify(lora_fx.capture(one, (x,)), lora_fx.capture(other, (x,)))
