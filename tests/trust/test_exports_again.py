"""What a capture has is in every export made of it again: cuts, free sizes, sides that differ.

On 788628f the cut of `ids` was gone from the ONNX file, and adaptive pooling was written wrongly
where height and width differ. `lengths` had one size for two names in all proofs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb

Run = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(20, 4), nn.Parameter(torch.randn(16, 4))
        self.a, self.conv, self.run = nn.Linear(4, 4), nn.Conv2d(2, 4, 3, padding=1), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


CUTS: dict[str, Run] = {
    "ids": lambda m, x: m.a(m.table(x[:, :16])),
    "the last": lambda m, x: m.a(m.table(x))[:, -7:] if x.shape[1] > 7 else m.a(m.table(x)),
    "from a constant on": lambda m, x: m.a(m.table(x)[:, 3:]).sum(1),
    "narrowed": lambda m, x: m.a(m.table(x.narrow(1, 0, min(x.shape[1], 12)))),
    "split": lambda m, x: m.a(m.table(x).split(9, 1)[0]),
    "places": lambda m, x: m.a(m.table(x[:, :16]) + m.places[: x[:, :16].shape[1]]),
}
CUT_TWINS: dict[str, Run] = {
    "no cut": lambda m, x: m.a(m.table(x)),
    "one of a width": lambda m, x: m.a(m.table(x))[..., :2],
}
LENGTHS = (5, 8, 9, 10, 11, 12, 13, 15, 16, 17, 30)


def adapted(run: Run, x: Tensor, dynamic: Any = None) -> tuple[Any, nn.Module]:
    """The module of insert, and the model with W + ΔW put in by hand."""
    torch.manual_seed(0)
    model = Net(run).eval()
    module = lora_fx.insert(model, (x,), rank=2, include="re:^(a|conv)", dynamic=dynamic)
    perturb(module)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for key, delta in module.adapter().deltas().items():
            w = by_hand.get_parameter(key)
            w.add_(torch.from_numpy(np.asarray(delta)).float().view(w.shape))
    return module.eval(), by_hand


def checked(path: Path, by_hand: nn.Module, calls: list[Tensor]) -> int:
    """How many of these the file runs, without a word of lora-fx; each is right."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session, ran = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"]), 0
    for x in calls:
        try:
            got = session.run(None, {"x": x.numpy()})[0]
        except Exception:
            continue
        assert rel(got, by_hand(x).detach()) < 1e-5
        ran += 1
    return ran


@pytest.mark.parametrize("name", [*CUTS, *CUT_TWINS])
def test_a_cut_is_in_every_file(name: str, tmp_path: Path) -> None:
    calls = [torch.randint(0, 20, (2, n)) for n in LENGTHS]
    module, by_hand = adapted({**CUTS, **CUT_TWINS}[name], calls[0])
    lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    ran = checked(tmp_path / "m.onnx", by_hand, calls)
    assert ran == len(calls) or name in ("the last", "narrowed", "split", "from a constant on")
    assert ran >= 1
    save_program(module, tmp_path / "m.pt2")
    again, right = load_program(tmp_path / "m.pt2"), 0
    for x in calls:
        try:
            got = again(x)
        except lora_fx.LoraFxError:
            continue
        assert rel(got.detach(), by_hand(x).detach()) < 1e-5
        right += 1
    assert right >= ran


SIDES: dict[str, Run] = {
    "pooled to 2 × 2": lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 2),
    "pooled to 3 × 2": lambda m, x: F.adaptive_avg_pool2d(m.conv(x), (3, 2)),
    "largest of 2 × 2": lambda m, x: F.adaptive_max_pool2d(m.conv(x), 2),
    "another path where they are equal": lambda m, x: (
        m.conv(x) if x.shape[2] == x.shape[3] else -m.conv(x)
    ),
    "a frame as large as the height": lambda m, x: m.conv(x)[..., : x.shape[2]].sum((2, 3)),
    "rows as columns": lambda m, x: m.conv(x).flatten(2).view(x.shape[0], 4, x.shape[3], -1),
}
SIDE_TWINS: dict[str, Run] = {
    "turned": lambda m, x: m.conv(x).transpose(2, 3),
    "twice as large": lambda m, x: F.interpolate(m.conv(x), scale_factor=2.0),
}


@pytest.mark.parametrize("name", [*SIDES, *SIDE_TWINS])
def test_sides_that_differ_are_right_or_refused(name: str, tmp_path: Path) -> None:
    sizes = ((8, 8), (6, 9), (9, 6), (4, 7), (12, 5))
    calls = [torch.randn(2, 2, *n) for n in sizes]
    free = {"x": {2: "height", 3: "width"}}
    try:
        module, by_hand = adapted({**SIDES, **SIDE_TWINS}[name], calls[0], free)
        lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    except lora_fx.LoraFxError:
        assert name in SIDES and not list(tmp_path.iterdir())
        return
    ran = checked(tmp_path / "m.onnx", by_hand, calls)
    assert ran == len(calls) or (name in SIDES and ran)
