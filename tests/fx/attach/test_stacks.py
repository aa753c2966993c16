"""Stacks of experts on a live module: A and B beside every product, in any form of the op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.fx.attach.attachment import Attachment, attachment
from tests.fx.attach.attached import explicit, gap, randomise, snapshot
from tests.fx.train.experts import STACKS, block, by_hand
from tests.fx.train.saved_bytes import saved_bytes

WIDTH, INNER, EXPERTS = 24, 40, 5
KEPT = {"grouped_mm": 66_716, "batched_mm": 36_120, "eager": 40_824}
"""Implementation → bytes that a forward keeps; as W + s·B·A it was 1.4 to 14 times."""


def forming(state: Attachment) -> list[str]:
    """The notes on weights that are computed."""
    return [n for n in state.report().notes if "W + s·B·A at every read" in n]


@pytest.mark.parametrize("implementation", KEPT)
def test_a_step_is_that_of_the_dense_experts(implementation: str) -> None:
    base = block(implementation, WIDTH, INNER, EXPERTS)
    x = torch.randn(3, 7, WIDTH).requires_grad_()
    live = copy.deepcopy(base)
    before = snapshot(live)
    lora_fx.attach(live, (x.detach(),), rank=3, include="experts.*").train()
    randomise(live)
    size, got = saved_bytes(live, lambda: live(x))
    assert size == KEPT[implementation]
    state = attachment(live)
    assert not forming(state)
    factors = [state.slots()[name] for name in STACKS]
    wide = x.detach().double().requires_grad_()
    leaves = [[p.detach().double().requires_grad_() for p in pair] for pair in factors]
    want = by_hand(base, wide, [(a, b) for a, b in leaves], 2.0)
    assert gap(got, want) < 1e-5
    assert gap(base(x), want) > 0.05, "the adapter decides"
    way = torch.randn(want.shape)
    (got * way).sum().backward()
    (want * way).sum().backward()
    pairs = [(x, wide), *((p, q) for ps, qs in zip(factors, leaves, strict=True)
                          for p, q in zip(ps, qs, strict=True))]  # fmt: skip
    for mine, reference in pairs:
        assert gap(mine.grad, reference.grad) < 1e-5
    assert snapshot(lora_fx.detach(live)) == before


def test_decoding_and_checkpoints_in_every_form() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, vocab_size=50,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 5))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    lora_fx.attach(model, (), call, rank=3, include="experts.*")
    adapter = randomise(model)
    plain: Any = lora_fx.detach(copy.deepcopy(model))
    want = explicit(plain, adapter, (), call).logits
    assert gap(plain(**call).logits, want) > 1e-3, "the adapter decides"
    with torch.no_grad():
        for name, change in adapter.deltas().items():
            plain.get_parameter(name).add_(torch.from_numpy(change))
    decode = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    tokens = plain.generate(ids, attention_mask=call["attention_mask"], **decode)
    grads = []
    for form in KEPT:
        model.eval().set_experts_implementation(form)
        assert gap(model(**call).logits, want) < 1e-5
        made = model.generate(ids, attention_mask=call["attention_mask"], **decode)
        assert torch.equal(made, tokens)
        for again in (False, True):
            model.train().zero_grad()
            if again:
                model.activation_checkpointing_enable()
            model(**call, labels=ids).loss.backward()
            if again:
                model.activation_checkpointing_disable()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 4
    assert all(gap(g, grads[0]) < 1e-5 for g in grads)
    assert not forming(attachment(model))


class Reader(nn.Module):
    """A stack [3, 6, 8] that a forward reads in some way."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 8))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.w, x.tanh())


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "right": (lambda w, x: x @ w, False),
    "left": (lambda w, x: w.transpose(1, 2) @ x.transpose(1, 2), False),
    "bmm_turned": (lambda w, x: torch.bmm(w.transpose(-1, -2), x.mT), False),
    "metadata": (lambda w, x: torch.bmm(x.to(w.dtype), w) * (w.shape[0] - len(w) / 2), False),
    "permuted": (lambda w, x: torch.bmm(w.permute(0, 2, 1), x.mT), True),
    "added": (lambda w, x: torch.baddbmm(x.new_ones(3, 1, 8), x, w), True),
    "einsum": (lambda w, x: torch.einsum("bni,bio->bno", x, w), True),
}
"""Name → how a stack is read, and whether that needs W + s·B·A."""


@pytest.mark.parametrize("name", READS)
def test_what_no_product_explains_reads_the_sum_and_is_said(name: str) -> None:
    read, sums = READS[name]
    torch.manual_seed(0)
    model, x = Reader(read), torch.randn(3, 5, 6)
    base = model(x)
    lora_fx.attach(model, (x,), rank=2, include="*")
    adapter = randomise(model)
    got = model(x)
    assert bool(forming(attachment(model))) == sums
    want = explicit(lora_fx.detach(model), adapter, (x,))
    assert gap(got, want) < 1e-5
    assert gap(base, want) > 0.05, "the adapter decides"
