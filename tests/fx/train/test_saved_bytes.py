"""What a step keeps for backward beside PEFT's, and that the gradients are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.train.saved_bytes import RANK, TRUNKS, Size, saved_bytes, with_peft

LIMITS = {
    ("gpt2", torch.float32): 0.45,
    ("llama", torch.float32): 0.70,
    ("vit", torch.float32): 0.70,
    ("gpt2", torch.bfloat16): 0.45,
    ("llama", torch.bfloat16): 0.45,
    ("vit", torch.bfloat16): 0.45,
}
"""Of the bytes that PEFT's default keeps."""
SLOW = {("gpt2", torch.bfloat16), ("llama", torch.bfloat16)}


def kept(model: Any, inputs: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """(bytes, gradients by name) of one step with a fixed cotangent."""
    model(**inputs)  # captured before anything is counted
    size, made = saved_bytes(model, lambda: model(**inputs).last_hidden_state)
    torch.manual_seed(2)
    (made.float() * torch.randn(made.shape)).sum().backward()
    return size, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in LIMITS],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_saved_bytes(name: str, dtype: torch.dtype) -> None:
    trunk = TRUNKS[name](Size())
    model = trunk.model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trunk.inputs.items()}
    theirs = with_peft(trunk)
    cap = lora_fx.capture(model, (), inputs)
    ours = lora_fx.insert(cap, rank=RANK, dead="allow").train()
    plain = lora_fx.insert(cap, rank=RANK, dead="allow", fast=False).train()
    names: dict[str, str] = {}
    found = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, (a, b) in insertion_of(ours).slots().items():
            module = key.removesuffix(".weight")
            one, two = (f"base_model.model.{module}.lora_{x}.default.weight" for x in "AB")
            b.copy_(torch.randn(b.shape) * 0.1)
            for mine, their in ((a, found[one]), (b, found[two])):
                assert mine.dtype == their.dtype == torch.float32
                their.copy_(mine)
            names |= {f"{module}.lora_A.weight": one, f"{module}.lora_B.weight": two}
        for (_, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            q.copy_(p) if p.requires_grad else None
    assert set(names.values()) == {n for n, p in theirs.named_parameters() if p.requires_grad}
    (size, got), (before, same), (most, want) = (kept(m, inputs) for m in (ours, plain, theirs))
    ratio = size / most
    print(f"\n{name} {dtype}: {size} of {most} bytes, {ratio:.3f}; fast=False {before / most:.3f}")
    assert ratio <= LIMITS[name, dtype] < before / most
    tol = 1e-5 if dtype == torch.float32 else 2**-4  # two paths of steps of 2⁻⁸
    for mine, their in names.items():
        for reference in (want[their], same[mine]):
            assert reference.norm() > 0
            error = float((got[mine] - reference).norm() / reference.norm())
            if dtype == torch.float32:
                error = float((got[mine] - reference).abs().max() / reference.abs().max())
            assert error <= tol, (mine, error)


def test_counting() -> None:
    net = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(net, lambda: net(x))[0] == 4 * 8 * 4, "x, and no weight"
    assert saved_bytes(net, lambda: x.exp() * x.exp())[0] == 2 * 4 * 8 * 4, "two results"
    both = copy.deepcopy(x)
    assert saved_bytes(net, lambda: both * both.view(8, 4).view(4, 8))[0] == 4 * 8 * 4, (
        "one storage"
    )
