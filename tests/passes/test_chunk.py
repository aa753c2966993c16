"""A loss in chunks beside the whole one: values, gradients, and what is kept of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.fx import loss_in_chunks
from lora_fx.fx.graph import loss_head
from lora_fx.fx.loss_in_chunks import ChunkedLoss
from lora_fx.fx.module.execution import execution_of
from tests.fx.train.saved_bytes import saved_bytes

CLASSES, WIDTH, ROWS, TOKENS, RANK = 48, 12, 3, 11, 7


class Model(nn.Module):
    """An embedding, a layer and a head, whose loss is written as transformers writes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=kind == "bias")
        if kind == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.layer(self.embed(ids)))
        logits = self.head(x)
        if self.kind == "scaled":
            logits = logits / 8.0
        if self.kind == "softcap":
            logits = torch.tanh(logits / 3.0) * 3.0
        logits = logits.float()
        if self.kind == "cut":
            scores = logits[:, :-1].reshape(-1, CLASSES)
            following = labels[:, 1:].reshape(-1)
        else:
            scores = logits.view(-1, CLASSES)
            following = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        loss = F.cross_entropy(scores, following, label_smoothing=0.1 * (self.kind == "smooth"))
        if self.kind == "read":
            loss = loss + logits.logsumexp(-1).square().mean()
        return {"loss": loss, "logits": logits}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows, and heads of few classes as wide ones."""
    monkeypatch.setattr(loss_in_chunks, "CHUNK", 5 * CLASSES)
    monkeypatch.setattr(loss_head, "LEAST_CLASSES", CLASSES)


def batch(ignored: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, CLASSES, (ROWS, TOKENS))
    labels = ids.clone()
    if ignored:
        labels[0, :6] = labels[2, 4:] = -100
    return {"ids": ids, "labels": labels}


class Largest(TorchDispatchMode):
    """The most scores that any op has made: elements of results whose last axis has the classes.

    A view makes nothing, and a matrix of WIDTH rows is the head's weight or its gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, torch.Tensor) or op.is_view or t.dim() < 2:
                continue
            if t.shape[-1] == CLASSES and t.shape[:-1] not in ((WIDTH,), (RANK,)):
                self.rows = max(self.rows, t.numel() // CLASSES)
        return out


def step(module: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any], int]:
    """(loss, gradients by name, rows of scores at most) of a step that needs the loss alone."""
    module.train()
    module.zero_grad()
    with execution_of(module).loss_alone():
        module(**inputs)  # captured before anything is watched
        with Largest() as largest:
            loss = module(**inputs)["loss"]
            loss.backward()
    return (
        loss.detach(),
        {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
        largest.rows,
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {"include": "layer"},
    "head": {"include": ["layer", "head"]},
    "trained": {"include": "layer", "also_train": "head"},
    "tied": {"include": ["layer", "head"]},
    "bias": {"include": ["layer", "head"], "also_train": "head.bias"},
    "scaled": {"include": ["layer", "head"]},
    "softcap": {"include": ["layer", "head"]},
    "smooth": {"include": "layer"},
    "cut": {"include": ["layer", "head"]},
    "quantised": {"include": ["layer", "head"], "quantise": "int8=head"},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", CASES)
def test_it_is_the_whole_loss(kind: str) -> None:
    inputs = batch()
    options: dict[str, Any] = {"rank": RANK, "dead": "allow", **CASES[kind]}
    chunked, whole = (
        lora_fx.insert(Model(kind), (), inputs, fast=fast, **options) for fast in (True, False)
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for (name, p), (_, q) in zip(
            chunked.named_parameters(), whole.named_parameters(), strict=True
        ):
            if p.requires_grad and "lora" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
                q.copy_(p)
    loss, gradients, rows = step(chunked, inputs)
    expected, expected_gradients, all_rows = step(whole, inputs)
    count = ROWS * (TOKENS - (kind == "cut"))
    assert rows <= 5 < count <= all_rows, "the scores are never whole"
    assert abs(loss - expected) <= 1e-6 * abs(expected)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        assert wanted.abs().max() > 0, name
        assert (gradient - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max()), name

    for module in (chunked, whole):
        module.eval()
    with execution_of(chunked).loss_alone(), torch.no_grad():
        out = chunked(**inputs)
    assert out["logits"] is None
    assert torch.allclose(out["loss"], whole(**inputs)["loss"], rtol=1e-6, atol=0)
    assert chunked(**inputs)["logits"].shape == (ROWS, TOKENS, CLASSES), "as ever, outside"


@pytest.mark.usefixtures("small")
def test_scores_that_are_read_stay_whole() -> None:
    inputs = batch()
    module = lora_fx.insert(Model("read"), (), inputs, rank=3, include="layer", dead="allow")
    _, _, rows = step(module, inputs)
    assert rows == ROWS * TOKENS


@pytest.fixture
def loss() -> Iterator[ChunkedLoss]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_in_chunks, "CHUNK", 16 * CLASSES)
        yield ChunkedLoss(lambda x, w: F.linear(x, w), CLASSES)


def test_what_is_kept(loss: ChunkedLoss) -> None:
    n = 200
    head = nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False)
    x = torch.randn(n, WIDTH, requires_grad=True)
    labels = torch.randint(0, CLASSES, (n,))
    got = loss.of([x], [head.weight], labels)
    assert got.grad_fn is not None
    saved = [t for t in got.grad_fn.saved_tensors if t is not head.weight]  # type: ignore[attr-defined]
    kept = sum(t.untyped_storage().nbytes() for t in saved)
    assert kept == n * 8 + 2 * n * WIDTH * 4, "labels, x, and its gradient"
    whole, expected = saved_bytes(head, lambda: loss.whole([x], [head.weight], labels))
    assert whole >= n * CLASSES * 4, "the logarithms of all shares"
    scores = x.detach().double() @ head.weight.double().T
    by_hand = (scores.logsumexp(1) - scores.gather(1, labels[:, None])[:, 0]).mean()
    assert abs(got.double() - by_hand) <= 1e-6 * by_hand
    assert abs(got - expected) <= 1e-6 * expected


def test_the_gradient_has_a_gradient(loss: ChunkedLoss) -> None:
    x = torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    w = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, CLASSES, (40,))

    def second(made: torch.Tensor) -> torch.Tensor:
        (d,) = torch.autograd.grad(made, x, create_graph=True)
        (twice,) = torch.autograd.grad(d.square().sum(), w)
        return twice

    got = second(loss.of([x], [w], labels))
    assert torch.allclose(got, second(loss.whole([x], [w], labels)), rtol=1e-10)


def test_no_label_counts(loss: ChunkedLoss) -> None:
    x, w = torch.randn(40, WIDTH), torch.randn(CLASSES, WIDTH)
    assert loss.of([x], [w], torch.full((40,), -100)).isnan(), "a mean over nothing, as torch's"
    some = torch.full((40,), -100)
    some[39] = 7
    assert torch.allclose(loss.of([x], [w], some), F.cross_entropy(x[39:] @ w.T, some[39:]))


def test_in_16_bits(loss: ChunkedLoss) -> None:
    torch.manual_seed(0)
    x = torch.randn(90, WIDTH).bfloat16().requires_grad_()
    w = torch.randn(CLASSES, WIDTH).bfloat16().requires_grad_()
    labels = torch.randint(0, CLASSES, (90,))
    both = []
    for made in (loss.of([x], [w], labels), loss.whole([x], [w], labels)):
        both.append((made, *torch.autograd.grad(made, (x, w))))
    for got, wanted in zip(*both, strict=True):
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()
