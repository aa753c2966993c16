"""The maths of a branch or of W + s·B·A, recorded as a short list of primitives.

It is recorded when an adapter is attached, over the values that a call brings: a Recorder is eager
torch as an Emitter. Running it costs one loop and no layout work, and torch.compile traces through
that loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.errors import MistakeError
from lora_fx.fx.dotted_names import owner
from lora_fx.fx.graph.nodes import reached
from lora_fx.fx.tensors import padding
from lora_fx.ir.convolution import Conv, ConvTranspose
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Grouped

INPUTS = 3
"""The number of inputs of a call: the activation or stored weight, the result, a stack's op."""


CONVS = (F.conv1d, F.conv2d, F.conv3d)


TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


PRIMS: Mapping[str, Callable[..., torch.Tensor]] = {
    "matmul": torch.matmul,
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "detach": torch.Tensor.detach,
    "transpose": lambda x, perm: x.permute(perm),
    "reshape": lambda x, shape: x.reshape(shape),
    "repeat": lambda x, times: x.repeat_interleave(times, -1),
    "slice": lambda x, axis, start, stop: x.narrow(axis, start, stop - start),
    "pad": lambda x, before, after: F.pad(x, padding(before, after)),
    "einsum": lambda x, y, equation: torch.einsum(equation, x, y),
    "conv": lambda x, w, **attrs: CONVS[w.dim() - 3](x, w, None, **attrs),
    "conv_transpose": lambda x, w, **attrs: TRANSPOSED[w.dim() - 3](x, w, None, **attrs),
    "through": lambda op, x, w: op(x, w),
    "gather": lambda w, ids, padding_idx=None: F.embedding(ids, w, padding_idx),
    "dropout": lambda x, p: F.dropout(x, p, training=True),
    "cast": lambda x, dtype: x.to(getattr(torch, dtype)),
    "cast_like": lambda x, y: x.to(y.dtype),
}
"""The function that runs each primitive of lora_fx.ir.emitter.Ops."""


class Value(int):
    """A value of a recording: its index in the list of values."""


Step = tuple[str, tuple[int, ...], tuple[tuple[str, Any], ...]]
"""A primitive, the indices of its operands, and its attributes; hashable, to compare programs."""


@dataclass(frozen=True)
class Program:
    """Recorded primitives.

    Values are, in order: the INPUTS, the adapter's tensors by dotted name, constants, and the
    result of each step; the last one is the program's.
    """

    tensors: tuple[str, ...]
    constants: tuple[float, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Bound:
    """A program, ready to run: with the modules that hold its tensors."""

    places: tuple[tuple[nn.Module, str], ...]
    constants: tuple[float, ...]
    steps: tuple[tuple[str, tuple[int, ...], dict[str, Any], tuple[int, ...]], ...]

    def __call__(self, first: torch.Tensor, second: object = None, op: object = None) -> object:
        """Run the program on the values of one call."""
        tensors = [
            module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
            for module, leaf in self.places
        ]
        values: list[object] = [first, second, op, *tensors, *self.constants]
        for prim, operands, attrs, used_up in self.steps:
            values.append(PRIMS[prim](*[values[i] for i in operands], **attrs))
            for i in used_up:
                values[i] = None
        return values[-1]


def bound(program: Program, root: nn.Module) -> Bound:
    """Bind a program to the modules under `root` that hold its tensors."""
    places = tuple(owner(root, name) for name in program.tensors)
    first_result = INPUTS + len(program.tensors) + len(program.constants)
    last_step_of = {
        place: step for step, (_, operands, _) in enumerate(program.steps) for place in operands
    }
    steps = []
    for step, (prim, operands, attrs) in enumerate(program.steps):
        used_up = {i for i in operands if i >= first_result and last_step_of[i] == step}
        steps.append((prim, operands, dict(attrs), tuple(used_up)))
    return Bound(places, program.constants, tuple(steps))


@dataclass
class Recorder:
    """An Emitter whose values are indices into a recording.

    Args:
        padding: The padding_idx of the site's lookup, which `like` keeps.
        entries: The recording: the inputs, then tensors, constants and steps, in order.
    """

    padding: int | None = None
    entries: list[tuple[Any, ...]] = field(default_factory=lambda: [("input",)] * INPUTS)

    def _add(self, *entry: object) -> Value:
        self.entries.append(entry)
        return Value(len(self.entries) - 1)

    def op(self, prim: str, *xs: Any, **attrs: object) -> Value:
        """Record one primitive of the closed set; see lora_fx.ir.emitter.Ops."""
        operands = []
        for x in xs:
            operands.append(x if isinstance(x, Value) else self._add("constant", float(x)))
        hashable = []
        for name, attribute in sorted(attrs.items()):
            hashable.append((name, tuple(attribute) if isinstance(attribute, list) else attribute))
        return self._add("step", prim, tuple(operands), tuple(hashable))

    def like(self, site: Site, x: Value, w: Value) -> Value:
        """Record the site's op; a lookup keeps its padding row, which has no gradient."""
        if site.op == "embedding":
            return self.op("gather", w, x, padding_idx=self.padding)
        if isinstance(site.kind, Grouped):
            return self.op("through", Value(2), x, w)
        if isinstance(site.kind, (Einsum, Conv, ConvTranspose)):
            return site.kind.apply(self, site, x, w)
        return self.op(site.op, x, w)  # with operands of its own: no primitive, so no output form

    def parameter(self, name: str, value: Array, role: Role) -> Value:
        """Record a tensor of the adapter, which each call looks up by its name."""
        entry = ("tensor", name)
        if entry in self.entries:
            return Value(self.entries.index(entry))
        return self._add(*entry)

    def program(self, result: Value) -> Program:
        """Return the part of the recording that computes `result`.

        Raises:
            LoraFxError: A primitive that PRIMS lacks.
        """
        entries = self.entries

        def operands_of(place: int) -> tuple[int, ...]:
            kind, *content = entries[place]
            operands: tuple[int, ...] = content[1] if kind == "step" else ()
            return operands

        needed = {*range(INPUTS), *reached([int(result)], operands_of)}
        by_kind: dict[str, list[int]] = {"input": [], "tensor": [], "constant": [], "step": []}
        for place in sorted(needed):
            by_kind[entries[place][0]].append(place)
        values = itertools.chain.from_iterable(by_kind.values())
        value_of = {place: value for value, place in enumerate(values)}

        steps = []
        for place in by_kind["step"]:
            _, prim, operands, attrs = entries[place]
            if prim not in PRIMS:
                raise MistakeError(f"the eager emitter has no primitive {prim!r}")
            steps.append((prim, tuple(value_of[operand] for operand in operands), attrs))
        tensors = tuple(entries[place][1] for place in by_kind["tensor"])
        constants = tuple(entries[place][1] for place in by_kind["constant"])
        return Program(tensors, constants, tuple(steps))
