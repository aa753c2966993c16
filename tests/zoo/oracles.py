"""What is known about a model without lora-fx: its own code on W + s·BA, and its weight matmuls."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import from_numpy
from lora_fx.passes.proofs.reference import Run
from lora_fx.targets.target import base_name, split_key


@dataclass(frozen=True)
class Subject:
    """A model of the zoo, frozen, with its inputs and its capture."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cap: Captured


def flat(out: Any) -> list[np.ndarray[Any, Any]]:
    """The tensors of an output as arrays, in the order that its class gives them."""
    leaves = pytree.tree_leaves(
        pytree.tree_map(lambda x: x, out)
    )  # it may have been made in another
    return [x.detach().numpy() for x in leaves if isinstance(x, torch.Tensor)]


def doubled(model: nn.Module) -> Any:
    """A copy in fp64."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product has no fp64
    return wide


def explicit(subject: Subject, module: Any, *, double: bool = True) -> Run:
    """{input: array} → {output: array} of the original's own code on W + ΔW, in fp64 or its own.

    Lookups of a tied tensor keep W where the update leaves them alone. ΔW of a computed weight
    is added to the operand that is computed from its parameters, in front of every product.
    """
    model: Any = doubled(subject.model) if double else copy.deepcopy(subject.model)
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in reversed(list(names.items()))}
    summed: dict[str, torch.Tensor] = {}
    computed: dict[frozenset[str], torch.Tensor] = {}
    for key, delta in module.adapter().deltas().items():
        use = module.updates[key].use
        d = torch.from_numpy(delta).to(torch.float64 if double else torch.float32)
        if key.endswith("~"):
            computed[_behind(key[:-1], names)] = d
            continue
        root = base_name(key)
        _, region = split_key(key, tuple(names[root].shape))
        where = tuple(slice(lo, hi) for lo, hi in region)
        for n, p in names.items():
            if first[id(p)] == root and (not use or use.startswith("op:") or n == use):
                summed.setdefault(n, p.detach().clone())[where] += d.reshape(p[where].shape)
        if use.startswith("op:"):  # one name, two uses: the lookup is put back
            table = names[root]
            owner = model.get_submodule(root.rpartition(".")[0])
            owner.register_forward_hook(lambda m, a, out, table=table: F.embedding(a[0], table))
    for n, value in summed.items():
        path, _, leaf = n.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    named = subject.cap.named
    leaves, spec = pytree.tree_flatten(dict(named))
    mode = _Effective(model, computed)

    def run(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        new = [
            from_numpy(feeds[n.replace(".", "_")]) if isinstance(x, torch.Tensor) else x
            for n, x in zip(leaf_names(named), leaves, strict=True)
        ]
        wide = [
            x.double() if double and getattr(x, "dtype", None) == torch.float32 else x for x in new
        ]
        with torch.no_grad(), mode:
            out = subject.cap.signature.call(model, pytree.tree_unflatten(wide, spec))
        outputs = list(execution_of(module).flat(pytree.tree_unflatten(new, spec)))
        return dict(zip(outputs, flat(out), strict=True))

    return run


def _behind(name: str, names: Collection[str]) -> frozenset[str]:
    """The parameters that a computed weight is made of: its own, or those in its module."""
    path = name.rpartition(".")[0]
    inside = [n for n in names if not path or n.startswith(path + ".")]
    return frozenset([name] if name in names else inside)


class _Multiplied(TorchFunctionMode):
    """Follows parameters through whatever depends on nothing else, up to a product."""

    PRODUCTS = (
        "linear", "conv", "matmul", "mm", "einsum", "multi_head_attention_forward", "lstm", "gru",
        "rnn",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.roots = {id(b): frozenset[str]() for b in model.buffers()}
        self.roots |= {id(p): frozenset([n]) for n, p in model.named_parameters() if p.ndim > 1}
        self.roots |= {id(p): frozenset() for p in model.parameters() if p.ndim < 2}
        self.alive: list[torch.Tensor] = []  # so that no id is given twice
        self.found: set[frozenset[str]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [
            x
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
        roots = [self.roots.get(id(x)) for x in operands]
        name = getattr(func, "__name__", "")
        if "embedding" in name:  # what a lookup gives depends on the ids
            self.found |= {r for r in roots if r and "bag" in name}
        elif any(r is None for r in roots):
            if any(word in name for word in self.PRODUCTS):
                first = 3 if "attention" in name else 0  # query, key and value are no weights
                pairs = list(zip(operands, roots, strict=True))[first:]
                self.found |= {r for x, r in pairs if r and x.ndim > 1}
        elif operands:
            for x in pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.roots.setdefault(id(x), frozenset().union(*(r for r in roots if r)))
                    self.alive.append(x)
        return out


class _Effective(_Multiplied):
    """Adds ΔW to the operands of products that are computed from some parameters alone."""

    def __init__(self, model: nn.Module, deltas: Mapping[frozenset[str], torch.Tensor]) -> None:
        super().__init__(model)
        self.deltas = deltas

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.deltas and any(w in getattr(func, "__name__", "") for w in self.PRODUCTS):
            leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            if any(self.roots.get(id(x)) is None for x in leaves if x.is_floating_point()):
                args = pytree.tree_map(self._changed, args)
        out = super().__torch_function__(func, types, args, kwargs)
        if not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves((args, kwargs))):
            self.roots.setdefault(id(out), frozenset())  # an identity matrix is a constant
            self.alive.append(out)
        return out

    def _changed(self, x: Any) -> Any:
        known = self.roots.get(id(x)) or frozenset()
        for behind, delta in self.deltas.items():
            if isinstance(x, torch.Tensor) and x.ndim > 1 and behind & known:
                return x + delta
        return x


def multiplied(subject: Subject) -> set[frozenset[str]]:
    """For every weight operand of a product: the parameters, of 2+ dimensions, it is made of."""
    mode = _Multiplied(subject.model)
    with torch.no_grad(), mode:
        subject.model(*subject.args, **subject.kwargs)
    return mode.found


def matters(subject: Subject, parameter: str) -> bool:
    """True when the outputs depend on a parameter; some models drop what they compute."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        before = flat(model(*subject.args, **subject.kwargs))
        model.get_parameter(parameter).mul_(1.5)
        after = flat(model(*subject.args, **subject.kwargs))
    return not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
