"""Models on which replacing modules goes wrong without saying so, one row each; tiny.

The tests of attach and of insert share them. `redraw` gives them weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.hand import Einsum, RawMatmul
from tests.zoo.hand_idioms import Bilinear, LeftTransposed
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


def experts() -> Built:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = MixtralConfig(
                hidden_size=12, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2
            )
            self.set_experts_implementation("grouped_mm")
            self.block = MixtralSparseMoeBlock(self.config)

        def set_experts_implementation(self, name: str) -> None:
            self.config._experts_implementation = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

    return Experts(), (floats(2, 5, 12),)


def standardised() -> Built:
    from timm.layers import ScaledStdConv2d

    return nn.Sequential(ScaledStdConv2d(4, 6, 3), nn.ReLU()), (floats(2, 4, 9, 8),)


def normed(which: str) -> Callable[[], Built]:
    def build() -> Built:
        wrap = getattr(nn.utils.parametrizations, which)
        return nn.Sequential(wrap(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)), (floats(3, 6),)

    return build


def of(layer: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    return lambda: (layer(), (floats(*shape),))


def ids() -> tuple[torch.Tensor]:
    return (torch.arange(10).reshape(2, 5),)


@dataclass(frozen=True)
class Silent:
    """One model.

    Attributes:
        build: Gives the module and its inputs, weights not drawn yet.
        merges: Elsewhere its merge or its export goes wrong: ONNX Runtime is asked too.
        computed: A weight is made of parameters; attach has tests of its own for these.
        keys: Endings of keys that have to be among its targets.
    """

    build: Callable[[], Built]
    keys: str = "weight"
    merges: bool = False
    computed: bool = False


MODELS = {
    # no effect, no gradient, and a merge that changes the output
    "torchvision ViT": Silent(tv_vit, "out_proj.weight in_proj_weight", merges=True),
    "torchvision Swin": Silent(tv_swin, "qkv.weight proj.weight", merges=True),
    "timm SwinV2": Silent(timm_swinv2, "qkv.weight", merges=True),
    "F.linear of a module's weight": Silent(of(ReadsWeight, 2, 6), "lin.weight", merges=True),
    "MultiheadAttention": Silent(of(Attention, 2, 5, 8), "out_proj.weight", merges=True),
    "TransformerEncoder": Silent(
        encoder, "out_proj.weight in_proj_weight linear1.weight linear2.weight", merges=True
    ),
    # an effect, and a wrong merge
    "standardised convolution": Silent(standardised, "0.weight~", merges=True, computed=True),
    "circular padding": Silent(conv(padding_mode="circular", padding=1), merges=True),
    "tied": Silent(lambda: (TiedEmbedding(), ids()), merges=True),
    "weight_norm": Silent(normed("weight_norm"), "0.weight~ 2.weight", merges=True, computed=True),
    # refused, or a crash
    "ConvTranspose": Silent(of(lambda: nn.ConvTranspose2d(4, 6, 3, 2), 2, 4, 5, 6)),
    "LSTM": Silent(lstm, "weight_ih_l0 weight_hh_l0 weight_hh_l1_reverse"),
    "GRU": Silent(of(lambda: nn.GRU(6, 5, batch_first=True), 2, 4, 6), "weight_ih_l0 weight_hh_l0"),
    "EmbeddingBag": Silent(lambda: (nn.EmbeddingBag(11, 6), ids())),
    "Bilinear": Silent(of(lambda: Bilinear(4, 3, 5), 2, 3, 7)),
    "dilation": Silent(conv(dilation=2)),
    "groups": Silent(conv(groups=2), merges=True),
    "MultiheadAttention with kdim": Silent(
        of(lambda: Attention(12), 2, 5, 8),
        "q_proj_weight k_proj_weight v_proj_weight out_proj.weight",
        merges=True,
    ),
    "spectral_norm": Silent(normed("spectral_norm"), "0.weight~ 2.weight", computed=True),
    "x @ w": Silent(of(lambda: RawMatmul(6, 5), 2, 3, 6)),
    "einsum": Silent(of(lambda: Einsum(6, 5), 2, 3, 6)),
    "w.t() @ x": Silent(of(lambda: LeftTransposed(6, 5), 2, 6, 3)),
    "slices": Silent(of(Sliced, 2, 5, 8), "w"),
    "stacked experts": Silent(experts, "gate.weight gate_up_proj down_proj"),
    # beside these
    "TransformerDecoder": Silent(decoder),
    "two results": Silent(of(Pairs, 2, 5, 8)),
    "reshaped": Silent(of(lambda: nn.Sequential(Reshaped()), 2, 5, 8)),
}


def built(name: str) -> Built:
    """A model of the table in eval mode, its weights drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args = MODELS[name].build()
    redraw(model.eval())
    return model, args
