"""find: the same answer everywhere, roles, the default plan, refusals, selectors."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.passes.find import find
from lora_fx.targets.selectors import select
from tests.zoo.models import ZOO
from tests.zoo.shared import captured

ROOT = Path(__file__).resolve().parents[2]
FAST, SLOW = ("transformer_encoder",), ("hf_gpt2", "hf_t5")
CODE = """
import json, sys, lora_fx
from tests.zoo.models import ZOO
for name in sys.argv[1:]:
    model, args, kwargs = ZOO[name].build()
    print(json.dumps(lora_fx.find(model, args, kwargs).to_json(), sort_keys=True))
"""


@functools.cache
def elsewhere(names: tuple[str, ...]) -> dict[str, str]:
    """{model: what a process of another hash seed finds}."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # ours is random, or that one
    command = [sys.executable, "-W", "ignore", "-c", CODE, *names]
    env = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_one_answer_in_every_process_mode_and_after_insert(name: str) -> None:
    answers = [elsewhere(SLOW if name in SLOW else FAST)[name]]
    cap, *_ = captured(name)
    module = lora_fx.insert(cap, rank=2)
    for found in (
        lora_fx.find(cap),
        lora_fx.find(cap, training=True),
        lora_fx.find(module),
        lora_fx.find(module, training=True),
    ):
        answers.append(json.dumps(found.to_json(), sort_keys=True))
    assert len(set(answers)) == 1


class Odd(nn.Module):
    """Weights that cannot be adapted, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, padding=1)
        self.table = nn.Parameter(torch.randn(6, 9))
        self.unused = nn.Parameter(torch.randn(4, 4))
        self.plain = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.normed(x).transpose(1, 2)).transpose(1, 2)
        return self.plain(y.unsqueeze(-1).mul(self.table).sum(-2))


def test_refusals_and_unreached_are_named() -> None:
    found = lora_fx.find(Odd().eval(), (torch.randn(2, 5, 8),))
    keys = {t.key: t.default for t in found.targets}
    assert keys == {"normed.weight~": True, "plain.weight": True}
    reasons = {r.key: r.reason for r in found.refusals}
    assert list(reasons) == ["depthwise.weight"] and "depthwise" in reasons["depthwise.weight"]
    assert "depthwise" in found["depthwise.weight"].why_not
    assert lora_fx.insert(Odd().eval(), (torch.randn(2, 5, 8),), rank=1, include="depthwise")
    assert {u.key for u in found.unreached} == {"table", "unused"}
    assert 0 < found.reached_share < 1
    text = str(found)
    for word in ("refused: depthwise.weight (conv1d)", "unreached: unused [4, 4]"):
        assert word in text


class Lm(nn.Module):
    """A tied head over a table large enough to be a vocabulary."""

    def __init__(self, vocabulary: int = 1200) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, 8)
        self.q_proj = nn.Linear(8, 8)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)})
        self.lm_head = nn.Linear(8, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        x = F.scaled_dot_product_attention(self.q_proj(x), x, x)
        x = self.mlp["down_proj"](F.gelu(self.mlp["up_proj"](x)))
        out: torch.Tensor = self.lm_head(x)
        return out


def test_default_plan_roles_and_selectors() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    found = lora_fx.find(Lm().eval(), (ids,))
    assert {t.key: (t.role, t.default) for t in found.targets} == {
        "wte.weight": ("head", False),
        "q_proj.weight": ("q", True),
        "mlp.up_proj.weight": ("up", True),
        "mlp.down_proj.weight": ("down", True),
    }
    tied = found["lm_head.weight"]
    assert tied.key == "wte.weight" and tied.uses == ("embedding", "linear")
    assert (tied.layout.in_size, tied.layout.out_size) == (8, 1200)
    for text, want in {
        "lm_head": ["wte.weight"],
        "wte": ["wte.weight"],
        "wte,lm_head": ["wte.weight"],
        "role:head": ["wte.weight@lm_head.weight"],
        "op:embedding": ["wte.weight@wte.weight"],
        "op:embedding,role:head": ["wte.weight"],
        "*_proj": ["q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
        "mlp.*": ["mlp.up_proj.weight", "mlp.down_proj.weight"],
        "mlp.up_proj.weight": ["mlp.up_proj.weight"],
        "q": ["q_proj.weight"],
        "role:up,down": ["mlp.up_proj.weight", "mlp.down_proj.weight"],
        "re:^mlp.*down": ["mlp.down_proj.weight"],
        "class:Linear": [
            "wte.weight@lm_head.weight",
            "q_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        ],
    }.items():
        assert select(found, text) == want, text


def test_a_small_tied_head_is_adapted_and_a_classifier_too() -> None:
    found = lora_fx.find(Lm(99).eval(), (torch.zeros(2, 5, dtype=torch.long),))
    assert all(t.default for t in found.targets)


def test_convolutions_are_default_where_they_carry_the_flops() -> None:
    conv = lora_fx.find(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval(),
        (torch.randn(2, 3, 8, 8),),
    )
    assert [t.default for t in conv.targets] == [True, True]
    vit = lora_fx.find(ZOO["tv_vit"].build()[0], *ZOO["tv_vit"].build()[1:])
    assert [t.why_not for t in vit.targets if t.op == "conv2d"] == [
        "convolutions carry less than half of the FLOPs"
    ]


def test_find_takes_a_graph_of_any_ir() -> None:
    model, args, kwargs = ZOO["raw_matmul"].build()
    graph = lora_fx.capture(model, args, kwargs).fx_graph()
    assert find(graph).targets == lora_fx.find(graph).targets


def test_the_result_can_be_asked_for_a_key_and_read_through() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = lora_fx.find(net, (torch.ones(2, 4),))
    assert list(found) == ["0.weight", "2.weight"]
    assert "0.weight" in found and "1.weight" not in found and 0 not in found
