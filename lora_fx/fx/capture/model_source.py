"""The code of a model without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx import quantised_parameters
from lora_fx.fx.capture.call import Signature
from lora_fx.fx.capture.root_module import Called
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.fake_tensors import FakeTensorMode
from lora_fx.fx.symbolic_sizes import ShapeEnv
from lora_fx.fx.tensors import AdapterTensors


@dataclass
class ModelSource:
    """The code of a model without its weights.

    Attributes:
        module: A copy whose tensors are fake, or the model itself where it cannot be copied.
        mode: The mode of the fake tensors; None when `module` is the user's own.
        method: The name of a bound method that is captured; empty where the module is called.
        why: The reason why it could not be copied, and what follows.
        copies: The same in other dtypes, made on first use.
    """

    module: nn.Module
    mode: FakeTensorMode | None = None
    method: str = ""
    why: str = ""
    copies: dict[torch.dtype, ModelSource] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSource:
        """Copy a model without its weights; where it cannot be copied, take it as it is."""
        if isinstance(model, Called):
            bound_to = getattr(model.function, "__self__", None)
            if not isinstance(bound_to, nn.Module):
                return cls(model)
            method = str(getattr(model.function, "__name__", "forward"))
            return cls(*weightless(bound_to), method)
        try:
            return cls(*weightless(model))
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
            why = f"{type(model).__name__} cannot be copied ({one_line(e, 80)})"
            return cls(model, why=f"{why}: captures trace the model itself, only in its own dtype")

    @property
    def forward(self) -> Callable[..., Any]:
        """The function that a capture calls."""
        if not self.method:
            return hooked_forward(self.module)
        method: Callable[..., Any] = getattr(self.module, self.method)
        return method

    def in_dtype(self, dtype: torch.dtype | None, base: torch.dtype | None) -> ModelSource:
        """The source with its floating tensors in another dtype.

        A graph cannot be converted: both casts of an RMSNorm read float32, and only one of them
        follows the model. Traced again in the new dtype, the numbers are the original's.
        """
        if dtype is None or dtype == base:
            return self
        if self.mode is None:
            raise LoraFxError(
                f"this model could not be copied and was captured in {base}: it cannot be traced "
                f"in {dtype}",
                "convert the original model first, then capture it",
            )
        if dtype not in self.copies:
            fake = weightless(self.module, dtype, self.mode)
            self.copies[dtype] = ModelSource(*fake, self.method)
        return self.copies[dtype]


def hooked_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of a module, with the module's own hooks where it has some."""
    if not (model._forward_pre_hooks or model._forward_hooks):
        return model.forward
    positional = Signature(model.forward).positional

    def forward(*args: Any, **named: Any) -> Any:
        # hooks see positional arguments, as in an ordinary call
        next_names = takewhile(named.__contains__, positional[len(args) :])
        next_args = [named.pop(name) for name in next_names]
        return model._call_impl(*args, *next_args, **named)  # type: ignore[no-untyped-call]

    return forward


def base_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter that is not an adapter's."""
    for module in model.modules():
        if isinstance(module, AdapterTensors):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return None


def weightless(
    model: nn.Module, dtype: torch.dtype | None = None, mode: FakeTensorMode | None = None
) -> tuple[nn.Module, FakeTensorMode]:
    """A deep copy of the module whose tensors are fake, on the CPU where they were on meta.

    It has the code and none of the memory: with both graphs, 11 MiB for a model of 993 MiB. Every
    capture traces it, so the user's module is never switched to train, and its batch norms keep
    their statistics.

    Args:
        model: The module.
        dtype: Floating tensors take this dtype, as `.to(dtype)` would.
        mode: The mode of an earlier weightless copy, to copy such a copy.
    """
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    coded_forms = {
        id(parameter_of(model, n)): form for n, form in quantised_parameters.forms(model).items()
    }
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        like: torch.Tensor = tensor
        if id(tensor) in coded_forms:
            form = coded_forms[id(tensor)]
            like = torch.empty(form.shape, dtype=form.dtype, device="meta")
        fake_dtype = like.dtype
        if dtype is not None and like.is_floating_point():
            fake_dtype = dtype
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with mode:
            fake = torch.empty_strided(like.shape, like.stride(), dtype=fake_dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        memo[id(tensor)] = fake
    copied = copy.deepcopy(model, memo)
    if coded_forms:
        quantised_parameters.forget(copied)
    return copied, mode
