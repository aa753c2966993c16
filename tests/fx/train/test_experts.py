"""LoRA on stacked experts: X·Aᵀ per expert, then Bᵀ, and never W + B·A, in any form of the op."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.train.experts import STACKS, block, by_hand
from tests.fx.train.saved_bytes import Trunk, saved_bytes, with_peft
from tests.providers import DEVICES

WIDTH, INNER, EXPERTS = 24, 40, 5


@dataclass(frozen=True)
class Case:
    """One implementation of transformers, and the bytes that a forward keeps on the CPU."""

    implementation: str
    dtype: torch.dtype
    rank: int
    kept: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.implementation}-{dtype}-{self.rank}"


CASES = [
    Case("grouped_mm", torch.float32, 4, 46_792),
    Case("grouped_mm", torch.float32, 3, 44_376),
    Case("grouped_mm", torch.bfloat16, 8, 34_460),
    Case("grouped_mm", torch.bfloat16, 6, 34_460),  # filled up to 8, which the kernel asks for
    Case("batched_mm", torch.float32, 3, 121_800),
    Case("batched_mm", torch.bfloat16, 5, 90_048),
]
SLOW = {CASES[0], CASES[2], CASES[5]}


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return rel(got.detach().double().cpu().numpy(), want.detach().cpu().numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES], ids=str
)
def test_a_step_is_that_of_the_dense_experts(case: Case, device: str) -> None:
    pytest.importorskip("peft")
    base = block(case.implementation, WIDTH, INNER, EXPERTS).to(device, case.dtype)
    x = torch.randn(3, 7, WIDTH).to(device, case.dtype).requires_grad_()
    cap = lora_fx.capture(base, (x.detach(),))
    ours = lora_fx.insert(cap, rank=case.rank, include="experts.*").train()
    theirs = with_peft(Trunk(base, {}, (), STACKS), case.rank)
    factors = [pair for _, pair in sorted(insertion_of(ours).slots().items(), reverse=True)]
    assert sorted(insertion_of(ours).slots()) == sorted(STACKS)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in factors:
            b.copy_(torch.randn(b.shape, generator=g) * 0.1)
    assert all(p.dtype == torch.float32 for pair in factors for p in pair)
    ours(x)  # captured before anything is counted
    size, got = saved_bytes(ours, lambda: ours(x))
    most, _ = saved_bytes(theirs, lambda: theirs(x))
    print(f"\n{case}: {size} of PEFT's {most} bytes")
    assert size < most
    if device == "cpu":
        assert size == case.kept
    wide = x.detach().double().requires_grad_()
    leaves = [[p.detach().double().requires_grad_() for p in pair] for pair in factors]
    want = by_hand(base, wide, [(a, b) for a, b in leaves], 2.0)
    plain = by_hand(base, wide, [(a, 0 * b) for a, b in leaves], 2.0)
    tol = 1e-5 if case.dtype == torch.float32 else 2**-5
    assert off(plain, want) > 0.1, "the adapter decides"
    assert off(got, want) < tol
    way = torch.randn(want.shape, generator=g).to(device)
    (got.float() * way).sum().backward()
    (want * way).sum().backward()
    pairs = [(x, wide), *((p, q) for ps, qs in zip(factors, leaves, strict=True)
                          for p, q in zip(ps, qs, strict=True))]  # fmt: skip
    for mine, reference in pairs:
        assert mine.grad is not None and reference.grad is not None
        assert off(mine.grad, reference.grad) < tol
