"""Adapters of PEFT on graphs: stacks of experts and tied heads do there what they did in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter
from tests.formats.merging import randomise

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Experts(nn.Module):
    """Mean over experts of down(relu(up(x))), stored [E, out, in] or [E, in, out]."""

    def __init__(self, turned: bool, honest: bool = True) -> None:
        super().__init__()
        up, down = ((3, 6, 7), (3, 7, 6)) if turned else ((3, 7, 6), (3, 6, 7))
        self.up = nn.Parameter(torch.randn(up))
        self.down = nn.Parameter(torch.randn(down))
        self.turned, self.is_transposed = turned, turned if honest else not turned

    def forward(self, x: Any) -> Any:
        up, down = self.up, self.down
        if not self.turned:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        hidden = torch.relu(torch.matmul(x, up))
        return torch.matmul(hidden, down).mean(0)


class Net(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.experts = Experts(*args)

    def forward(self, x: Any) -> Any:
        return self.experts(x)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("names", [["up"], ["down", "up"]])
def test_stacks(tmp_path: Path, turned: bool, honest: bool, names: list[str]) -> None:
    """`up` and `down` have each other's shape turned round; is_transposed may even be wrong."""
    torch.manual_seed(0)
    net, x = Net(turned, honest), torch.randn(5, 6)
    base = net(x).detach().numpy()
    again = Net(turned, honest)
    again.load_state_dict(net.state_dict())
    given = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, given)
        randomise(model)
        model.save_pretrained(tmp_path)
        want = model(x).detach().numpy()
    got = lora_fx.insert(again, (x,), adapter=load_adapter(tmp_path))(x).detach().numpy()
    assert rel(got, want) < 1e-5 and rel(want, base) > 0.05


def test_a_tied_head(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}

    def llama() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=2, tie_word_embeddings=True, use_cache=False
        )
        return transformers.LlamaForCausalLM(config).eval()

    ids = {"input_ids": torch.arange(8)[None]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = peft.LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True)
        model = peft.get_peft_model(llama(), given).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        want = model(**ids).logits.detach().numpy()
    got = lora_fx.insert(llama(), (), ids, adapter=load_adapter(tmp_path)).eval()
    assert rel(got(**ids).logits.detach().numpy(), want) < 1e-5
    assert rel(want, llama()(**ids).logits.detach().numpy()) > 0.05


def test_what_a_graph_cannot_hold_is_named(tmp_path: Path) -> None:
    """A singular value twice: nobody knows which part of the base PEFT took off."""
    net, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 6)), given).save_pretrained(tmp_path)
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6, 4))
    with pytest.raises(LoraFxError, match=r"'0\.weight': singular values 2 and 3 are equal"):
        lora_fx.insert(net, (x,), adapter=load_adapter(tmp_path))
    assert torch.equal(net[0].weight, torch.eye(6, 4))
