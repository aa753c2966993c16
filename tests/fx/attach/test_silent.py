"""Where replacing modules goes wrong without saying so: attach against the explicit W + s·BA.

The oracle is a plain fp64 copy of the model with W + s·BA in its parameters, never another tool.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from tests.fx.attach.attached import effect, explicit, gap, randomise, same_state, state
from tests.silent import MODELS, built, floats
from tests.zoo.models import redraw
from tests.zoo.shared import captured


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if not m.computed])
def test_effect_gradient_and_numbers(name: str) -> None:
    cap, args, _ = captured(f"silent {name}", lambda: built(name))
    model = cap.model
    was = state(model)
    changed = effect(model, args)
    lora_fx.attach(cap, rank=2, include="*")
    adapter = randomise(model)
    lora_fx.detach(model)
    assert same_state(state(model), was)
    want = explicit(model, adapter, args)
    lora_fx.attach(cap, adapter=adapter)
    with torch.no_grad():  # the fused paths of eval mode
        fused = model(*args)
    assert gap(fused, want) < 5e-6
    assert gap(model(*args), want) < 5e-6
    assert changed(fused) > 0.02
    torch.manual_seed(0)  # of stochastic depth, which may drop a block for all rows
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


class Headed(nn.Module):
    """A language model, and a loss that never makes its logits, as trainers have."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(self.emb(ids)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_whose_weight_is_read_outside_its_forward(tied: bool) -> None:
    model, ids = Headed(), torch.arange(10).reshape(2, 5)
    if tied:
        model.head.weight = model.emb.weight
    redraw(model.eval())
    lora_fx.attach(model, (ids,), rank=2, include="head,body")
    randomise(model)
    assert "every read" not in str(model.report())
    for mode in (False, True):
        model.train(mode)
        want = model(ids)
        got = nn.functional.linear(model.hidden(ids), model.head.weight, model.head.bias)
        assert gap(got, want) < 2e-6
    model.zero_grad()
    got.square().sum().backward()
    for name, p in model.named_parameters():
        assert "lora_" not in name or (p.grad is not None and p.grad.any()), name
    assert torch.equal(model.emb.weight, model.emb._parameters["weight"]), "the lookup's is W"
