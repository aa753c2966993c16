"""The config of a model for Triton: what a config.pbtxt says, and what a session would have it say.

What the server refuses is refused here. Its rules, from its sources (core's ValidateIOShape, the
ONNX Runtime backend's ValidateInputs and CompareDimsSupported): no dimension of 0, at least one
(a scalar is [1]), outputs exactly as the session says, initialisers that are inputs as
`optional`, and those only without batching. With a batch size the first dimension is left out,
and what is a vector by row then is [1] with an empty reshape.

The server would complete a config without inputs and outputs (AutoCompleteConfig), but then it
also sets a batch size of its own wherever dimension 0 is free, and leaves adapters' inputs out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessages
from google.protobuf.text_encoding import CEscape

from lora_fx.dtypes import from_onnx
from lora_fx.errors import LoraFxError, one_line
from lora_fx.onnx.manifest import PROPERTY, Manifest, read_manifest
from lora_fx.onnx.place import MODEL
from lora_fx.onnx.session import RuntimeSession

if TYPE_CHECKING:
    import onnxruntime as ort


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
        """The port as errors show it."""
        return f"{self.kind} {list(self.dims)}" + " optional" * self.optional


@dataclass(frozen=True)
class Config:
    """What a config.pbtxt says of a model, or what a session would have it say.

    Attributes:
        name: The name of the model and of its folder.
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
        lines = [f"name: {_quoted(self.name)}", 'backend: "onnxruntime"']
        lines.append(f"max_batch_size: {self.max_batch}")
        for title, ports in (("input", self.inputs), ("output", self.outputs)):
            for name, port in ports.items():
                dims = port.dims[1:] if self.max_batch else port.dims
                lines += [f"{title} {{", f"  name: {_quoted(name)}", f"  data_type: {port.kind}"]
                lines.append(f"  dims: [ {', '.join(map(str, dims)) or '1'} ]")
                lines += ["  reshape: { shape: [ ] }"] * (not dims)
                lines += ["  optional: true"] * port.optional
                lines.append("}")
        lines += ["dynamic_batching { }"] * bool(self.max_batch)
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str, folder: str = "") -> Config:
        """The inverse of to_text; what else a config may say is left alone.

        Args:
            text: A config.pbtxt.
            where: The file, for errors.
            folder: The model's name where the config has none, as for the server.

        Raises:
            LoraFxError: No ModelConfig, or one for another backend or file.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of protobuf for a wrong escape; the server's fails
                plain = _LIST.sub(lambda found: found[1] or ": [", text)
                made = text_format.Parse(plain, _model_config()(), allow_unknown_field=True)
        except (text_format.ParseError, RecursionError, DeprecationWarning) as error:
            raise _no_config(where, one_line(error)) from error
        for key, known in OURS.items():
            if (found := getattr(made, key)) not in known:
                raise LoraFxError(
                    f"{where}: {key} is {found!r}; expected {known[0]!r}",
                    "choose another folder or name",
                )
        size = max(0, made.max_batch_size)
        sides: list[dict[str, Port]] = []
        for side in ("input", "output"):
            sides.append({})
            for p in getattr(made, side):
                if p.name in sides[-1]:
                    raise _no_config(where, f"{side} {p.name!r} is there twice")
                if p.data_type not in KINDS:
                    raise _no_config(where, f"the data_type {p.data_type} is unknown")
                dims = p.reshape.shape if p.HasField("reshape") else p.dims
                whole = (-1, *dims) if size else tuple(dims)
                sides[-1][p.name] = Port(KINDS[p.data_type], whole, p.optional)
        return cls(made.name or folder, sides[0], sides[1], size)

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


_ORDER = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "STRING", "BF16",
)  # fmt: skip
KINDS = {number: f"TYPE_{name}" for number, name in enumerate(_ORDER)}
"""Triton's numbers of dtypes."""

# What is looked at of Triton's ModelConfig: message → field → its type. The numbers do not matter
# to text, and protobuf's reader passes over whatever else a config says.
_MESSAGES: Mapping[str, Mapping[str, str]] = {
    "Shape": {"shape": "TYPE_INT64"},
    "Port": {
        "name": "TYPE_STRING", "data_type": "DataType", "dims": "TYPE_INT64", "reshape": "Shape",
        "optional": "TYPE_BOOL",
    },
    "ModelConfig": {
        **dict.fromkeys(("name", "backend", "platform", "default_model_filename"), "TYPE_STRING"),
        "max_batch_size": "TYPE_INT32", "input": "Port", "output": "Port",
    },
}  # fmt: skip
_LISTS = ("shape", "dims", "input", "output")
"""Fields of them that may be there several times."""
# `instance_group [ { … } ]`, as Triton's own examples have it: protobuf's reader passes over the
# list of an unknown field only after a colon. Strings and comments stay as they are.
_LIST = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*)|(?<=\w)\s*\[""", re.S)


@cache
def _model_config() -> type[Message]:
    file = FileDescriptorProto(name="model_config", package="lora_fx.triton", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in KINDS.items():
        kinds.value.add(name=name, number=number)
    for message, fields in _MESSAGES.items():
        added = file.message_type.add(name=message)
        for number, (name, of) in enumerate(fields.items(), 1):
            label = "LABEL_REPEATED" if name in _LISTS else "LABEL_OPTIONAL"
            kind = {"type" if of.startswith("TYPE_") else "type_name": of}
            added.field.add(name=name, number=number, label=label, **kind)
    made: type[Message] = GetMessages([file])["lora_fx.triton.ModelConfig"]
    return made


def _quoted(text: str) -> str:
    return f'"{CEscape(text, as_utf8=True)}"'


def _no_config(where: str, what: str) -> LoraFxError:
    return LoraFxError(f"{where}: no ModelConfig: {what}", "write it anew")


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
    if text is None or read_manifest(text, where).get("mode") != "switch":
        return set()
    return {n for s in Manifest.from_text(text, where).slots.values() for n in (s.a, s.b)}


def _port(value: ort.NodeArg, optional: bool) -> Port:
    dtype = from_onnx(value.type).replace("bfloat", "bf").replace("float", "fp")
    kind = f"TYPE_{dtype.upper()}"
    if kind not in KINDS.values():
        raise LoraFxError(
            f"{value.name!r} is {value.type}, which Triton does not carry", "leave --triton out"
        )
    dims = tuple(d if isinstance(d, int) else -1 for d in value.shape)
    if any(d < 1 and d != -1 for d in dims):
        raise LoraFxError(
            f"{value.name!r} is {list(dims)}; Triton takes no dimension of 0", "leave --triton out"
        )
    return Port(kind, dims or (1,), optional)
