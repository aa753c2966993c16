"""Every promise on twenty models whose every parameter and norm statistic was redrawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter import Adapter
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.fx.capture import Captured
from lora_fx.inputs import SIZES
from lora_fx.lowrank import draw
from lora_fx.passes.prove import prove, torch_run
from tests.providers import PROVIDERS
from tests.zoo.models import FAST, ZOO

EFFECT = 0.15
"""Factor on a random B: the adapter is seen in the output and does not swamp it."""
SMALLER = {"tv_resnet18": 0.3, "timm_resnet18": 0.3, "hf_t5": 0.3}
"""Deep residual sums, and T5's unscaled attention logits, amplify change and rounding alike."""


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """The fused inference path of nn.MultiheadAttention rounds otherwise; the graph has none."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@lru_cache(maxsize=2)
def built(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Captured]:
    model, args, kwargs = ZOO[name].build()
    model.requires_grad_(False)  # torch folds some matmuls otherwise where a weight wants grad
    return model, args, kwargs, lora_fx.capture(model, args, kwargs)


def adapted(name: str, **options: Any) -> Any:
    return lora_fx.insert(
        built(name)[3], rank=2, include="*" if "resnet" in name else None, **options
    )


def perturbed(name: str) -> Any:
    """An adapter with a random B on every target of the default plan."""
    module = adapted(name)
    updates = {}
    for key, u in module.updates.items():
        a, b = draw(key, u.layout, u.rank, 0, "probe")
        factor = EFFECT * SMALLER.get(name, 1.0)
        updates[key] = replace(u, a=a, b=b * np.float32(factor))
    module.load_adapter(Adapter(updates))
    return module


def flat(out: Any) -> list[np.ndarray[Any, Any]]:
    return [x.detach().numpy() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def worst(ours: Any, reference: Any) -> float:
    return max(rel(a, b) for a, b in zip(flat(ours), flat(reference), strict=True))


def same(ours: Any, reference: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(flat(ours), flat(reference), strict=True))


def explicit(name: str, module: Any, named: Mapping[str, Any]) -> Any:
    """The original's own code on W + ΔW in fp64; lookups of a tied tensor keep W."""
    model, _, _, cap = built(name)
    model = copy.deepcopy(model).double()
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in reversed(list(names.items()))}
    state = dict(names)
    for key, delta in module.adapter().deltas().items():
        use = module.updates[key].use
        for n, p in names.items():
            if first[id(p)] == key and (not use or use.startswith("op:") or n == use):
                state[n] = p + torch.from_numpy(delta)
        if use.startswith("op:"):  # one name, two uses: the lookup is put back
            table = names[key]
            owner = model.get_submodule(key.rpartition(".")[0])
            owner.register_forward_hook(lambda m, a, out, table=table: F.embedding(a[0], table))
    wide = pytree.tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
        dict(named),
    )

    class Call(nn.Module):
        def forward(self) -> Any:
            return cap.signature.call(
                lambda *a, **k: torch.func.functional_call(model, state, a, k, tie_weights=False),
                wide,
            )

    with torch.no_grad():
        return Call()()


@pytest.mark.parametrize("name", FAST)
def test_zero_b_changes_nothing_in_both_modes(name: str) -> None:
    model, args, kwargs, _ = built(name)
    module = adapted(name, norm_stats="update")
    with torch.no_grad():
        assert same(module(*args, **kwargs), model(*args, **kwargs))
        own = copy.deepcopy(model).train()
        module.train()
        torch.manual_seed(0)
        got = module(*args, **kwargs)
        torch.manual_seed(0)
        assert same(got, own(*args, **kwargs))


@pytest.mark.parametrize("name", FAST)
def test_equal_to_the_explicit_sum_and_seen(name: str) -> None:
    module = perturbed(name)
    for size in SIZES:
        named = module.sample(size)
        with torch.no_grad():
            ours = module._run_named(named)
            with module.base():
                base = module._run_named(named)
        assert 0.05 < worst(ours, base) < 5
        assert worst(ours, explicit(name, module, named)) < ORT_TOL


@pytest.mark.parametrize("name", FAST)
def test_only_the_adapter_moves_and_every_zero_gets_a_gradient(name: str) -> None:
    _, args, kwargs, _ = built(name)
    module = adapted(name)
    module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.manual_seed(0)
    outs = [
        x
        for x in pytree.tree_leaves(module(*args, **kwargs))
        if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    torch.stack([(x * torch.randn_like(x)).sum() for x in outs]).sum().backward()
    for key, p in module.named_parameters():
        if p.requires_grad and "lora_B" in key:
            assert p.grad is not None and p.grad.abs().max() > 0, key
    trained = [p for p in module.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora_" in k for k in moved)
    assert all(".lora_B." in f".{k}" for k in moved), "A has no gradient while B is zero"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", FAST)
def test_fold_and_onnx_runtime(name: str, provider: str, tmp_path: Path) -> None:
    module = perturbed(name)
    folded = lora_fx.fold(module)
    parity = prove(torch_run(folded), module, tol=FOLD_TOL)
    sizes = {tuple(p.sizes.values()) for p in parity}
    assert len(sizes) == len(parity) == 3
    assert max(p.rel for p in parity) < FOLD_TOL
    report = lora_fx.export(module, tmp_path / "m.onnx", provider=provider)
    assert report and max(p.rel for p in report.parity) < ORT_TOL
    if ZOO[name].tied:  # the lookup's tensor is as it was
        model = built(name)[0]
        (grown,) = (f for f in folded.folded if f.grew)
        assert torch.equal(
            folded.get_parameter(grown.parameter), model.get_parameter(grown.parameter)
        )
