"""Models for the .pt2 tests: calls that return a loss or one tensor, with and without dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from tests.zoo.shared import zoo


def built(name: str, dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    """(model, keyword arguments of one call): labels where the model takes them."""
    model, args, kwargs = zoo(name)
    if name.startswith("hf_bert"):
        kwargs = {**kwargs, "labels": torch.tensor([3, 7])}
    elif name.startswith("hf_gpt2"):
        kwargs = {**kwargs, "labels": kwargs["input_ids"]}
    else:
        kwargs = {"src" if name.startswith("transformer") else "x": args[0]}
    if not dropout:
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            if isinstance(getattr(m, "dropout", None), float):
                m.dropout = 0.0
    return model, kwargs


def exported(model: Any, args: Any, kwargs: Any, path: Path) -> str:
    """What a user of torch alone writes, dimensions dynamic as ours are by default.

    The model is a module, or its capture.
    """
    cap = model if isinstance(model, Captured) else lora_fx.capture(model, args, kwargs)
    model, inputs = cap.model, cap.inputs
    leaves, spec = pytree.tree_flatten((args, kwargs))
    free = iter([{d: Dim.AUTO for d in s.dims} or None for s in inputs.specs])
    dims = [next(free) if isinstance(x, torch.Tensor) else None for x in leaves]
    shapes = pytree.tree_unflatten(dims, spec)[0 if args else 1]
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, str(path))
    return str(path)


def stirred(module: AdaptedModule) -> AdaptedModule:
    """Branches that act."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


class Net(nn.Module):
    """Dropout, a norm, a constant, a buffer that is not saved, nested inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("shift", torch.full((8,), 0.1), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, parts: dict[str, Any], scale: float = 1.0, *, extra: Any = None) -> Any:
        x = self.fc(parts["a"]) + self.fc(parts["b"][0]) + self.shift
        x = self.drop(self.norm(x)) * scale + torch.tensor([0.5] * 8)
        return {"scores": self.out(x), "more": (x, None)}


def net() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    return Net().eval(), ({"a": a, "b": [b]}, 2.0)
