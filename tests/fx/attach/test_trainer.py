"""attach where the user's own class is needed: generate, Trainer, accelerate, compile, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.fx.attach.attachment import attachment
from tests.fx.attach.attached import adapter_gap, gap, randomise, snapshot, state, train
from tests.fx.train.loops import (
    STEPS,
    Rows,
    by_hand,
    by_trainer,
    fresh_accelerator,
    optimizer_of,
    peft_of,
    still,
    worst,
)
from tests.zoo.models import ZOO
from tests.zoo.shared import captured, zoo

pytestmark = pytest.mark.usefixtures(fresh_accelerator.__name__)


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama"])
def test_generate_is_the_graphs_greedy_tokens(name: str) -> None:
    cap, _, kwargs = captured(name)
    inserted = lora_fx.insert(captured(name)[0], rank=4, include="*")
    model = lora_fx.attach(cap, rank=4, include="*")
    randomise(model), randomise(inserted)
    ids = kwargs["input_ids"][:, :3]
    with attachment(model).base(), torch.no_grad():
        base = tokens(model, ids, cache=True)
    for cache in (False, True):
        got = tokens(model, ids, cache=cache)
        want = ids
        for _ in range(got.shape[1] - ids.shape[1]):
            logits = inserted(input_ids=want, attention_mask=torch.ones_like(want)).logits
            want = torch.cat([want, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(got, want)
    assert not torch.equal(base, got), "the adapter changes what is said"


def tokens(model: Any, ids: torch.Tensor, *, cache: bool) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    "name",
    [
        "hf_gpt2/1",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hf_gpt2", "hf_llama", "hf_bert")),
    ],
)
def test_trainer_gives_the_losses_of_a_plain_loop_and_of_peft(name: str, tmp_path: Path) -> None:
    data = Rows(labels=10 if name == "hf_bert" else 0)

    def build() -> Any:
        model, _, kwargs = zoo(name)
        more = {"labels": data.batch(0)["labels"][:2]} if name == "hf_bert" else {}
        return still(model), (), {**kwargs, **more}

    cap, _, example = captured(f"still {name}", build)
    model, kwargs = cap.model, {k: v for k, v in example.items() if k != "labels"}
    options: Any = {"rank": 4, "alpha": 6.0, "exclude": "lm_head" if name != "hf_bert" else None}
    inserted, looped = (lora_fx.insert(cap, **options) for _ in range(2))
    lora_fx.save_adapter(inserted.adapter(), tmp_path / "start")
    theirs = peft_of(copy.deepcopy(model), tmp_path / "start")
    was = state(model)
    lora_fx.attach(cap, **options)
    attached_loop = copy.deepcopy(model)

    hand = by_hand(attached_loop, data)
    assert hand[0] - hand[-4] > 1e-2, "something is learnt"
    assert worst(hand, by_hand(looped, data)) < 1e-5
    assert worst(hand, by_trainer(model, data, tmp_path / "t1")) < 1e-5
    assert worst(hand, by_trainer(inserted, data, tmp_path / "t2")) < 1e-5
    assert worst(hand, by_trainer(theirs, data, tmp_path / "t3")) < 1e-4

    trained = model.adapter()
    assert adapter_gap(trained, attached_loop.adapter()) < 1e-6
    assert adapter_gap(trained, inserted.adapter()) < 1e-5  # AdamW divides by small numbers
    lora_fx.save_adapter(trained, tmp_path / "trained")
    lora_fx.detach(model)
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items())
    back = peft_of(copy.deepcopy(model), tmp_path / "trained").eval()
    assert gap(attached_loop.eval()(**kwargs).logits, back(**kwargs).logits) < 1e-5


def test_trainer_with_its_own_options(tmp_path: Path) -> None:
    """Checkpointing, bf16 and saved checkpoints of a tied model work on the live model."""

    def build() -> Any:
        model, _, kwargs = zoo("hf_gpt2/1")
        return still(model), (), kwargs

    data = Rows(labels=0)
    model = lora_fx.attach(captured("still hf_gpt2/1", build)[0], rank=4)
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    want = by_trainer(plain, data, tmp_path / "a", save_strategy="steps", save_steps=STEPS)
    recomputed = by_trainer(model, data, tmp_path / "b", activation_checkpointing=True)
    assert worst(want, recomputed) < 1e-6
    assert abs(want[0] - by_trainer(again, data, tmp_path / "c", bf16=True)[0]) < 0.05
    saved = load_file(tmp_path / "a" / f"checkpoint-{STEPS}" / "model.safetensors")
    b = plain.adapter().lowrank["transformer.h.0.attn.c_attn.weight"].b
    assert np.array_equal(saved["transformer.h.0.attn.c_attn.lora_B.weight"].numpy(), b)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, _, kwargs = zoo("hf_llama/1")
    lora_fx.attach(model, (), kwargs, rank=2)
    other = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for m in (prepared, other):
        opt = optimizer if m is prepared else optimizer_of(m)
        for _ in range(3):
            loss = m(**kwargs, labels=kwargs["input_ids"]).loss
            accelerator.backward(loss) if m is prepared else loss.backward()
            opt.step()
            opt.zero_grad()
    assert adapter_gap(accelerator.unwrap_model(prepared).adapter(), other.adapter()) < 1e-7
    assert float(abs(other.adapter().lowrank["lm_head.weight"].b).max()) > 0


WHOLE = ("hf_gpt2", "hf_llama", "tv_resnet18", "mha", "bmm_experts")
SLOW = (pytest.param(n, marks=pytest.mark.slow) for n in WHOLE)
COMPILED = ["hf_llama/1", "tv_resnet18/1", "tied_head", "einsum", *SLOW]


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_a_break(name: str) -> None:
    cap, args, kwargs = captured(name)
    model = lora_fx.attach(cap, rank=2, dropout=0.1)
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (False, True):
        model.train(training)
        torch.manual_seed(0)
        want = model(*args, **kwargs)
        torch.manual_seed(0)
        assert gap(compiled(*args, **kwargs), want) < 1e-6
    model.eval()
    other = copy.deepcopy(model)
    first = train(compiled, args, kwargs, steps=2, lr=0.001)
    assert abs(first[1] - train(other, args, kwargs, steps=2, lr=0.001)[1]) < 1e-5
    torch._dynamo.reset()


def test_copies_are_independent() -> None:
    model, args, kwargs = ZOO["tied_head"].build()
    original = snapshot(copy.deepcopy(model))
    lora_fx.attach(model, args, kwargs, rank=2)
    base = model(*args)
    other = copy.deepcopy(model)
    randomise(other)
    assert gap(model(*args), base) == 0.0
    assert gap(other(*args), base) > 1e-3
    assert adapter_gap(other.adapter(), model.adapter()) > 1e-3
    lora_fx.detach(other)
    assert gap(other(*args), base) == 0.0
    assert [r[1] for r in snapshot(other)[::4]] == [r[1] for r in original[::4]]
    assert "lora_A" in model.up._modules


def test_a_copy_of_an_lstm_that_ran() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(6, 5, batch_first=True), torch.randn(2, 4, 6)
    lora_fx.attach(model, (x,), rank=2)
    randomise(model)
    want = model(x)[0]
    other = copy.deepcopy(model)
    assert gap(other(x)[0], want) == 0.0
    assert gap(copy.deepcopy(model).double()(x.double())[0], want) < 1e-6
    want.sum().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "lora_" in n)
    assert gap(lora_fx.detach(other)(x)[0], want) > 1e-3


def test_checkpointing_a_block() -> None:
    model, args, kwargs = ZOO["transformer_encoder"].build()
    lora_fx.attach(model, args, kwargs, rank=2)
    randomise(model)
    grads = []
    for again in (False, True):
        model.zero_grad()
        x = args[0]
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        x.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 16
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
