"""The hand-written modules of the zoo, and torch's own layers, with their sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from . import hand, hand_domains, hand_idioms, hand_layers
from .base import BATCH, HEADS, HIDDEN, IMAGE, INNER, P_DROP, SEQ, Built, entry, floats, ids


def _enter(name: str, make: Callable[[], nn.Module], *shape: int, **facts: Any) -> None:
    """Enters a module of one float input, ``shape`` without the batch."""
    entry(name, "hand", **facts)(lambda: (make(), (floats(BATCH, *shape),), {}))


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, dropout=P_DROP, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


_enter("raw_matmul", lambda: hand.RawMatmul(12, 20), SEQ, 12, fast=True)
_enter("einsum", lambda: hand.Einsum(12, 20), SEQ, 12, fast=True)
_enter("f_linear", lambda: hand.FLinear(12, 20), SEQ, 12, fast=True)
_enter("fused_qkv", lambda: hand.FusedQKV(HIDDEN, 4, 8, P_DROP), SEQ, HIDDEN, fast=True)
_enter("mha", lambda: hand.SelfAttention(HIDDEN, HEADS, P_DROP), SEQ, HIDDEN, fast=True)
_enter("transformer_encoder", _transformer_encoder, SEQ, HIDDEN, fast=True)


@entry("tied_head", "hand", tied=True, fast=True)
def _tied_head() -> Built:
    return hand.TiedHead(37, 12, 20), (ids(37),), {}


_enter("left_weight", lambda: hand.LeftWeight(12, 20), 12, 7, fast=True)
_enter("bmm_experts", lambda: hand.BmmExperts(4, 12, 20), SEQ, 12, fast=True)

# weights in other places


@entry("tied_linear", "hand", tied=True)
def _tied_linear() -> Built:
    return hand_idioms.TiedLinear(37, 12, 20), (ids(37),), {}


_enter("left_transposed", lambda: hand_idioms.LeftTransposed(12, 20), 12, 7)
_enter("own_weight", lambda: hand_idioms.OwnWeight(12, 20), SEQ, 12)
_enter("shared_layer", lambda: hand_idioms.SharedLayer(12, 20), SEQ, 12)
_enter("shared_slices", lambda: hand_idioms.SharedSlices(12, 20), SEQ, 12)
_enter("sliced_weight", lambda: hand_idioms.SlicedWeight(12, 20), SEQ, 12)
_enter("half_weight", lambda: hand_idioms.HalfWeight(12, 20), SEQ, 12)
_enter("siamese", lambda: hand_idioms.Siamese(12, 20), 2, SEQ, 12)
_enter("moe_top_k", lambda: hand_idioms.TopK(4, 12, 20), SEQ, 12)
_enter("gathered_experts", lambda: hand_idioms.Gathered(4, 12, 20), SEQ, 12)
_enter("bilinear", lambda: hand_idioms.Bilinear(7, 9, 11), SEQ, 16, include="*")
_enter("unrolled", lambda: hand_idioms.Unrolled(12, 20), SEQ, 12)

# control flow and higher-order ops

_enter(
    "branch_on_value", lambda: hand_idioms.BranchOnValue(12, 20), SEQ, 12, captures=False, fast=True
)
_enter("torch_cond", lambda: hand_idioms.Cond(12, 20), SEQ, 12, branches=True)
_enter("no_grad_region", lambda: hand_idioms.NoGradRegion(12, 20), SEQ, 12)
_enter("checkpointed", lambda: hand_idioms.Checkpointed(12, 20), SEQ, 12)

# torch's own layers


@entry("mha_kdim", "hand")
def _mha_kdim() -> Built:
    model = hand_idioms.CrossAttention(HIDDEN, HEADS, 10, 14)
    return model, (floats(BATCH, SEQ, HIDDEN), floats(BATCH, SEQ, 10), floats(BATCH, SEQ, 14)), {}


@entry("transformer", "hand")
def _transformer() -> Built:
    model = nn.Transformer(HIDDEN, HEADS, 1, 1, INNER, dropout=P_DROP, batch_first=True)
    return model, (floats(BATCH, SEQ, HIDDEN), floats(BATCH, SEQ, HIDDEN)), {}


@entry("embedding_bag", "hand", include="*")
def _embedding_bag() -> Built:
    return hand_layers.Bag(37, 12, 20), (ids(37),), {}


def _lstm(**options: Any) -> nn.Module:
    return hand_layers.Recurrent(nn.LSTM(12, 10, batch_first=True, **options), 7)


_enter("lstm", _lstm, SEQ, 12)
_enter("lstm_bidirectional", lambda: _lstm(num_layers=2, bidirectional=True), SEQ, 12)
_enter("lstm_projected", lambda: _lstm(proj_size=6), SEQ, 12)
_enter("gru", lambda: hand_layers.Recurrent(nn.GRU(12, 10, batch_first=True), 7), SEQ, 12)
_enter("rnn", lambda: hand_layers.Recurrent(nn.RNN(12, 10, batch_first=True), 7), SEQ, 12)
_enter("lstm_cell", lambda: hand_layers.Cell(12, 10), SEQ, 12)

_enter("conv1d", lambda: nn.Conv1d(6, 10, 3, 2, 1), 6, 9, include="*")
_enter("conv3d", lambda: nn.Conv3d(3, 10, 3, padding=1), 3, 4, 5, 6, include="*")
_enter("dilated_conv", lambda: nn.Conv2d(6, 10, 3, dilation=2), 6, 8, 9, include="*")
_enter("grouped_conv", lambda: nn.Conv2d(6, 10, 3, groups=2), 6, 8, 9, include="*")
_enter("depthwise_conv", lambda: nn.Conv2d(6, 12, 3, groups=6), 6, 8, 9, include="*")
_enter("same_conv", lambda: nn.Conv2d(6, 10, (3, 4), padding="same"), 6, 8, 9, include="*")
_enter(
    "circular_conv",
    lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    6, 8, 9, include="*",
)  # fmt: skip
_enter("conv_transpose1d", lambda: nn.ConvTranspose1d(6, 10, 4, 2), 6, 9, include="*")
_enter("conv_transpose2d", lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, 1), 6, 5, 7, include="*")
_enter(
    "grouped_conv_transpose", lambda: nn.ConvTranspose2d(6, 10, 3, groups=2), 6, 5, 7, include="*"
)
_enter("unet", lambda: hand_layers.Unet(3, 8), 3, 8, 12, include="*")

# computed weights

_enter("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(12, 20)), SEQ, 12)
_enter("weight_norm_old", lambda: nn.utils.weight_norm(nn.Linear(12, 20)), SEQ, 12)
_enter(
    "weight_norm_conv",
    lambda: parametrizations.weight_norm(nn.Conv1d(6, 10, 3), dim=2),
    6, 9, include="*",
)  # fmt: skip
_enter("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(12, 20)), SEQ, 12)
_enter("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(12, 20)), SEQ, 12)
_enter("standardised_conv", lambda: hand_layers.StandardConv(6, 10, 3), 6, 8, 9, include="*")


@entry("two_inputs", "hand")
def _two_inputs() -> Built:
    inputs = {"pair": {"left": floats(BATCH, SEQ, 12), "right": floats(BATCH, SEQ, 10)}}
    return hand_layers.TwoInputs(12, 10, 20), (), inputs | {"scale": torch.ones(BATCH, 1, 1)}


# domains


@entry("vla_policy", "hand")
def _vla_policy() -> Built:
    model = hand_domains.Policy(37, HIDDEN, HEADS, 7, 4)
    state, noisy, time = floats(BATCH, 7), floats(BATCH, 4, 7), torch.rand(BATCH)
    return model, (floats(*IMAGE), ids(37), state, noisy, time), {}


@entry("table_attention", "hand")
def _table_attention() -> Built:
    labels = torch.randint(0, 3, (BATCH, 6))
    tables = floats(BATCH, 6, 5), labels, floats(BATCH, 3, 5)
    return hand_domains.Table(HIDDEN, HEADS, 3), tables, {}


@entry("recommender", "hand", fast=True, include="*")
def _recommender() -> Built:
    model = hand_domains.Recommender((37, 23), 13, 12)
    return model, (floats(BATCH, 13), ids(37), ids(23)), {}
