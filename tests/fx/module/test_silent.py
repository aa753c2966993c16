"""Where replacing modules goes wrong without saying so: insert against the explicit W + s·BA.

The oracle is the user's own module in fp64, called with W + s·BA in the place of its parameters;
where the model computes the weight, ΔW is added to the operand of its op. Never another tool.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import FOLD_TOL, ORT_TOL
from lora_fx.fx.capture.capture import Captured
from lora_fx.targets.keys import base_name, split_key
from tests.fx.attach.attached import effect, gap, wide
from tests.silent import MODELS, built
from tests.zoo.shared import captured

FACTORS = (0.15, 0.05, 0.5, 1.5)
"""On a random B, in turn, until the adapter is seen in the output and does not swamp it."""


class Effective(TorchFunctionMode):
    """Adds ΔW to the weight operand of whatever the modules of some paths call."""

    OPS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))

    def __init__(self, model: nn.Module, deltas: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.now: list[torch.Tensor] = []
        for path, delta in deltas.items():
            owner = model.get_submodule(path)
            owner.register_forward_pre_hook(lambda m, a, d=delta: self.now.append(d))
            owner.register_forward_hook(lambda m, a, out: (self.now.pop(), None)[1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.now and getattr(func, "__name__", "") in self.OPS:
            x, w, *more = args
            args = (x, w + self.now[-1], *more)
        return func(*args, **(kwargs or {}))


def explicit(model: nn.Module, adapter: Adapter, args: Any) -> Any:
    """The module's own code, in fp64, on W + s·BA; an update of one use reaches that name only."""
    plain = copy.deepcopy(model).double().eval()
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")  # the grouped product has no fp64
    names = dict(plain.named_parameters(remove_duplicate=False))
    weights = {n: p.detach().clone() for n, p in names.items()}
    computed: dict[str, torch.Tensor] = {}
    for key, change in adapter.deltas().items():
        delta, use = torch.from_numpy(change), adapter.lowrank[key].use
        if key.endswith("~"):
            computed[key.rpartition(".")[0]] = delta
            continue
        root = base_name(key)
        _, region = split_key(key, tuple(names[root].shape))
        for n, p in names.items():
            if p is names[root] and use in ("", n):
                weights[n][tuple(slice(lo, hi) for lo, hi in region)] += delta
    mode = Effective(plain, computed) if computed else contextlib.nullcontext()
    with torch.no_grad(), mode:
        return functional_call(plain, weights, pytree.tree_map(wide, args), tie_weights=False)


def adapted(cap: Captured, args: Any, include: str) -> Any:
    """The module that insert returns, with an adapter that is seen in its output."""
    module = lora_fx.insert(cap, rank=2, include=include)
    changed = effect(cap.model, args)
    for factor in FACTORS:
        updates = {}
        for key, u in module.updates.items():
            a, b = draw(key, u.layout, u.rank, 0, "probe")
            updates[key] = replace(u, a=a, b=b * np.float32(factor))
        module.load_adapter(Adapter(updates))
        with torch.no_grad():
            if 0.05 < changed(module(*args)) < 5:
                return module
    raise AssertionError("a parity test of a no-op proves nothing")


def without_gradient(module: Any, args: Any) -> list[str]:
    """Names of the lora_B that one backward in train mode leaves without gradient."""
    torch.manual_seed(0)  # of stochastic depth, which may drop a block for all rows
    out = module.train()(*args)
    outs = [y for y in pytree.tree_leaves(out) if isinstance(y, torch.Tensor)]
    g = torch.Generator().manual_seed(0)
    torch.stack([(y * torch.randn(y.shape, generator=g)).sum() for y in outs]).sum().backward()
    module.eval()
    bs = {n: p.grad for n, p in module.named_parameters() if ".lora_B." in f".{n}"}
    assert bs
    return [n for n, grad in bs.items() if grad is None or not grad.any()]


CASES = [(n, "*") for n in MODELS] + [("tied", "head"), ("tied", "emb")]


@pytest.mark.parametrize(("name", "include"), CASES)
def test_insert_and_fold_are_the_explicit_sum(name: str, include: str, tmp_path: Path) -> None:
    cap, args, _ = captured(f"silent {name}", lambda: built(name))
    model = cap.model
    module = adapted(cap, args, include)
    for ending in MODELS[name].keys.split():
        assert any(k.endswith(ending) for k in module.updates), ending
    want = explicit(model, module.adapter(), args)
    assert not without_gradient(module, args)
    folded = lora_fx.fold(module)
    with torch.no_grad():
        assert gap(module(*args), want) < ORT_TOL
        assert gap(folded(*args), want) < ORT_TOL
        assert gap(folded(*args), module(*args)) < FOLD_TOL
    if MODELS[name].merges:
        file = tmp_path / "m.onnx"
        lora_fx.export(module, file, provider="cpu")
        assert gap(on_runtime(file, args), want) < ORT_TOL


def on_runtime(file: Path, args: Any) -> list[torch.Tensor]:
    """What ONNX Runtime makes of the example inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]
