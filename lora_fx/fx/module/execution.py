"""The interface by which lora-fx runs a captured module; users do not need it.

These are no members of the module: there they would be attributes of the user's model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapter.invocation import planted
from lora_fx.conditions import Size
from lora_fx.dtypes import Array
from lora_fx.fx import tensors
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.example import sample_call
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.inputs import SIZES, Extents, Named
from lora_fx.patching import patched


class Execution:
    """A captured module as lora-fx uses it."""

    def __init__(self, module: CapturedModule) -> None:
        self._module = module

    @property
    def captured(self) -> Captured:
        """The capture behind the module."""
        return self._module._programs.captured

    @property
    def base_dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter, in which programs run."""
        return self._module._dtype

    @property
    def norm_stats(self) -> str:
        """The treatment of norm statistics in train mode: frozen or update."""
        return self._module._norm_stats

    @property
    def not_one(self) -> frozenset[Size]:
        """The input dimensions for which the captured graph is not valid at size 1."""
        sizes = set[Size]()
        for condition in self._module.conditions():
            ones = dict.fromkeys(condition.about, 1)
            if not condition.holds(ones):
                sizes |= ones.keys()
        return frozenset(sizes)

    def sample(self, size: Extents = SIZES[0], arrays: Any = None, seed: int = 0) -> dict[str, Any]:
        """Draw named arguments of one size, by the captured signature.

        Rows of an aLoRA's tokens are longer by its invocation, which stands in most of them.
        """
        captured = self.captured
        inputs = captured.bounded_inputs()
        device = tensors.device_of(self._module)
        ids, invocation = self._module._invoked
        if invocation and isinstance(size, tuple):
            size = (size[0], size[1] + len(invocation))
        drawn = sample_call(inputs, captured.named, size, seed, arrays, device)
        if invocation and ids not in (arrays or {}):
            tokens = planted(inputs.sample(size, seed)[ids], invocation, seed)
            drawn = sample_call(
                inputs, captured.named, size, seed, {**(arrays or {}), ids: tokens}, device
            )
        return self.in_own_dtype(drawn)

    def invoked(self, feeds: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        """Return inputs by ONNX name with the adapter's invocation in most of the rows."""
        ids, invocation = self._module._invoked
        name = onnx_name(ids)
        if not invocation or name not in feeds:
            return dict(feeds)
        return {**feeds, name: planted(feeds[name], invocation, seed)}

    def in_own_dtype(self, named: Named | None = None) -> dict[str, Any]:
        """Return arguments (the example by default) in the dtype that the module now has."""
        captured = self.captured
        arguments = dict(captured.named if named is None else named)

        def in_dtype(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.base_dtype) if tensor.dtype == captured.base_dtype else tensor

        return dict(tree_map_only(torch.Tensor, in_dtype, arguments))

    def run(self, named: Named) -> object:
        """Run the module on named arguments and return its outputs."""
        return self.captured.signature.call(self._module, named)

    def prepare(self, named: Named) -> None:
        """Capture the program that runs these arguments in the present mode, if there is none."""
        bound = self.captured.signature.bind((), named)
        self._module._program(bound, tree_leaves(bound))

    def loss_alone(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which programs return only the model's own loss.

        What it gives beside a loss, its scores, need not be made whole then.
        """
        return patched(self._module, _loss_alone=True)

    def flat(self, named: Named) -> dict[str, Array]:
        """Run on copies of named arguments; return the output tensors as {name: array}."""
        # A model may write over what it gets, or count its calls in a buffer: both sides of a
        # comparison start alike.
        with torch.no_grad(), alike(self._module):
            return by_output(self.run(copied(named)))


def execution_of(module: CapturedModule) -> Execution:
    """Return the Execution of a module."""
    return Execution(module)
