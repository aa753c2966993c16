"""Classes of failures that lots of architectures showed: a small module for each.

On the commit before its cure each was red: a raw exception, or a refusal of a model that runs.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import rel
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.session import open_session
from tests.fx.module.test_module import perturb


class Mapped(nn.Module):
    """A mask made by torch.vmap, as transformers' are where a model changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])

        def seen(q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & k.new_ones((), dtype=torch.bool)

        mask = torch.vmap(torch.vmap(seen, in_dims=(None, 0)), in_dims=(0, None))(at, at)
        h: Tensor = self.a(x)
        return torch.where(mask, h @ h.mT, -9.0).softmax(-1) @ h


class MappedRows(nn.Module):
    """One vmap over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.vmap(lambda row: torch.tanh(row * 2))(self.a(x))
        result: Tensor = self.b(h)
        return result


class MappedTwice(Mapped):
    """Two in a row, whose levels have one number."""

    def forward(self, x: Tensor) -> Tensor:
        def top(v: Tensor) -> Tensor:
            return v - v.max()

        h = torch.vmap(top)(super().forward(x).flatten(1))
        return torch.vmap(top)(h * 2) + h


VMAPS = [Mapped, MappedRows, MappedTwice]


@pytest.mark.parametrize("kind", VMAPS)
def test_vmap_is_plain_operations(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 4)
    module = lora_fx.insert(model, (x,), rank=2)
    perturb(module)
    other = torch.randn(3, 7, 4)
    want = by_hand(model, module)(other).detach()
    assert rel(module.eval()(other).detach(), want) < 1e-5
    module.train()(x).square().sum().backward()
    assert all(
        a.grad is not None and b.grad is not None for a, b in insertion_of(module).slots().values()
    )
    assert rel(lora_fx.fold(module.eval())(other).detach(), want) < 1e-5
    assert rel(session(module, tmp_path / "m.onnx", other), want) < 1e-5
    live = lora_fx.attach(copy.deepcopy(model), (x,), adapter=module.adapter())
    assert rel(live(other).detach(), want) < 1e-5


def by_hand(model: nn.Module, module: Any) -> nn.Module:
    """A copy with W + s·BA in its parameters."""
    own = copy.deepcopy(model)
    for key, delta in module.adapter().deltas().items():
        own.get_parameter(key).data += torch.from_numpy(delta).float()
    return own


def session(module: Any, path: Path, *args: Tensor) -> Any:
    """What ONNX Runtime makes of the merged file."""
    lora_fx.export(module, path, provider="cpu")
    opened = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in opened.get_inputs()]
    return opened.run(None, {n: x.numpy() for n, x in zip(names, args, strict=True)})[0]


class Crossed(nn.Module):
    """Attention whose input weight is used in parts, q by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return result


def test_parts_of_a_weight_are_switched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    model = Crossed().eval()
    module = lora_fx.insert(model, (x, y), rank=2)
    assert sum("[" in key for key in module.updates) == 2
    perturb(module)
    lora_fx.export(module, tmp_path / "s.onnx", mode="switch", provider="cpu")
    opened = Session(tmp_path / "s.onnx", "cpu")
    opened.load("one", module.adapter())
    feeds = {"x": x.numpy(), "y": y.numpy()}
    (got,), (base,) = opened.run(feeds, "one").values(), opened.run(feeds).values()
    assert rel(got, module.eval()(x, y).detach()) < 1e-5
    assert rel(base, model(x, y).detach()) < 1e-5 < 0.05 < rel(got, base)


class Routed(nn.Module):
    """Every row picks its own matrices of a stack, as a mixture's batched experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up, self.down = (nn.Parameter(torch.randn(3, *s) / 3) for s in ((8, 6), (6, 8)))

    def forward(self, x: Tensor) -> Tensor:
        ids = self.router(x).topk(2).indices
        rows = x[:, None].expand(-1, 2, -1).reshape(-1, 6, 1)
        h = self.up[ids.reshape(-1)] @ rows
        y = self.down[ids.reshape(-1)] @ h.relu()
        return y.reshape(-1, 2, 6).sum(1)


def test_stacks_that_data_picks_from_are_switched_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(5, 6)
    module = lora_fx.insert(model, (x,), rank=2, include="up,down")
    perturb(module)
    adapter, feeds = module.adapter(), {"x": x.numpy()}
    want, plain = module.eval()(x).detach(), model(x).detach()
    lora_fx.export(module, tmp_path / "s.onnx", mode="switch", provider="cpu")
    opened = Session(tmp_path / "s.onnx", "cpu")
    opened.load("one", adapter)
    (got,), (base,) = opened.run(feeds, "one").values(), opened.run(feeds).values()
    assert rel(got, want) < 1e-5 and rel(base, plain) < 1e-5 < 0.05 < rel(got, base)
    lora_fx.export(model, tmp_path / "b.onnx", (x,), provider="cpu")
    lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "m.onnx")
    (merged,) = open_session(tmp_path / "m.onnx", "cpu").run(feeds).values()
    assert rel(merged, want) < 1e-5


class Probed(nn.Module):
    """How often a layer runs depends on its weight, as a detector's boxes do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("probe", torch.randn(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int((self.a(self.get_buffer("probe")) > 0).sum()) % 7 + 1):
            x = torch.tanh(self.a(x))
        result: Tensor = self.b(x)
        return result


def test_what_a_recorded_run_decided_is_not_held_against_the_live_model() -> None:
    torch.manual_seed(0)
    model, x = Probed().eval(), torch.randn(3, 4)
    live = lora_fx.attach(copy.deepcopy(model), (x,), rank=2)
    state = live.adapter().lowrank
    rng = np.random.default_rng(0)
    drawn = {k: replace(u, b=rng.standard_normal(u.b.shape).astype("f")) for k, u in state.items()}
    live.load_adapter(Adapter(drawn))
    got, base = live(x).detach(), model(x).detach()
    assert rel(got, by_hand(model, live)(x).detach()) < 1e-5
    assert rel(got, base) > 0.05
    live(x).sum().backward()
    assert all(p.grad is not None for p in live.parameters() if p.requires_grad)


class SharedHeads(nn.Module):
    """Attention of four heads of queries, with fewer or as many of keys, and of values."""

    def __init__(self, keys: int, values: int, dimensions: int) -> None:
        super().__init__()
        self.keys, self.values, self.dimensions = keys, values, dimensions
        self.q, self.k, self.v = (nn.Linear(12, 3 * heads) for heads in (4, keys, values))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.keys, 3)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.values, 3)).transpose(1, 2)
        if self.dimensions == 3:
            q, k, v = q[0], k[0], v[0]
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        result: Tensor = self.out(y.transpose(-3, -2).flatten(-2))
        return result


@pytest.mark.parametrize("dimensions", [3, 4])
@pytest.mark.parametrize(("keys", "values"), [(4, 4), (2, 2), (1, 1), (2, 4), (4, 2), (1, 2)])
def test_keys_and_values_may_share_other_numbers_of_heads(
    keys: int, values: int, dimensions: int, tmp_path: Path
) -> None:
    """The exporter refused heads of keys that are not as many as those of values."""
    torch.manual_seed(0)
    net, x = SharedHeads(keys, values, dimensions), torch.randn(2, 6, 12)
    model = lora_fx.insert(net, (x,), rank=2)
    perturb(model)
    report = lora_fx.export(model, tmp_path / "m.onnx", provider="cpu")
    assert report
    expected = model.eval()(x).detach().numpy()
    (found,) = open_session(tmp_path / "m.onnx", "cpu").run({"x": x.numpy()}).values()
    assert rel(found, expected) < 2e-6


class Strided(nn.Module):
    """A length that strides make 1 at small sizes, with positions relative to its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(6, 4, 3, stride=8, padding=1)
        self.mix = nn.Linear(4, 3)
        self.register_buffer("rates", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x.mT).mT
        h = nn.functional.scaled_dot_product_attention(h, h, h)  # of three axes: traced once more
        length = h.shape[1]
        at = (
            torch.arange(length - 1, -length, -1, device=x.device)[:, None].to(x) * self.rates[None]
        )
        angles = at.expand(x.shape[0], *at.shape).cos()
        result: Tensor = self.mix(h) + self.mix(angles).mean(1, keepdim=True)
        return result


def test_an_inner_length_of_one_is_that_of_no_other_size(tmp_path: Path) -> None:
    """The file said that it is 1 for every length, and the runtime used one block for two sizes."""
    torch.manual_seed(0)
    net, x = Strided(), torch.randn(2, 64, 6)
    model = lora_fx.insert(net, (x,), rank=2)
    perturb(model)
    path = tmp_path / "m.onnx"
    assert lora_fx.export(model, path, provider="cpu")
    for length in (9, 11, 40):
        more = torch.randn(3, length, 6)
        (found,) = open_session(path, "cpu").run({"x": more.numpy()}).values()
        assert rel(found, model.eval()(more).detach().numpy()) < 2e-6

    file = onnx.load(path)
    wanted = {v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim]
              for v in file.graph.value_info}  # fmt: skip
    del file.graph.output[:], file.graph.value_info[:]
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    values = ort.InferenceSession(file.SerializeToString()).run(None, {"x": more.numpy()})
    for (name, sizes), value in zip(wanted.items(), values, strict=True):
        pairs = zip(sizes, value.shape, strict=True)
        assert all(size in (None, real) for size, real in pairs), (name, sizes, value.shape)
