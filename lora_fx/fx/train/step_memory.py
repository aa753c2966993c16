"""The memory of a training step, found by running it once on tensors that have no values.

The step of the largest batch runs forward and backward on torch's meta device, where a tensor has
a shape and takes no memory. Each operator's result is counted while it lives, so the sum rises and
falls as that of the real step will: chunks of a loss, blocks that are computed again, fused
products and all. That takes a few milliseconds an operator's call, whatever the sizes are.

    kept     what lives when the forward pass ends: all of it is needed for backward. Certain.
    peak     the most that lives at any time of the step; the part beyond `kept` is what single
             operators need for a moment

The sums are those of the tensors alone, and equal to what a step takes if the C library gives all
back at once. What is not counted: the weights, and the batch itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.data import Buckets, Table
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.python_dispatch import TorchDispatchMode, backward_in_modes
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train.objective import Objective
from lora_fx.fx.train.reduction import inputs_of
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a step's tensors.

    Attributes:
        kept: Those that live when the forward pass ends.
        peak: The most at any time.
        largest: The shape of the largest tensor.
    """

    kept: int
    peak: int
    largest: tuple[int, ...]


def largest_batch(training: Table | Buckets, rows: int) -> Table:
    """Return the rows that take most of a step: as many as run at a time, in the longest batch."""
    if isinstance(training, Buckets):
        longest = max(training.tables, key=lambda table: _elements(table.trimmed()))
        return longest.rows(np.arange(min(rows, len(longest)))).trimmed()
    mask = training.columns.get("attention_mask")
    order = np.arange(len(training))
    if mask is not None and mask.ndim == 2:
        # a batch is as long as its longest row
        order = np.argsort(-(mask != 0).sum(1), kind="stable")
    return training.rows(order[:rows]).trimmed()


def _elements(table: Table) -> int:
    return sum(column.size for column in table.columns.values())


def step_memory(objective: Objective, batch: Table) -> StepMemory:
    """Return the memory of one step on a batch: forward, loss and backward.

    Raises:
        Exception: An operator cannot run without values, such as one whose result has as many
            elements as the values say.
    """
    model = objective.model
    model.train()
    # captured with values, which decide a path of the model's code
    execution_of(model).prepare(inputs_of(model, batch, objective.own))
    tensors = _without_values(model)
    counted = _LiveBytes(tensors.values())
    attention = _Attention(device_of(model))
    with torch.random.fork_rng(devices=[]), attention, counted:
        step = _Step(objective, batch, counted)
        names = {f"model.{name}": tensor for name, tensor in tensors.items()}
        torch.func.functional_call(step, names, (), tie_weights=False)
    return StepMemory(counted.kept, counted.peak, counted.largest)


def _without_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a tensor of the meta device for each parameter and buffer; ties stay ties.

    Each place of a tensor is named once. One that is named twice, below two names of its module,
    would be replaced twice, and put back once.
    """
    tensors: dict[str, torch.Tensor] = {}
    by_identity: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if id(tensor) not in by_identity:
                empty = torch.empty_like(tensor, device="meta")
                by_identity[id(tensor)] = empty.requires_grad_(tensor.requires_grad)
            tensors[f"{path}.{leaf}".lstrip(".")] = by_identity[id(tensor)]
    return tensors


class _Step(nn.Module):
    """A forward and a backward pass, as a module: other tensors can take the place of its own."""

    def __init__(self, objective: Objective, batch: Table, counted: _LiveBytes) -> None:
        super().__init__()
        self.model = objective.model
        self._objective = objective
        self._batch = batch
        self._counted = counted

    def forward(self) -> None:
        """Run the step; the inputs go to the device of the tensors."""
        loss = self._objective.loss(self._batch)
        self._counted.kept = self._counted.live
        backward_in_modes(loss)


class _Attention(TorchFunctionMode):
    """Attention as the kernels of a device have it: the fused ones keep no scores.

    On the meta device torch would take the formula that keeps them. So it does on a CPU where there
    is dropout, which its fused kernel does not have.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Named | None = None
    ) -> Any:
        """Run a function; see torch.overrides."""
        if func is not torch.ops.aten.scaled_dot_product_attention.default:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if self._device.type == "cpu" and given.get("dropout_p"):
            return func(*args, **(kwargs or {}))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, _ = fused(
            given["query"],
            given["key"],
            given["value"],
            is_causal=given.get("is_causal", False),
            attn_mask=given.get("attn_mask"),
            scale=given.get("scale"),
        )
        return result


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make, while each of them lives.

    Attributes:
        live: Those that live now.
        kept: Those that lived when the forward pass ended.
        peak: The most at any time.
        largest: The shape of the largest tensor.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.kept = 0
        self.peak = 0
        self.largest: tuple[int, ...] = ()
        self._largest_bytes = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._living: dict[int, object] = {storage._cdata: storage for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Named | None = None
    ) -> Any:
        """Run an operator on the meta device, and count what it makes."""
        keywords = dict(kwargs or {})
        name = func._schema.name
        if name.endswith("_") and not name.endswith("__"):  # add_, and not __and__
            return args[0]  # it changes its first argument, of which there is nothing to change
        if any(argument.name == "device" for argument in func._schema.arguments):
            keywords["device"] = torch.device("meta")
        result = func(*args, **keywords)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._living:
            return
        size = storage.nbytes()
        self._living[address] = weakref.ref(storage, partial(self._freed, address, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        if size > self._largest_bytes:
            self._largest_bytes = size
            self.largest = tuple(tensor.shape)

    def _freed(self, address: int, size: int, storage: object) -> None:
        self._living.pop(address, None)
        self.live -= size
