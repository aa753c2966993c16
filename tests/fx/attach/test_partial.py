"""Models that cannot be captured as a whole: attach finds their targets in partial graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from tests.fx.attach.attached import effect, explicit, gap, randomise, same_state, state
from tests.silent import TiedEmbedding, floats
from tests.zoo.models import redraw


class Branches(nn.Module):
    """Runs one of two layers by the sign of a value, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        x = self.up(x) if float(x.sum()) > 0 else self.down(x)
        return self.rnn(x)[0]


def test_a_model_that_cannot_be_captured() -> None:
    model = Branches()
    redraw(model)
    x = floats(2, 4, 6)
    with pytest.raises(lora_fx.LoraFxError, match="tensor's value"):
        lora_fx.capture(model, (x,))
    was = state(model)
    lora_fx.attach(model, (x,), rank=2, include="*")
    adapter = randomise(model)
    taken = "up.weight" if "up.weight" in adapter.entries else "down.weight"
    other = "down.weight" if taken == "up.weight" else "up.weight"
    assert list(adapter) == ["first.weight", taken, "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    report = model.report()
    assert "partial graphs, at the example inputs: cannot capture Branches" in str(report)
    assert [u.key for u in report.found.unreached] == [other]
    out = model(x)
    lora_fx.detach(model)
    assert same_state(state(model), was)
    assert gap(out, explicit(model, adapter, (x,))) < 2e-6
    assert effect(model, (x,))(out) > 0.02


class TiedBranches(TiedEmbedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.emb(ids))
        return self.head(x) if float(x.sum()) < 100.0 and ids[0, 0] < 1 else x


def test_tied_uses_in_partial_graphs() -> None:
    model, ids = TiedBranches(), torch.arange(10).reshape(2, 5)
    redraw(model)
    with pytest.raises(lora_fx.LoraFxError, match="cannot tell the uses of a tied tensor apart"):
        lora_fx.attach(model, (ids,), rank=2, include="op:linear")
    assert type(model) is TiedBranches
    lora_fx.attach(model, (ids,), rank=2, include="re:emb")
    adapter = randomise(model)
    out = model(ids)
    assert gap(out, explicit(lora_fx.detach(model), adapter, (ids,))) < 2e-6


def test_a_bad_call_keeps_its_own_message() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="cannot capture Branches"):
        lora_fx.attach(Branches(), (floats(2, 4, 7),), rank=2)


def test_wav2vec2_trains_although_its_train_mode_cannot_be_captured() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=20,
        mask_time_prob=0.5, mask_time_length=2, classifier_proj_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(config)
    x = floats(2, 800)
    lora_fx.attach(model, (x,), rank=2)
    assert "partial" not in str(model.report())
    model.train()
    loss = model(x, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert any(bool(p.grad.any()) for n, p in model.named_parameters() if "lora_B" in n)
