"""Experts that a model computes in a loop, in a graph that holds for all values and sizes."""

from __future__ import annotations

import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.train.experts import STACKS, block, by_hand

WIDTHS = {"grouped_mm": (24, 40), "batched_mm": (10, 14)}
"""The form that is captured → width and inner width: torch's kernel wants rows of 16 bytes."""


@pytest.mark.parametrize("form", WIDTHS)
def test_a_loop_is_captured_for_all_sizes(form: str) -> None:
    width, inner = WIDTHS[form]
    loop = block("eager", width, inner, 5).bfloat16()
    cap = lora_fx.capture(loop, (torch.randn(3, 7, width).bfloat16(),))
    graph = cap.eval
    assert not cap.pinned
    assert [n for n in cap.notes if "in a loop" in n and repr(form) in n]
    assert loop.experts.config._experts_implementation == "eager"
    for rows, tokens in ((3, 7), (2, 11), (5, 2)):
        x = torch.randn(rows, tokens, width).bfloat16()
        (got,) = graph(x)
        assert rel(got.detach().float().numpy(), loop(x).detach().float().numpy()) < 2**-6


def test_insert_reaches_every_expert_of_a_loop() -> None:
    loop = block("eager", 10, 14, 5)
    ours = lora_fx.insert(loop, (torch.randn(1, 2, 10),), rank=3, include="experts.*")
    factors = [insertion_of(ours).slots()[name] for name in STACKS]
    with torch.no_grad():
        for _, b in factors:
            b.copy_(torch.randn(b.shape) * 0.2)
    for rows, tokens in ((3, 19), (2, 1)):
        x = torch.randn(rows, tokens, 10)
        wide = [(a.detach().double(), b.detach().double()) for a, b in factors]
        want = by_hand(loop, x.double(), wide, 2.0).detach().numpy()
        assert rel(ours(x).detach().double().numpy(), want) < 1e-5
        assert rel(loop(x).detach().double().numpy(), want) > 0.05, "the adapter decides"
    ours(torch.randn(3, 19, 10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.flatten(1).any(1).all() for f in factors for p in f)
