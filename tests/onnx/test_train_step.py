"""Mode train: twenty steps in ONNX Runtime are those of torch.optim on the adapted module."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.train.differentiable_ops import DIFFERENTIABLE, bags, product
from lora_fx.fx.train.gradient_ops import average_backward
from lora_fx.fx.train.objective import scores_of
from lora_fx.fx.train.seeded_dropout import attention_with_dropout, dropped
from lora_fx.onnx import Session, TrainSession
from lora_fx.passes.proofs.proof_inputs import arrays_of
from tests.providers import PROVIDERS
from tests.zoo.models import ZOO


@dataclass
class Out:
    """What a model of transformers gives."""

    logits: Tensor
    loss: Tensor | None = None


register_dataclass(Out)
aten = torch.ops.aten
LR, STEPS, CLIP = 2e-3, 20, 0.1


class Mlp(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop = nn.Linear(8, 12), nn.LayerNorm(12), nn.Dropout(p)
        self.b = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


class Numbered(Mlp):
    """A loss first and the scores after it, by no name."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y.mean(), y


class Strided(nn.Module):
    """A convolution whose stride leaves more or less over at the end, as a free length has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 9)
        self.conv = nn.Conv1d(9, 10, 3, stride=2, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv(self.first(x).mT)).mean(2))


class Convolutions(nn.Module):
    """Strides that leave a rest, groups, dilation, a transposed one, a batch norm, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, (3, 2), groups=2, padding=1, dilation=(1, 2))
        self.c = nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.norm(self.a(x))), 2)
        return self.head(F.silu(self.c(self.b(h))).mean((2, 3)))


class Raw(nn.Module):
    """Bare products, an einsum, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.w = nn.Parameter(torch.randn(8, 6) * 0.4)
        self.u = nn.Parameter(torch.randn(6, 2, 5) * 0.4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.einsum("bsd,dhe->bshe", torch.tanh(self.table(ids) @ self.w), self.u)


class Bags(nn.Module):
    """Means of rows of a table, and maxima of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.EmbeddingBag(20, 8), nn.EmbeddingBag(20, 8, mode="max")
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(ids)) * self.b(ids))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Circular(nn.Module):
    """Padding that is written into a new tensor, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv1d(6, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.a(x)).mean(-1))


class Windows(nn.Module):
    """Averages over windows that leave a rest, and a norm, whose gradient writes in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.a(x), (3, 2), 2, (1, 0), count_include_pad=False)
        return self.head(F.normalize(F.avg_pool2d(h, 2), dim=1).mean((2, 3)))


class Sampled(nn.Module):
    """Pools of sizes that do not divide, a window over the end, samples, a product of nine."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.a(x), 3, 2, (1, 0), ceil_mode=True)
        h = F.avg_pool2d(h, 2, 1, ceil_mode=True, count_include_pad=False)
        places = torch.tanh(h[:, :2]).permute(0, 2, 3, 1)
        h = h + F.grid_sample(h, places, padding_mode="border", align_corners=False)
        h = F.adaptive_avg_pool2d(h, (3, 3))
        return self.head((1 + 0.1 * h).flatten(2).prod(-1) + F.adaptive_max_pool2d(h, 1).flatten(1))


class Padded(nn.Module):
    """A mask of padding, which torch writes into a new tensor, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=padding)


class Shifted(nn.Module):
    """The loss of a causal language model, whose labels are contiguous in a batch of 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a, self.head = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 20)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.a(self.table(ids))))
        if labels is None:
            return Out(logits)
        after = labels[..., 1:].contiguous()
        return Out(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), after.view(-1)))


class Required(nn.Module):
    """Labels that the forward cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.b(torch.relu(self.a(x)))
        return Out(logits, F.cross_entropy(logits, labels))


class Manifold(Required):
    """Labels that are floats, a row of them for an example."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.b(torch.relu(self.a(x)))
        return Out(logits, F.binary_cross_entropy_with_logits(logits, labels))


class Pixels(nn.Module):
    """A label for each pixel, of scores whose classes are their second axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.b(torch.relu(self.a(x)))
        return Out(logits, F.cross_entropy(logits, labels, ignore_index=3))


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        for name, held in vars(m).items():
            if isinstance(held, float) and (
                "drop" in name or (name == "p" and "Drop" in type(m).__name__)
            ):
                setattr(m, name, 0.0)
    return model


def zoo(name: str) -> Callable[[], tuple[Any, ...]]:
    def build() -> tuple[Any, ...]:
        model, args, kwargs = ZOO[name].build()
        return without_dropout(model), args, kwargs

    return build


MODELS: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "mlp": (lambda: (Mlp(), (torch.randn(3, 5, 8),)), {}),
    "products": (lambda: (Raw(), (torch.randint(0, 20, (3, 5)),)), {"include": "*"}),
    "bags": (lambda: (Bags(), (torch.randint(0, 20, (3, 5)),)), {"include": "*"}),
    "convolutions": (lambda: (Convolutions(), (torch.randn(3, 3, 17, 20),)), {"include": "*"}),
    "strided": (lambda: (Strided(), (torch.randn(3, 8, 6),)), {"include": "*"}),
    "circular": (lambda: (Circular(), (torch.randn(3, 6, 11),)), {"include": "*"}),
    "windows": (lambda: (Windows(), (torch.randn(3, 3, 11, 15),)), {"include": "*"}),
    "sampled": (lambda: (Sampled(), (torch.randn(3, 3, 10, 14),)), {"include": "*"}),
    "padded": (
        lambda: (Padded(), (torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool))), {},
    ),
    "shifted": (lambda: (Shifted(), (torch.randint(0, 20, (3, 5)),)), {}),
    "required": (lambda: (Required(), (torch.randn(3, 8), torch.tensor([0, 2, 1]))), {}),
    "floats": (lambda: (Manifold(), (torch.randn(4, 8), torch.ones(4, 3))), {}),
    "pixels": (
        lambda: (Pixels(), (torch.randn(2, 3, 6, 8), torch.zeros(2, 6, 8, dtype=torch.int64))),
        {"static": ["labels:1", "labels:2"], "include": "*"},
    ),
    "lstm": (lambda: (Recurrent(), (torch.randn(3, 4, 6),)), {"static": ["x:1"]}),
    **{
        n: (zoo(n), {}) for n in ("hf_bert", "hf_gpt2", "hf_llama", "hf_t5", "hf_whisper", "hf_vit")
    },
}  # fmt: skip
FAST = ("mlp", "strided", "circular", "shifted")


def rows() -> list[Any]:
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=n) for n in MODELS]


def batches(module: Any, own: bool) -> Iterator[dict[str, Any]]:
    """Arguments with labels, at three batch sizes in turn, one row among them."""
    sizes = [execution_of(module).sample(size) for size in ((2, 5), (4, 7), (1, 6))]
    module.eval()
    for i in range(STEPS):
        named = dict(sizes[i % 3])
        given = named.get("labels")
        if given is not None:
            named["labels"] = torch.zeros_like(given)
        if "padding" in named:
            named["padding"][:, -2:] = True
        with torch.no_grad():
            scores = scores_of(module(**named))
        g = torch.Generator().manual_seed(i)
        shape = scores.shape[:-1] if given is None else given.shape
        classes = scores.shape[1 if scores.dim() == 4 and given is not None else -1]
        labels = torch.randint(0, classes, shape, generator=g)
        if given is not None and given.is_floating_point():
            labels = (labels > 0).float()
        yield {**named, "labels": labels}


def loss_in_torch(module: Any, batch: dict[str, Any], own: bool) -> Tensor:
    if own:
        found: Tensor = module(**batch).loss
        return found
    batch = dict(batch)
    labels = batch.pop("labels")
    return F.cross_entropy(scores_of(module(**batch)).flatten(0, -2), labels.flatten())


Step = Callable[[str, str], tuple[Any, Any, Path]]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """(capture, adapted module, file of its step) of a row of MODELS, proven on a provider."""

    @functools.cache
    def made(name: str, provider: str) -> tuple[Any, Any, Path]:
        build, options = MODELS[name]
        model, args, kwargs = (*build(), {})[:3]
        cap = lora_fx.capture(model, args, kwargs, static=options.get("static", ()))
        module = lora_fx.insert(cap, rank=3, alpha=4.5, include=options.get("include"))
        path = tmp_path_factory.mktemp("step") / "step.onnx"
        report = lora_fx.export(module, path, mode="train", provider=provider, clip=CLIP)
        assert {p.of for p in report.parity} == {"base", "random", "step"}
        return cap, module, path

    return made


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", rows())
def test_steps_equal_those_of_torch(step: Step, name: str, provider: str) -> None:
    cap, module, path = step(name, provider)
    own = "labels" in cap.signature.keywords
    session = TrainSession(path, LR, provider)
    assert session.provider == provider
    assert {v.device_name() for v in session._held.values()} == {provider}
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    for batch in batches(module, own):
        got = session.step(arrays_of(batch))
        module.train()
        loss = loss_in_torch(module, batch, own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        module.eval()
        assert got == pytest.approx(float(loss.detach()), rel=1e-5)
    ours, theirs = session.adapter(), module.adapter()
    for key, u in theirs.lowrank.items():
        np.testing.assert_allclose(ours.lowrank[key].a, u.a, atol=1e-4)
        np.testing.assert_allclose(ours.lowrank[key].b, u.b, atol=1e-4)
        assert np.abs(u.b).max() > 5e-3
    inputs = execution_of(module).sample((2, 5))
    forward = Session(path.with_name("step.switch.onnx"), provider)
    forward.load("trained", ours)
    expected = execution_of(module).flat(inputs)
    for name, value in forward.run(arrays_of(inputs), adapter="trained").items():
        np.testing.assert_allclose(value, expected[name], atol=1e-3 * np.abs(expected[name]).max())
    base = sum(p.nbytes for p in {id(p): p for p in cap.model.parameters()}.values())
    base += sum(b.nbytes for b in cap.model.buffers())
    assert path.with_name("step.onnx.data").stat().st_size <= 1.02 * base + 4096
    graph = onnx_ir.load(path).graph
    assert [n for n, v in graph.initializers.items() if not v.uses()] == []


@pytest.mark.parametrize("provider", PROVIDERS)
def test_numbers_of_a_step_by_hand(tmp_path: Path, provider: str) -> None:
    """SGD on y = x·(W + s·b·a)ᵀ with mse: gradients in fp64, by their formulas."""
    torch.manual_seed(1)
    model = nn.Linear(5, 3, bias=False)
    path = tmp_path / "s.onnx"
    module = lora_fx.insert(model, (torch.randn(4, 5),), rank=2, alpha=5.0)
    lora_fx.export(
        module, path, mode="train", provider=provider, loss="mse", optimizer="sgd",
        weight_decay=0.1, clip=0,
    )  # fmt: skip
    start = module.adapter()
    (key,) = start
    low = start.lowrank[key]
    b = np.random.default_rng(0).standard_normal(low.b.shape).astype(np.float32)
    session = TrainSession(path, 0.3, provider, adapter=Adapter({key: replace(low, b=b)}))
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    labels = np.random.default_rng(2).standard_normal((7, 3)).astype(np.float32)
    a64, b64, x64 = (v.astype(np.float64) for v in (low.a, b, x))
    y = x64 @ (model.weight.detach().double().numpy() + 2.5 * b64 @ a64).T
    error = 2 * (y - labels) / y.size
    loss = session.step({"input": x, "labels": labels})
    assert loss == pytest.approx(((y - labels) ** 2).mean(), rel=1e-6)
    wanted = 2.5 * error.T @ x64
    got = session.adapter().lowrank[key]
    np.testing.assert_allclose(got.a, a64 - 0.3 * (b64.T @ wanted + 0.1 * a64), atol=2e-6)
    np.testing.assert_allclose(got.b, b64 - 0.3 * (wanted @ a64.T + 0.1 * b64), atol=2e-6)


def test_another_scale_is_the_files_and_is_said(tmp_path: Path) -> None:
    """ΔW stays, and what comes back has the file's alpha."""
    module = lora_fx.insert(nn.Linear(5, 3), (torch.randn(4, 5),), rank=2, alpha=5.0)
    path = tmp_path / "s.onnx"
    lora_fx.export(module, path, mode="train", provider="cpu")
    ((key, low),) = module.adapter().lowrank.items()
    b = np.random.default_rng(0).standard_normal(low.b.shape).astype(np.float32)
    given = Adapter({key: replace(low, b=b, alpha=8.0)})
    lora_fx.save_adapter(given, tmp_path / "a")
    for adapter in (given, tmp_path / "a"):
        session = TrainSession(path, 0.3, "cpu", adapter=adapter)
        said = "'weight' has the scale 4, but the file 2.5; B of 1 update was rescaled"
        assert said in session.note
        made = session.adapter()
        assert made.lowrank[key].alpha == 5.0
        np.testing.assert_allclose(made.deltas()[key], given.deltas()[key], rtol=1e-6)
    session.load(Adapter({key: replace(low, b=b)}))
    assert session.note == ""


def test_the_first_step_of_adamw_moves_every_element_by_its_rate(tmp_path: Path) -> None:
    """Its corrections are 1 − 0.9 and 1 − 0.999 to the last digits of float32."""
    path = tmp_path / "s.onnx"
    lora_fx.export(nn.Linear(9, 8), path, (torch.randn(4, 9),), mode="train", provider="cpu")
    session = TrainSession(path, 0.25, "cpu")
    session.step({"input": torch.randn(7, 9).numpy(), "labels": np.arange(7)})
    (low,) = session.adapter().lowrank.values()
    # where a gradient is near 1e-8, its size and not the correction decides
    assert np.median(np.abs(low.b)) == pytest.approx(0.25, rel=1e-6)


class Pair(nn.Module):
    """Two tensors in one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(torch.relu(self.a(pair[0]) + self.a(pair[1])))


def test_nested_inputs_have_their_dimensions_by_name_and_the_mode_stays(tmp_path: Path) -> None:
    pair = torch.randn(2, 6), torch.randn(2, 6)
    module = lora_fx.insert(Pair(), kwargs={"pair": pair}, rank=2).train()
    lora_fx.export(module, tmp_path / "m.onnx", mode="train", provider="cpu")
    assert module.training
    inputs = onnx_ir.load(tmp_path / "m.onnx").graph.inputs
    found = {str(v.name): str(v.shape[0]) for v in inputs[:3] if v.shape is not None}
    assert found == {"pair_0": "batch", "pair_1": "batch", "labels": "batch"}


def test_a_batch_norm_trains_on_no_single_row(tmp_path: Path) -> None:
    """Torch refuses one, so the step does, and is made for all other sizes."""
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 9))
    path = tmp_path / "s.onnx"
    report = lora_fx.export(model, path, (torch.randn(3, 8),), mode="train", provider="cpu")
    assert [dict(p.sizes)["input"] for p in report.parity if p.of == "step"] == [
        (2, 8),
        (3, 8),
        (3, 8),
    ]
    (left,) = report.details["unproven"]
    assert left["sizes"]["input"] == [1, 8] and "another path" in left["reason"]
    session = TrainSession(path, LR, "cpu")
    with pytest.raises(LoraFxError, match="'input' has size 1 in dimension 0"):
        session.step({"input": np.ones((1, 8), np.float32), "labels": np.array([1])})


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "below": (np.array([[0, -1, 2], [3, -100, 5]]), "ONNX Runtime fails"),
    "above": (np.array([[0, 6, 2], [3, -100, 5]]), "ONNX Runtime fails"),
    "order": (np.zeros((3, 2), np.int64), "'labels' has size 3 in dimension 0, but 'x' has 2 in 0"),
    "one": (np.zeros((2, 1), np.int64), "'labels' has size 1 in dimension 1, but 'x' has 3 in 1"),
    "flat": (np.zeros(6, np.int64), "'labels' has size 6 in dimension 0, but 'x' has 2 in 0"),
}


def test_labels_that_torch_refuses_are_refused(step: Step) -> None:
    """ONNX counts a label of -1 from the end, and as many labels in another shape would run."""
    session = TrainSession(step("mlp", "cpu")[-1], LR, "cpu")
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    for labels, words in BAD_LABELS.values():
        with pytest.raises(LoraFxError, match=re.escape(words)):
            session.step({"x": x, "labels": labels})
    assert session.steps == 0
    session.step({"x": x, "labels": np.array([[0, 1, 2], [3, -100, 5]])})


def test_dropout_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """A share p is dropped, other places for other seeds, and the mean stays."""
    x = torch.ones(50, 40, 30)
    one, again, other = (dropped(x, 0.3, torch.tensor(s), 2) for s in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)
    for made in (one, other, dropped(x, 0.3, torch.tensor(5), 3)):
        assert sorted(made.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
        for axes in ((1, 2), (0, 2), (0, 1)):
            kept = (made > 0).double().mean(axes)
            assert float((kept - 0.7).abs().max()) < 5 * (0.21 / (x.numel() / len(kept))) ** 0.5
    both = ((one > 0) & (other > 0)).double().mean()
    assert float(both) == pytest.approx(0.49, abs=0.02)


def test_attention_with_dropout_is_torchs() -> None:
    """Without one dropped, and where padding on the left masks out whole rows of the scores."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 6, requires_grad=True) for h in (4, 2, 2))
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & (torch.arange(5) > 1)
    named = {"scale": 0.3, "enable_gqa": True}
    ours = attention_with_dropout(q, k, v, seen, 0.0, torch.tensor(1), 0, **named)
    theirs = F.scaled_dot_product_attention(q, k, v, seen, **named)
    torch.testing.assert_close(ours, theirs)
    assert not bool(theirs[..., :2, :].any()) and bool(theirs.any())
    weigh = torch.randn(theirs.shape)
    made = [torch.autograd.grad((y * weigh).sum(), (q, k, v)) for y in (ours, theirs)]
    torch.testing.assert_close(*made)


def test_gradients_of_averages_are_torchs() -> None:
    """Whatever lies over the end, counts as padding, or is left out of the last window."""
    torch.manual_seed(0)
    kernels, strides, paddings = (
        ((3, 2), (2, 2), (4, 3)),
        ((2, 2), (1, 3)),
        ((0, 0), (1, 1), (1, 0)),
    )
    rows = itertools.product(
        kernels, strides, paddings, (False, True), (False, True), (None, 5), ((7, 9), (8, 10))
    )
    for *how, size in rows:
        x = torch.randn(2, 3, *size, requires_grad=True)
        y = F.avg_pool2d(x, *how)
        dy = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(average_backward(dy, x.detach(), *how), wanted)


def test_a_product_by_halves_is_torchs() -> None:
    for shape, dim in (((3, 7, 4), 1), ((3, 1, 4), 1), ((9,), 0), ((2, 5), -1)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(product(x, dim), x.prod(dim))
        torch.testing.assert_close(product(x, dim, True), x.prod(dim, keepdim=True))
        torch.testing.assert_close(product(x), x.prod())


APART: dict[str, tuple[Any, tuple[int, ...], list[tuple[Any, ...]]]] = {
    "mean 1": (aten.adaptive_avg_pool1d, (2, 3, 11), [([4],), ([1],), ([13],)]),
    "mean 3": (aten.adaptive_avg_pool3d, (2, 3, 5, 6, 7), [([2, 3, 4],), ([1, 1, 1],)]),
    "maximum 1": (aten.adaptive_max_pool1d, (2, 3, 11), [([4],), ([1],)]),
    "maximum 2": (aten.adaptive_max_pool2d, (2, 3, 7, 10), [([3, 4],), ([1, 1],), ([7, 2],)]),
    "maximum 3": (aten.adaptive_max_pool3d, (2, 3, 5, 6, 7), [([2, 3, 4],)]),
    "average": (aten.avg_pool3d, (2, 3, 5, 6, 7), [
        ([2, 3, 2],), ([2],), ([2, 3, 2], [2, 1, 2], [1, 0, 1]), ([3], [2], [1], True),
        ([3], [2], [1], True, False), ([3], [2], [1], False, True, 5),
        ([2, 3, 2], [1, 2, 3], [1], True, False, 7),
    ]),
    "maximum": (aten.max_pool3d, (2, 3, 5, 6, 7), [
        ([2, 3, 2],), ([2, 3, 2], [2, 1, 2], [1, 0, 1]), ([2], [2], [1], [2]),
        ([3, 2, 2], [2], [1], [1, 2, 1], True),
    ]),
    "average of one": (aten.avg_pool3d, (3, 5, 6, 7), [([2, 3, 2], [2, 1, 2], [1, 0, 1])]),
    "windows": (aten.unfold, (3, 9, 4), [(1, 3, 2), (-2, 4, 3), (0, 2, 1), (2, 4, 1)]),
    "products": (aten.cumprod, (3, 7, 4), [(0,), (1,), (-1,)]),
}  # fmt: skip
"""Operators that come apart before autograd, by another way than torch's: shapes and arguments."""


def same_gradients(op: Any, tensors: list[Tensor], *how: Any) -> None:
    """Values and gradients are those of torch's own operator, in fp64."""
    made = []
    for run in (DIFFERENTIABLE[op.default], op.default):
        given = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        y = run(*given, *how)
        y = y[0] if isinstance(y, tuple) else y
        weigh = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        wanted = [t for t in given if t.requires_grad]
        made.append([y.detach(), *torch.autograd.grad((y * weigh).sum(), wanted)])
    assert made[1][0].numel() and all(bool(t.any()) for t in made[1])
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("name", APART)
def test_operators_that_come_apart_are_torchs(name: str) -> None:
    op, shape, rows = APART[name]
    torch.manual_seed(0)
    for how in rows:
        same_gradients(op, [torch.randn(shape, dtype=torch.float64)], *how)


def test_a_product_with_a_zero_in_it_has_gradients() -> None:
    """Where torch divides by the elements, a zero needs a way of its own."""
    x = torch.randn(3, 7, dtype=torch.float64)
    x[1, 2] = x[2, 1] = x[2, 4] = 0.0
    same_gradients(aten.cumprod, [x], 1)


def test_distances_and_scattered_elements_are_torchs() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2, n, 5, dtype=torch.float64) for n in (4, 6))
    b[:, 1] = a[:, 2]  # a distance of 0
    for p in (2.0, 1.0, 3.0):
        same_gradients(aten.cdist, [a, b], p)
    x, source = torch.randn(2, 3, 5).double(), torch.randn(4, 7).double()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) > 0.6
    for places in (mask, (torch.arange(30).reshape(2, 3, 5) % 3 == 1)):
        same_gradients(aten.masked_scatter, [x, places, source])


def test_bags_of_rows_are_torchs() -> None:
    """Empty bags, one row twice, rows that are left out, weights of rows, an end that is given."""
    w = torch.randn(11, 6).double()
    places, starts = torch.tensor([4, 1, 1, 9, 0, 4, 10]), torch.tensor([0, 3, 3, 5])
    for mode in range(3):
        same_gradients(aten.embedding_bag, [w, places, starts], False, mode)
        same_gradients(aten.embedding_bag, [w, places, starts], False, mode, False, None, True)
    weights = torch.randn(7).double()
    same_gradients(aten.embedding_bag, [w, places, starts], False, 0, False, weights)
    for mode, left_out in ((0, 4), (1, 1), (2, 9)):
        ours, theirs = (
            op(w, places, starts, False, mode, False, None, False, left_out)[0]
            for op in (bags, aten.embedding_bag.padding_idx)
        )
        torch.testing.assert_close(ours, theirs)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "half": (lambda: Mlp().bfloat16(), {}, "'a.weight' is bfloat16; a training step needs float32"),
    "codes": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, quantise="int8"), {},
        "'a.weight' is quantised: a training step computes gradients in float32 only",
    ),
    "whole": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, also_train="b.bias"), {},
        "'b.bias' is trained whole; a training step trains low-rank updates",
    ),
    "dora": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, variant="dora"), {},
        "'a.weight' is DoRA",
    ),
    "length": (
        lambda: lora_fx.capture(Recurrent(), (torch.randn(3, 4, 6),)), {},
        "'x': dimension 1 is dynamic, but aten.lstm.input can train at one size only",
    ),
    "loss": (Mlp, {"loss": "huber"}, "unknown loss 'huber'"),
    "number": (Numbered, {}, "the model's first output is a single number, not scores"),
    "optimizer": (Mlp, {"optimizer": "lion"}, "unknown optimizer 'lion'"),
    "clip": (Mlp, {"clip": -1.0}, "clip is -1.0; expected 0 or more"),
    "mode": (Mlp, {"mode": "switch", "clip": 2.0}, "mode switch would ignore an option of mode tr"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "length")) for n in REFUSED]
)
def test_what_has_no_step_is_refused_by_name(tmp_path: Path, name: str) -> None:
    build, options, words = REFUSED[name]
    model = build()
    dtype = torch.bfloat16 if name == "half" else torch.float32
    args = (torch.randn(3, 5, 8, dtype=dtype),) if isinstance(model, Mlp) else ()
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(
            model, tmp_path / "s.onnx", args, provider="cpu", **{"mode": "train", **options}
        )
    assert words in caught.value.message and caught.value.hint
    assert list(tmp_path.iterdir()) == []
