"""Many adapters over one base: each has the losses and the tensors of its run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture import capture as capture_file
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.together import fit_together
from lora_fx.fx.train.train_report import TrainReport
from lora_fx.held_out import split
from lora_fx.passes.verbs.options import InsertOptions
from lora_fx.passes.verbs.shared_base import SharedBase
from lora_fx.passes.verbs.sweep import SweepRun, sweep
from lora_fx.patching import patched
from tests.anonymous_memory import give_back, watched
from tests.fx.train.test_loop import Net, table

LOSSES = 1e-6
"""The gate of losses of steps in one vmap, relative to the largest."""
ADAPTERS = 3e-5
"""The gate of A and B in float32 of steps in one vmap, as on a GPU: products of other sizes round
differently, and AdamW divides a gradient by its own size, which magnifies the rounding of small
ones. In float64 it is EXACT."""
EXACT = 1e-12


class Words(nn.Module):
    """A small transformer with dropout, whose loss is its own."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.embed = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.encoder(self.embed(x)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def words(n: int = 60) -> Table:
    x = np.random.default_rng(0).integers(0, 30, (n, 5))
    return Table({"x": x, "labels": x[:, 0] % 3}, "labels")


def net() -> Any:
    return lora_fx.capture(Net().eval(), (torch.randn(4, 8),))


def transformer(dtype: torch.dtype = torch.float32) -> Any:
    example = (torch.randint(0, 30, (4, 5)), torch.tensor([0, 1, 2, 0]))
    return lora_fx.capture(Words().to(dtype).eval(), example)


Case = tuple[Any, Table, list[InsertOptions], list[Settings]]


def runs(seeds: int = 3, **options: Any) -> tuple[list[InsertOptions], list[Settings]]:
    """Runs of two ranks and rates, with some seeds each."""
    inserted = []
    settings = []
    for rank, lr in ((2, 2e-2), (4, 5e-3)):
        for seed in range(seeds):
            inserted.append(InsertOptions(rank=rank, seed=seed, **options))
            settings.append(Settings(steps=9, batch_size=16, lr=lr, seed=seed, checks=3))
    return inserted, settings


def largest(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(
    found: Sequence[tuple[TrainReport, Adapter]], expected: Sequence[tuple[TrainReport, Adapter]]
) -> tuple[float, float]:
    """The largest relative differences of losses, and of the adapters' tensors."""
    losses = [0.0]
    tensors = [0.0]
    for (report, adapter), (own, alone) in zip(found, expected, strict=True):
        assert report.best_step == own.best_step
        losses.append(largest(report.losses, own.losses))
        losses.append(largest([*report.validation.values()], [*own.validation.values()]))
        assert adapter.entries.keys() == alone.entries.keys()
        for key, update in alone.lowrank.items():
            tensors.append(largest(adapter.lowrank[key].a, update.a))
            tensors.append(largest(adapter.lowrank[key].b, update.b))
        for key, full in alone.full.items():
            tensors.append(largest(adapter.full[key].value, full.value))
    return max(losses), max(tensors)


def alone(cap: Any, data: Table, case: tuple[list[InsertOptions], list[Settings]]) -> Any:
    """Each run by itself: its own insert, and fit."""
    training, validation = split(data, 0.2, 0)
    results = []
    for options, settings in zip(*case, strict=True):
        module = lora_fx.insert(
            cap,
            rank=None if options.plan else options.rank,
            seed=options.seed,
            also_train=options.also_train,
            plan=options.plan,
            dropout=options.dropout,
        )
        results.append((fit(module, training, validation, "ce", settings), module.adapter()))
    return results


def swept(cap: Any, data: Table, case: Any, together: int) -> list[tuple[TrainReport, Adapter]]:
    training, validation = split(data, 0.2, 0)
    planned = [SweepRun(*row) for row in zip(*case, strict=True)]
    results = {}
    for result in sweep(SharedBase(cap), planned, training, validation, together=together):
        results[result.number] = (result.report, result.module.adapter())
    return [results[number] for number in range(len(planned))]


def batched(cap: Any, data: Table, case: Any) -> list[tuple[TrainReport, Adapter]]:
    """All runs side by side, the steps of equal shapes in one vmap."""
    training, validation = split(data, 0.2, 0)
    base = SharedBase(cap)
    inserted, settings = case
    modules = [base.module(options) for options in inserted]
    reports = fit_together(modules, training, validation, "ce", settings, batched=True)
    return [(report, module.adapter()) for report, module in zip(reports, modules, strict=True)]


def are_batched(found: Sequence[tuple[TrainReport, Adapter]]) -> bool:
    return not any("not run together" in w for report, _ in found for w in report.warnings)


@pytest.mark.parametrize("also_train", [None, "fc2"])
def test_a_perceptron_at_every_number(also_train: str | None) -> None:
    cap = net()
    case = runs(also_train=also_train)
    expected = alone(cap, table(), case)
    for together in (1, 2, 8):
        assert compare(swept(cap, table(), case, together), expected) == (0.0, 0.0)
    found = batched(cap, table(), case)
    losses, tensors = compare(found, expected)
    assert losses < LOSSES and tensors < LOSSES and are_batched(found)


def test_a_transformer_with_dropout() -> None:
    """Its own dropouts, those of its attention, and those of the branches."""
    cap = transformer()
    case = runs(2, dropout=0.2, also_train="head")
    expected = alone(cap, words(), case)
    for together in (1, 2, 8):
        assert compare(swept(cap, words(), case, together), expected) == (0.0, 0.0)
    found = batched(cap, words(), case)
    losses, tensors = compare(found, expected)
    assert losses < LOSSES and tensors < ADAPTERS and are_batched(found)


def test_only_rounding_tells_a_vmap_apart() -> None:
    cap = transformer(torch.float64)
    case = runs(2, dropout=0.1)
    assert max(compare(batched(cap, words(), case), alone(cap, words(), case))) < EXACT


def test_a_plan_of_ranks_and_batches_in_parts() -> None:
    cap = transformer()
    plan = {"encoder.layers.0.linear1.weight": 2, "encoder.layers.1.linear2.weight": 5}
    options = [InsertOptions(plan=plan, seed=seed) for seed in range(3)]
    settings = [Settings(steps=6, batch_size=20, accumulate=3, seed=seed) for seed in range(3)]
    case = (options, settings)
    expected = alone(cap, words(), case)
    assert compare(swept(cap, words(), case, 3), expected) == (0.0, 0.0)
    losses, tensors = compare(batched(cap, words(), case), expected)
    assert losses < LOSSES and tensors < ADAPTERS


def test_runs_of_other_lengths_sizes_and_schedules() -> None:
    """A run that ends early leaves the others; batches of other sizes run apart."""
    cap = net()
    options = [InsertOptions(rank=2, seed=seed) for seed in range(4)]
    settings = [
        Settings(steps=4, batch_size=16),
        Settings(steps=9, batch_size=16, seed=1, schedule="linear", weight_decay=0.1),
        Settings(steps=9, batch_size=7, seed=2, optimizer="sgd", lr=0.1, clip=0.1),
        Settings(steps=9, batch_size=16, seed=3, patience=1, checks=9, lr=0.5),
    ]
    case = (options, settings)
    expected = alone(cap, table(), case)
    assert compare(swept(cap, table(), case, 4), expected) == (0.0, 0.0)
    losses, tensors = compare(batched(cap, table(), case), expected)
    assert losses < LOSSES and tensors < LOSSES


def test_the_base_is_captured_once_and_held_once() -> None:
    cap = net()
    traced: list[object] = []
    trace: Any = vars(capture_file)["trace"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        traced.append(args)
        return trace(*args, **kwargs)

    with patched(capture_file, trace=counted):
        base = SharedBase(cap)
        first = base.module(InsertOptions(rank=2, seed=0))
        before = len(traced)
        options = [InsertOptions(rank=rank, seed=seed) for rank in (2, 3) for seed in range(4)]
        modules = [base.module(own) for own in options]
        training, validation = split(table(), 0.2, 0)
        settings = Settings(steps=2)
        fit(first, training, validation, "ce", settings)
        programs = len(first._programs.compiled)
        after = len(traced)
        fit_together(modules, training, validation, "ce", [settings] * len(modules))
    assert before <= 1 and after == len(traced)
    assert all(module._programs is first._programs for module in modules)
    assert len(first._programs.compiled) == programs
    for name, parameter in first.named_parameters():
        if "lora" not in name:
            assert all(dict(m.named_parameters())[name] is parameter for m in modules)


def test_the_memory_of_many_runs_is_that_of_one() -> None:
    """Beyond one run's, at one at a time: the adapters of the finished runs."""
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(6)]
    cap = lora_fx.capture(nn.Sequential(*layers, nn.Linear(512, 3)), (torch.randn(4, 512),))
    x = np.random.default_rng(0).standard_normal((1200, 512)).astype(np.float32)
    data = Table({"input": x, "labels": x[:, :3].argmax(1)}, "labels")

    def grown(count: int) -> int:
        options = [InsertOptions(rank=4, seed=seed) for seed in range(count)]
        settings = [Settings(steps=2, batch_size=1000)] * count
        give_back()
        with watched() as grown:
            swept(cap, data, (options, settings), 1)
        return grown.peak

    grown(1)
    one = grown(1)
    assert one > 8 << 20
    assert grown(8) < 1.3 * one


def test_copies_of_insert() -> None:
    model = lora_fx.insert(net(), rank=2, seed=5, copies=3)
    assert len(model.copies) == 3 and model.copies[0] is model
    for seed, copy in enumerate(model.copies, 5):
        own = lora_fx.insert(net(), rank=2, seed=seed).adapter().lowrank
        for key, update in copy.adapter().lowrank.items():
            np.testing.assert_array_equal(update.a, own[key].a)
    with pytest.raises(LoraFxError, match="copies is 0"):
        lora_fx.insert(net(), copies=0)
    with pytest.raises(LoraFxError, match="norm_stats='update'"):
        lora_fx.insert(net(), norm_stats="update", copies=2)


def test_a_copy_with_another_scale_leaves_the_others_alone() -> None:
    first, second = lora_fx.insert(net(), rank=2, copies=2).copies
    x = torch.randn(3, 8)
    for tensors in first.tensors().values():
        nn.init.normal_(tensors["b"])
    with torch.no_grad():
        before = first(x)["logits"]
        second.load_adapter(first.adapter())
        second.scale(2.0)
        doubled = second(x)["logits"]
        second.load_adapter(lora_fx.insert(net(), rank=3, alpha=30).adapter())
        second(x)
        assert torch.equal(first(x)["logits"], before)
        assert not torch.equal(doubled, before)


def test_what_cannot_run_together_runs_apart_and_says_so() -> None:
    module = lora_fx.insert(net(), rank=2, copies=2)
    training, validation = split(table(), 0.2, 0)
    calls: list[int] = []

    def loss(out: Any, labels: Any) -> torch.Tensor:
        """A loss that gives another value each time: together it is not what it is alone."""
        calls.append(1)
        scores = out["logits"] * len(calls)
        return nn.functional.cross_entropy(scores, labels)

    settings = [Settings(steps=2)] * 2
    reports = fit_together(module.copies, training, validation, loss, settings, batched=True)
    for report in reports:
        assert any("not run together" in warning for warning in report.warnings)
        assert any("a gradient differs" in warning for warning in report.warnings)


def test_a_run_that_diverges_ends_alone() -> None:
    cap = net()
    options = [InsertOptions(rank=2, seed=seed) for seed in range(3)]
    settings = [Settings(steps=9, seed=seed, lr=1e-2) for seed in range(3)]
    settings[1] = replace(settings[1], lr=1e30, optimizer="sgd", clip=0, schedule="constant")
    kept = ([options[0], options[2]], [settings[0], settings[2]])
    expected = alone(cap, table(), kept)
    case = (options, settings)
    for found, gate in ((swept(cap, table(), case, 3), 0.0), (batched(cap, table(), case), LOSSES)):
        error = found[1][0].error
        assert (error is not None and "is nan" in error) or "is inf" in str(error)
        assert max(compare([found[0], found[2]], expected)) <= gate
