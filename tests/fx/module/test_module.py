"""The module that insert returns: what a user may do with it."""

from __future__ import annotations

import copy
import hashlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn

import lora_fx
from lora_fx.fx.module.execution import execution_of
from tests.zoo.shared import zoo


class Net(nn.Module):
    """Two blocks in a ModuleList, a norm with statistics, dropout, a keyword-only argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)) for _ in range(2)]
        )
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 4)
        self.register_buffer("shift", torch.randn(6))

    def forward(
        self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> Any:
        for block in self.blocks:
            x = x + block(x)
        x = self.drop(self.norm(x)) * scale + self.shift
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return {"logits": self.head(x), "hidden": x}


def digest(module: nn.Module) -> str:
    h = hashlib.sha256()
    for name, t in module.state_dict().items():
        h.update(name.encode() + t.numpy().tobytes())
    return h.hexdigest()


@pytest.fixture
def net() -> Net:
    model = Net()
    model(torch.randn(16, 6))  # statistics that are not the initial ones
    return model.eval()


def perturb(module: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)


def test_names_flags_and_class(net: Net) -> None:
    m = lora_fx.insert(net, (torch.randn(3, 6),), rank=2, also_train="head")
    state = m.state_dict()
    assert [k for k in state if "lora_" not in k] == list(net.state_dict())
    trained = {n for n, p in m.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert "blocks.0.0.lora_A.weight" in trained and "blocks.1.2.lora_B.weight" in trained
    assert type(m).__name__ == "Net" and isinstance(m, lora_fx.AdaptedModule)
    assert "Sequential" in repr(m)
    assert str(inspect.signature(m.forward)) == str(inspect.signature(net.forward))
    assert m.blocks[0][0].weight.data_ptr() == net.blocks[0][0].weight.data_ptr(), "shared"
    assert m.head.weight.data_ptr() != net.head.weight.data_ptr(), "trained, so a copy"
    assert m.shift.data_ptr() != net.shift.data_ptr()


def test_calls(net: Net) -> None:
    x, mask = torch.randn(3, 6), torch.ones(3)
    net.requires_grad_(False)
    m = lora_fx.insert(net, (x,), rank=2)
    for args, kwargs in [
        ((x,), {}),
        ((), {"x": x}),
        ((x,), {"scale": 2.0}),
        ((x,), {"mask": mask}),
        ((torch.randn(7, 6),), {}),
        ((torch.randn(1, 6),), {"mask": None}),
    ]:
        got, want = m(*args, **kwargs), net(*args, **kwargs)
        assert list(got) == ["logits", "hidden"]
        assert torch.equal(got["logits"], want["logits"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        m(x, nope=1)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        m()
    with pytest.raises(ValueError, match=r"x: captured for sizes \[None, 6\]"):
        m(torch.randn(3, 5))


def test_train_and_eval(net: Net) -> None:
    x = torch.randn(8, 6)
    net.requires_grad_(False)
    m = lora_fx.insert(net, (x,), rank=2, norm_stats="update")
    own = copy.deepcopy(net)
    m.train(), own.train()
    torch.manual_seed(1)
    got = m(x)["logits"]
    torch.manual_seed(1)
    want = own(x)["logits"]
    assert torch.equal(got, want)
    assert torch.equal(m.norm.running_mean, own.norm.running_mean)
    assert int(m.norm.num_batches_tracked) == int(own.norm.num_batches_tracked)
    m.eval(), own.eval()
    assert torch.equal(m(x)["logits"], own(x)["logits"])


def test_statistics_are_frozen_by_default(net: Net) -> None:
    x = torch.randn(8, 6)
    m = lora_fx.insert(net, (x,), rank=2)
    before = m.norm.running_mean.clone(), m.norm.num_batches_tracked.clone()
    m.train()
    m(x)["logits"].sum().backward()
    assert torch.equal(m.norm.running_mean, before[0])
    assert torch.equal(m.norm.num_batches_tracked, before[1])


def test_dropout_of_the_branch_in_train_only(net: Net) -> None:
    x = torch.randn(8, 6)
    net.drop.p = 0.0
    m = lora_fx.insert(net, (x,), rank=2, dropout=0.5)
    perturb(m)
    assert torch.equal(m(x)["logits"], m(x)["logits"])
    m.train()
    assert not torch.equal(m(x)["logits"], m(x)["logits"])
    with m.base():
        assert torch.equal(m(x)["logits"], m(x)["logits"])


def test_the_users_module_is_untouched() -> None:
    call = (torch.randn(16, 6),)
    for model, args, kwargs, whole in (
        (Net().eval(), call, {}, "head"),
        (*zoo("hf_bert/1"), "classifier"),
    ):
        before = digest(model)
        flags = [p.requires_grad for p in model.parameters()]
        # bert has no batch norm, whose statistics might move
        for stats in ("frozen", "update") if isinstance(model, Net) else ("frozen",):
            m = lora_fx.insert(model, args, kwargs, rank=2, norm_stats=stats, also_train=whole)
            m.train()
            opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
            for _ in range(5):
                loss = m(*args, **kwargs)["logits"].square().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
            assert digest(model) == before
        assert not model.training
        assert flags == [p.requires_grad for p in model.parameters()]
        assert not any("lora" in n for n in model.state_dict())


def test_to_bfloat16_meta_and_back(net: Net) -> None:
    x = torch.randn(3, 6)
    net.requires_grad_(False)
    m = lora_fx.insert(net, (x,), rank=2)
    want = copy.deepcopy(net).to(torch.bfloat16)(x.bfloat16())["logits"]
    b = copy.deepcopy(m).to(torch.bfloat16)
    assert torch.equal(b(x.bfloat16())["logits"], want)
    assert copy.deepcopy(m).to("meta")(x.to("meta"))["logits"].device.type == "meta"
    masters = lora_fx.insert(copy.deepcopy(net).bfloat16(), (x.bfloat16(),), rank=2)
    assert {p.dtype for n, p in masters.named_parameters() if "lora_" in n} == {torch.float32}
    assert masters(x.bfloat16())["logits"].dtype == torch.bfloat16


def test_deepcopy_is_independent(net: Net) -> None:
    x = torch.randn(3, 6)
    m = lora_fx.insert(net, (x,), rank=2)
    c = copy.deepcopy(m)
    perturb(c)
    with m.base():
        base = m(x)["logits"]
    assert torch.equal(m(x)["logits"], base)
    assert not torch.equal(c(x)["logits"], base)


def test_compile_and_autocast(net: Net) -> None:
    x = torch.randn(3, 6)
    m = lora_fx.insert(net, (x,), rank=2)
    perturb(m)
    m(x)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)["logits"], m(x)["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x)["logits"]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), m(x)["logits"], atol=0.1, rtol=0.1)


class Long(nn.Module):
    """A net that takes another path on long inputs, so that a call asks for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y[:, :8] if x.shape[1] > 8 else y


def test_a_condition_on_sizes_is_compiled_without_a_warning() -> None:
    """Warnings are errors here; Dynamo warned of the cache of parsed conditions."""
    x = torch.randn(2, 12, 6)
    m = lora_fx.insert(Long(), (x,), rank=2)
    assert execution_of(m).captured.traced(False, {"x": x}).door.conditions
    torch.testing.assert_close(torch.compile(m, backend="eager")(x), m(x))


def test_save_and_load_without_pickle(net: Net, tmp_path: Any) -> None:
    x = torch.randn(3, 6)
    m = lora_fx.insert(net, (x,), rank=2, also_train="head")
    perturb(m)
    save_tensors(m, str(tmp_path / "all.safetensors"))
    again = lora_fx.insert(Net().eval(), (x,), rank=2, also_train="head")
    load_tensors(again, str(tmp_path / "all.safetensors"))
    assert torch.equal(again(x)["logits"], m(x)["logits"])
    lora_fx.save_adapter(m.adapter(), tmp_path / "adapter")
    third = lora_fx.insert(net, (x,), adapter=lora_fx.load_adapter(tmp_path / "adapter"))
    assert torch.equal(third(x)["logits"], m(x)["logits"])
    fourth = lora_fx.insert(net, (x,), rank=1, also_train="head")
    fourth.load_adapter(lora_fx.load_adapter(tmp_path / "adapter"))
    assert torch.equal(fourth(x)["logits"], m(x)["logits"])


def test_load_state_dict_does_not_write_into_the_users_module(net: Net) -> None:
    before = digest(net)
    m = lora_fx.insert(net, (torch.randn(3, 6),), rank=2)
    m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()})
    assert digest(net) == before
    assert float(m.head.weight.detach().abs().max()) == 0.0


def test_seed_and_order(net: Net) -> None:
    x = (torch.randn(3, 6),)
    state = torch.get_rng_state()
    a, b = (
        lora_fx.insert(net, x, rank=2, seed=1),
        lora_fx.insert(net, x, rank=2, seed=1, include="head,blocks.*"),
    )
    c = lora_fx.insert(net, x, rank=2, seed=2)
    assert torch.equal(torch.get_rng_state(), state), "global randomness is not used"
    key = "blocks.1.0.weight"
    np.testing.assert_array_equal(a.adapter().lowrank[key].a, b.adapter().lowrank[key].a)
    assert not np.array_equal(a.adapter().lowrank[key].a, c.adapter().lowrank[key].a)


def test_hooks_fire_on_blocks_and_recompute_saves_nothing_else(net: Net) -> None:
    x = torch.randn(3, 6)
    m = lora_fx.insert(net, (x,), rank=2)
    perturb(m)
    seen = []
    m.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    m(x)
    assert seen == [1]
    net.drop.p = 0.0
    m = lora_fx.insert(net, (x,), rank=2)
    perturb(m)
    m.train()
    m(x)["logits"].square().sum().backward()
    grads = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad()
    for block in m.blocks:
        block.recompute = True
    m(x)["logits"].square().sum().backward()
    again = [p.grad for p in m.parameters() if p.grad is not None]
    assert all(torch.equal(g, h) for g, h in zip(grads, again, strict=True))


def test_generation_config_is_refused_with_a_hint() -> None:
    """TRL's trainers ask for it; others ask first whether it is there."""
    model, _, _ = zoo("hf_llama/1")
    ids = torch.randint(0, 9, (2, 5))
    module = lora_fx.insert(model, (ids,), rank=2)
    assert getattr(module, "generation_config", None) is None
    with pytest.raises(AttributeError, match=r"lora_fx\.attach"):
        _ = module.generation_config
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
    logits = module(ids).logits
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids).logits, logits)
