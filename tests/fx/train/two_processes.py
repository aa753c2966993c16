"""Runs that test_train_processes compares: `python -m tests.fx.train.two_processes OUT PORT...`.

Started twice, with RANK and WORLD_SIZE, it writes what each process saw of each run to OUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lora_fx
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.processes import ALONE, Elsewhere, Processes, processes
from lora_fx.fx.train.settings import Saving, Settings
from tests.fx.train.loops import loss_of_chunks
from tests.fx.train.test_loop import adapted, table
from tests.zoo.shared import captured

S = Settings(steps=100, lr=0.01, batch_size=31, checks=5)


class Tokens(nn.Module):
    """Predicts the next token; its own loss leaves out the first label and those of -100."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = self.head(torch.tanh(self.fc(self.embed(input_ids))).cumsum(1))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def tokens(n: int = 40) -> Table:
    """Texts of 2 to 8 tokens; of a third of them a single label counts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (n, 8))
    lengths = np.where(np.arange(n) % 3 == 0, 2, rng.integers(2, 9, n))
    return Table(
        {"input_ids": ids, "labels": np.where(np.arange(8) < lengths[:, None], ids, -100)}, "labels"
    )


def token_model(net: nn.Module | None = None) -> Any:
    args = (torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long))
    cap, *_ = captured("tokens", lambda: (Tokens().eval(), args))
    if net is not None:
        cap.model.load_state_dict(net.state_dict())
    return lora_fx.insert(cap, rank=2, include=["fc", "head"])


def told(model: Any, report: Any) -> dict[str, Any]:
    sums = {n: p.double().sum().item() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": report.losses,
        "validation": list(report.validation.values()),
        "before": report.before,
        "best": report.best_step,
        "warnings": report.warnings,
        "sums": sums,
    }


def plain(world: Processes) -> dict[str, Any]:
    model = adapted()
    return told(model, fit(model, table(), table(45, 1), settings=S, world=world))


def parts(world: Processes) -> dict[str, Any]:
    """Steps of 5 examples in 2 · 3 parts: one is empty, at the end of an epoch three are."""
    model = adapted(variant="lora+", also_train="fc2.bias")
    s = replace(S, steps=30, batch_size=5, accumulate=3 if world.size > 1 else 1, clip=0.1)
    return told(model, fit(model, table(33), table(7, 1), settings=s, world=world))


def labels(world: Processes) -> dict[str, Any]:
    model = token_model()
    s = replace(S, steps=30, lr=0.05, batch_size=6, accumulate=2 if world.size > 1 else 1)
    return told(model, fit(model, tokens(), tokens(10), settings=s, world=world))


def chunks(world: Processes) -> dict[str, Any]:
    """The same, and the scores of three rows at a time."""
    model = token_model()
    s = replace(S, steps=30, lr=0.05, batch_size=6)
    with loss_of_chunks():
        return told(model, fit(model, tokens(), tokens(10), settings=s, world=world))


def sums(world: Processes) -> dict[str, Any]:
    """None of one process is zero; None of all stays None."""
    like = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(1, dtype=torch.bfloat16)]
    mine = torch.full((2, 3), float(world.rank + 1))
    world.add([mine, None, None if world.rank else torch.ones(1, dtype=torch.bfloat16)], like)
    return {"sums": [None if p.grad is None else [p.grad.tolist(), str(p.dtype)] for p in like]}


def resumed(world: Processes) -> dict[str, Any]:
    """Both runs of two processes, with dropout, the second in two pieces."""
    folder = os.environ["STATE"]
    s = replace(S, steps=12, checks=4)
    model = adapted(dropout=0.3)
    whole = told(model, fit(model, table(), table(45, 1), settings=s, world=world))
    seed = torch.initial_seed()

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 8:
            raise KeyError("cut")

    try:
        saving = Saving(folder, 7)
        fit(adapted(dropout=0.3), table(), table(45, 1), "ce", s, stop, saving=saving, world=world)
    except KeyError:
        pass
    model = adapted(dropout=0.3)
    saving = Saving(resume=folder)
    report = fit(model, table(), table(45, 1), settings=s, saving=saving, world=world)
    again = told(model, report)
    return {"whole": whole, "again": again, "from": report.resumed, "seed": seed}


def failing(of: int, at: int, how: Callable[[], Any]) -> Callable[[Processes], dict[str, Any]]:
    """A run in which one process, or every one (-1), fails in a step."""

    def run(world: Processes) -> dict[str, Any]:
        calls = []

        def loss(out: Any, labels: Any) -> torch.Tensor:
            calls.append(1)
            value = nn.functional.cross_entropy(out["logits"], labels)
            fails = len(calls) == at and of in (-1, world.rank)
            return value * how() if fails else value

        data = table()
        data = Table({"x": data.columns["x"], "y": data.columns["labels"]}, "y")
        fit(adapted(), data, loss=loss, settings=replace(S, steps=5), world=world)
        return {}

    return run


def broken() -> Any:
    raise ZeroDivisionError("odd")


def refused() -> Any:
    raise LoraFxError("no such thing", "a hint", exit_code=1)


def other(world: Processes) -> dict[str, Any]:
    fit(adapted(), table(200 + world.rank), settings=S, world=world)
    return {}


def weights(world: Processes) -> dict[str, Any]:
    fit(adapted(seed=world.rank), table(), settings=S, world=world)
    return {}


def ending(world: Processes) -> dict[str, Any]:
    """The first process fails after the loop, as where it cannot write."""
    fit(adapted(), table(), settings=replace(S, steps=1), world=world)
    if world.first:
        raise OSError("disk full")
    return {}


RUNS: dict[str, Callable[[Processes], dict[str, Any]]] = {
    "plain": plain,
    "parts": parts,
    "labels": labels,
    "chunks": chunks,
    "sums": sums,
    "resumed": resumed,
    "second fails": failing(1, 3, broken),
    "second refuses": failing(1, 2, refused),
    "all nan": failing(-1, 3, lambda: torch.nan),
    "other data": other,
    "other start": weights,
    "first fails at the end": ending,
    "second dies": failing(1, 2, lambda: os._exit(9)),
}


def main(out: str, ports: list[str]) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for (name, run), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        try:
            with processes() as world:
                assert world != ALONE
                seen[name] = run(world)
        except Elsewhere as e:
            seen[name] = {"elsewhere": e.message, "code": e.exit_code}
        except Exception as e:
            code = getattr(e, "exit_code", None)
            seen[name] = {"error": f"{type(e).__name__}: {e}", "code": code}
        Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
