"""The config of a model for Triton: what a config.pbtxt says, and what a session would have it say.

What the server refuses is refused here. Its rules, from its sources (core's ValidateIOShape, the
ONNX Runtime backend's ValidateInputs and CompareDimsSupported): no dimension of 0, at least one (a
scalar is [1]), outputs exactly as the session says, initialisers that are inputs as `optional`, and
those only without batching. With a batch size the first dimension is left out, and what is a
vector by row then is [1] with an empty reshape.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.manifest import PROPERTY, Manifest
from lora_fx.onnx.pbtxt import KINDS, Reader, quoted
from lora_fx.onnx.session import RuntimeSession

MODEL = "model.onnx"
OURS = {
    "backend": ("onnxruntime", ""),
    "platform": ("onnxruntime_onnx", ""),
    "default_model_filename": (MODEL, ""),
}


@dataclass(frozen=True)
class Port:
    """An input or output: `dims` as the model sees them, the batch included, -1 where dynamic."""

    kind: str
    dims: tuple[int, ...]
    optional: bool = False

    def __str__(self) -> str:
        """As errors show it."""
        return f"{self.kind} {list(self.dims)}" + " optional" * self.optional


@dataclass(frozen=True)
class Config:
    """What a config.pbtxt says of a model, or what a session would have it say.

    Attributes:
        name: Of the model, and of its folder.
        inputs: By name.
        outputs: By name.
        max_batch: 0: dims are whole. Else the server leaves out the first dimension, and may put
            requests together.
    """

    name: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    max_batch: int = 0

    def to_text(self) -> str:
        """The config.pbtxt."""
        lines = [f"name: {quoted(self.name)}", 'backend: "onnxruntime"']
        lines.append(f"max_batch_size: {self.max_batch}")
        for title, ports in (("input", self.inputs), ("output", self.outputs)):
            for name, port in ports.items():
                dims = port.dims[1:] if self.max_batch else port.dims
                lines += [f"{title} {{", f"  name: {quoted(name)}", f"  data_type: {port.kind}"]
                lines.append(f"  dims: [ {', '.join(map(str, dims)) or '1'} ]")
                lines += ["  reshape: { shape: [ ] }"] * (not dims)
                lines += ["  optional: true"] * port.optional
                lines.append("}")
        lines += ["dynamic_batching { }"] * bool(self.max_batch)
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> Config:
        """The inverse of to_text; what else a config may say is left alone.

        Raises:
            LoraFxError: No ModelConfig, or one for another backend or file.
        """
        reader = Reader(text, where)
        try:
            made = reader.message()
        except RecursionError as error:
            raise reader.error("messages nested without end") from error
        for key, known in OURS.items():
            found = reader.one(made, key, "")
            if found not in known:
                raise LoraFxError(
                    f"{where}: {key} is {found!r}; expected {known[0]!r}",
                    "choose another folder or name",
                )
        size = max(0, *reader.numbers(made, "max_batch_size"), 0)
        sides: list[dict[str, Port]] = []
        for side in ("input", "output"):
            sides.append({})
            for p in made.get(side, []):
                name, port = _read_port(reader, p, size)
                if name in sides[-1]:
                    raise reader.error(f"{side} {name!r} is there twice")
                sides[-1][name] = port
        return cls(reader.one(made, "name", ""), sides[0], sides[1], size)

    def difference(self, model: Config) -> str:
        """What this config and a model's own disagree on, the first by name; else empty."""
        for what in ("input", "output"):
            here, there = getattr(self, f"{what}s"), getattr(model, f"{what}s")
            for name in sorted({*here, *there}):
                if here.get(name) != there.get(name):
                    one, two = here.get(name, "missing"), there.get(name, "missing")
                    return f"{what} {name!r} is {one}; the model's is {two}"
        for key in ("name", "max_batch"):
            if getattr(self, key) != getattr(model, key):
                return f"{key} is {getattr(self, key)!r}; expected {getattr(model, key)!r}"
        return ""


def _read_port(reader: Reader, port: Any, max_batch: int) -> tuple[str, Port]:
    if not isinstance(port, dict):
        raise reader.error(f"{port!r} is no input or output")
    none: dict[str, Any] = {}
    shape = reader.one(port, "reshape", none)
    dims = reader.numbers(shape, "shape") if "reshape" in port else reader.numbers(port, "dims")
    kind = reader.one(port, "data_type", "TYPE_INVALID")
    kind = KINDS.get(int(kind), kind) if kind.isdigit() else kind
    if kind not in KINDS.values():
        raise reader.error(f"the data_type {kind!r} is unknown")
    optional = reader.one(port, "optional", "false") in ("true", "True", "t", "1")
    return reader.one(port, "name", ""), Port(kind, (-1, *dims) if max_batch else dims, optional)


def config_of(session: RuntimeSession, name: str, max_batch: int = 0) -> Config:
    """The config of a loaded model.

    The tensors of adapters in a switchable file are optional inputs. Other initialisers that
    could be given as inputs are not listed: they keep their values.

    Raises:
        LoraFxError: A tensor that the server cannot carry, or batching that the model has not.
    """
    inner = session.session
    meta = inner.get_modelmeta().custom_metadata_map.get(PROPERTY)
    slots = _slots(meta, name)
    free = [v for v in inner.get_overridable_initializers() if v.name in slots]
    inputs = {v.name: _port(v, False) for v in inner.get_inputs()}
    inputs |= {v.name: _port(v, True) for v in free}
    outputs = {v.name: _port(v, False) for v in inner.get_outputs()}
    values = [*inner.get_inputs(), *free, *inner.get_outputs()]
    first = {v.shape[0] if v.shape else None for v in values}
    # an adapter's A begins with a number: optional inputs are refused here too, as the server does
    if max_batch and (len(first) > 1 or not isinstance(next(iter(first)), str)):
        found = ", ".join(f"{v.name} {v.shape}" for v in values)
        raise LoraFxError(
            f"{name}: a batch size needs one dynamic dimension 0 that every input and output has, "
            f"and no adapters as inputs; found {found}",
            "leave the batch size out, or export with a dynamic batch",
        )
    return Config(name, inputs, outputs, max_batch)


def _slots(text: str | None, where: str) -> set[str]:
    if text is None or json.loads(text).get("mode") != "switch":
        return set()
    return {n for s in Manifest.from_text(text, where).slots.values() for n in (s.a, s.b)}


_NAMES = {"float": "FP32", "double": "FP64", "float16": "FP16", "bfloat16": "BF16"}


def _port(value: Any, optional: bool) -> Port:
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    kind = "TYPE_" + _NAMES.get(dtype, dtype.upper())
    if kind not in KINDS.values():
        raise LoraFxError(f"{value.name!r} is {value.type}, which Triton does not carry")
    dims = tuple(d if isinstance(d, int) else -1 for d in value.shape)
    if any(d < 1 and d != -1 for d in dims):
        raise LoraFxError(f"{value.name!r} is {list(dims)}; Triton takes no dimension of 0")
    return Port(kind, dims or (1,), optional)
