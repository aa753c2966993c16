"""Where replacing modules goes wrong without saying so: attach against the explicit W + s·BA.

The oracle is a plain fp64 copy of the model with W + s·BA in its parameters, never another tool.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from tests.fx.attached import effect, explicit, gap, randomise, same_state, state
from tests.zoo.models import redraw

Built = tuple[nn.Module, tuple[Any, ...]]


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tv_vit() -> Built:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 24, 40, num_classes=5), (floats(2, 3, 32, 32),)


def tv_swin() -> Built:
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5
    )
    return model, (floats(2, 3, 32, 32),)


def timm_swinv2() -> Built:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
        num_classes=5,
    )  # fmt: skip
    return model, (floats(2, 3, 32, 32),)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.lin.weight)


class Attention(nn.Module):
    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.kdim = kdim
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = x if self.kdim is None else torch.cat([x, x.flip(1)], -1)[..., : self.kdim]
        return self.mha(x, k, k, need_weights=False)[0]


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (floats(2, 5, 24),)


def decoder() -> Built:
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.TransformerDecoder(layer, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x, x.flip(1))

    return Decoder(), (floats(2, 5, 8),)


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(10, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[:6]) + (self.w[4:].t().t() @ x.mT).mT


class Pair(nn.Module):
    """One op on its weight, and another result beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(x, self.weight), x.mean(-1, keepdim=True)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, mean = self.pair(x)
        return torch.cat([y, mean], -1)


class Reshaped(nn.Module):
    """Reads its input in another shape than it comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.reshape(x.shape[0], -1, 4), self.weight)


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.emb(ids)))


def conv(**options: Any) -> Callable[[], Built]:
    return lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.ReLU()),
        (floats(2, 4, 9, 8),),
    )


def lstm() -> Built:
    return nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True), (floats(2, 4, 6),)


MODELS: dict[str, Callable[[], Built]] = {
    "torchvision ViT": tv_vit,
    "torchvision Swin": tv_swin,
    "timm SwinV2": timm_swinv2,
    "F.linear of a module's weight": lambda: (ReadsWeight(), (floats(2, 6),)),
    "MultiheadAttention": lambda: (Attention(), (floats(2, 5, 8),)),
    "MultiheadAttention with kdim": lambda: (Attention(12), (floats(2, 5, 8),)),
    "TransformerEncoder": encoder,
    "TransformerDecoder": decoder,
    "circular padding": conv(padding_mode="circular", padding=1),
    "dilation": conv(dilation=2),
    "groups": conv(groups=2),
    "LSTM": lstm,
    "slices": lambda: (Sliced(), (floats(2, 5, 8),)),
    "two results": lambda: (Pairs(), (floats(2, 5, 8),)),
    "reshaped": lambda: (nn.Sequential(Reshaped()), (floats(2, 5, 8),)),
    "tied": lambda: (TiedEmbedding(), (torch.arange(10).reshape(2, 5),)),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_effect_gradient_and_numbers(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args = MODELS[name]()
    redraw(model.eval())
    was = state(model)
    changed = effect(model, args)
    lora_fx.attach(model, args, rank=2, include="*")
    adapter = randomise(model)
    lora_fx.detach(model)
    assert same_state(state(model), was)
    want = explicit(model, adapter, args)
    lora_fx.attach(model, args, adapter=adapter)
    with torch.no_grad():  # the fused paths of eval mode
        fused = model(*args)
    assert gap(fused, want) < 5e-6
    assert gap(model(*args), want) < 5e-6
    assert changed(fused) > 0.02
    out = model.train()(*args)
    (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
    for n, p in model.named_parameters():
        assert ("lora_" in n) == (p.grad is not None), n
        assert p.grad is None or bool(p.grad.any()), n


def test_a_computed_weight_has_the_output_form() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4)).eval()
    x = floats(2, 6)
    lora_fx.attach(model, (x,), rank=2)
    adapter = randomise(model)
    assert list(adapter) == ["0.weight~", "1.weight"]
    first, second = (torch.from_numpy(d) for d in adapter.deltas().values())
    w, v = model[0].weight.double() + first, model[1].weight.double() + second
    h = nn.functional.linear(x.double(), w, model[0].bias.double())
    want = nn.functional.linear(h, v, model[1].bias.double())
    assert gap(model(x), want) < 2e-6
    with pytest.raises(lora_fx.LoraFxError, match="the model computes this weight"):
        lora_fx.attach(Masked().eval(), (x,), rank=2)


class Masked(nn.Module):
    """A weight made in a forward that has more than its product."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(nn.functional.linear(x, torch.tril(self.w)))
