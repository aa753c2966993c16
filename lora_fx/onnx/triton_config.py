"""The config of a model for Triton, from a config.pbtxt or from a loaded model.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

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
    """An input or output: `dims` include the batch, and are -1 if dynamic."""

    kind: str
    dims: tuple[int, ...]
    optional: bool = False

    def __str__(self) -> str:
        """The port as errors show it."""
        text = f"{self.kind} {list(self.dims)}"
        if self.optional:
            text += " optional"
        return text


@dataclass(frozen=True)
class Config:
    """The inputs and outputs of a model, from a config.pbtxt or from the model.

    Attributes:
        name: The name of the model and of its folder.
        inputs: By name.
        outputs: By name.
        max_batch: With 0, the dimensions in the file are those of the model. Above that the file
            leaves out the first one, and the server may put requests together.
    """

    name: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    max_batch: int = 0

    def to_text(self) -> str:
        """Return the config.pbtxt."""
        lines = [
            f"name: {_quoted(self.name)}",
            'backend: "onnxruntime"',
            f"max_batch_size: {self.max_batch}",
        ]
        for name, port in self.inputs.items():
            lines += self._port_lines("input", name, port)
        for name, port in self.outputs.items():
            lines += self._port_lines("output", name, port)
        if self.max_batch:
            lines.append("dynamic_batching { }")
        return "\n".join(lines) + "\n"

    def _port_lines(self, side: str, name: str, port: Port) -> list[str]:
        """Return an input or output as lines of the config.pbtxt."""
        dims = port.dims[1:] if self.max_batch else port.dims
        shown = ", ".join(map(str, dims)) or "1"
        lines = [
            f"{side} {{",
            f"  name: {_quoted(name)}",
            f"  data_type: {port.kind}",
            f"  dims: [ {shown} ]",
        ]
        if not dims:
            lines.append("  reshape: { shape: [ ] }")
        if port.optional:
            lines.append("  optional: true")
        lines.append("}")
        return lines

    @classmethod
    def from_text(cls, text: str, where: str, folder: str = "") -> Config:
        """Parse a config.pbtxt, the inverse of to_text; ignore other fields.

        Args:
            text: A config.pbtxt.
            where: The file, for errors.
            folder: The model's name where the config has none, as for the server.

        Raises:
            LoraFxError: No ModelConfig, or one for another backend or file.
        """
        message = _parsed(text, where)
        for key, values in OURS.items():
            value = getattr(message, key)
            if value not in values:
                raise LoraFxError(
                    f"{where}: {key} is {value!r}; expected {values[0]!r}",
                    "choose another folder or name",
                )
        max_batch = max(0, message.max_batch_size)
        batch = (-1,) if max_batch else ()
        inputs = _ports(message.input, "input", batch, where)
        outputs = _ports(message.output, "output", batch, where)
        return cls(message.name or folder, inputs, outputs, max_batch)

    def difference(self, model: Config) -> str:
        """Return the first difference between this config and a model's, by name; else empty."""
        sides = {
            "input": (self.inputs, model.inputs),
            "output": (self.outputs, model.outputs),
        }
        for side, (ports, model_ports) in sides.items():
            for name in sorted({*ports, *model_ports}):
                port = ports.get(name, "missing")
                model_port = model_ports.get(name, "missing")
                if port != model_port:
                    return f"{side} {name!r} is {port}; the model's is {model_port}"
        for key in ("name", "max_batch"):
            if getattr(self, key) != getattr(model, key):
                return f"{key} is {getattr(self, key)!r}; expected {getattr(model, key)!r}"
        return ""


def _parsed(text: str, where: str) -> Any:
    """Parse a config.pbtxt to a message of `_model_config`."""
    try:
        with_colons = _LIST.sub(lambda match: match[1] or ": [", text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of protobuf for a wrong escape; the server's fails
            return text_format.Parse(with_colons, _model_config()(), allow_unknown_field=True)
    except (text_format.ParseError, RecursionError, DeprecationWarning) as error:
        raise _no_config(where, one_line(error)) from error


def _ports(
    messages: Iterable[Any], side: str, batch: tuple[int, ...], where: str
) -> dict[str, Port]:
    """Return the inputs or outputs of a config by name.

    Args:
        messages: The messages of one side.
        side: input or output, for errors.
        batch: The dimensions that the config leaves out.
        where: The file, for errors.
    """
    ports: dict[str, Port] = {}
    for message in messages:
        if message.name in ports:
            raise _no_config(where, f"{side} {message.name!r} appears twice")
        if message.data_type not in KINDS:
            raise _no_config(where, f"the data_type {message.data_type} is unknown")
        dims = message.reshape.shape if message.HasField("reshape") else message.dims
        kind = KINDS[message.data_type]
        ports[message.name] = Port(kind, (*batch, *dims), message.optional)
    return ports


_ORDER = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "STRING", "BF16",
)  # fmt: skip
KINDS = {number: f"TYPE_{name}" for number, name in enumerate(_ORDER)}
"""Triton's dtype numbers → dtype names."""

# The fields of Triton's ModelConfig that are read here: message → field → type. Their numbers do
# not matter to text, and protobuf's reader passes over all other fields of a config.
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
"""The fields that can be repeated."""
# `instance_group [ { … } ]`, as Triton's own examples have it: protobuf's reader passes over the
# list of an unknown field only after a colon. Strings and comments stay as they are.
_LIST = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*)|(?<=\w)\s*\[""", re.S)


@cache
def _model_config() -> type[Message]:
    """Return the protobuf class of a ModelConfig, built from `_MESSAGES`."""
    file = FileDescriptorProto(name="model_config", package="lora_fx.triton", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in KINDS.items():
        kinds.value.add(name=name, number=number)
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for number, (name, field_type) in enumerate(fields.items(), 1):
            label = "LABEL_REPEATED" if name in _LISTS else "LABEL_OPTIONAL"
            kind = {"type" if field_type.startswith("TYPE_") else "type_name": field_type}
            message.field.add(name=name, number=number, label=label, **kind)
    model_config: type[Message] = GetMessages([file])["lora_fx.triton.ModelConfig"]
    return model_config


def _quoted(text: str) -> str:
    return f'"{CEscape(text, as_utf8=True)}"'


def _no_config(where: str, what: str) -> LoraFxError:
    return LoraFxError(f"{where}: not a ModelConfig: {what}", "write it again")


def config_of(session: RuntimeSession, name: str, max_batch: int = 0) -> Config:
    """Return the config of a loaded model.

    The tensors of adapters in a switchable file are optional inputs. Other initialisers that
    could be given as inputs are not listed: they keep their values.

    Raises:
        LoraFxError: A tensor that the server cannot carry, or batching that the model has not.
    """
    inner = session.session
    adapter_tensors = _adapter_tensors(session.metadata.get(PROPERTY), name)
    optional = [
        value for value in inner.get_overridable_initializers() if value.name in adapter_tensors
    ]
    values = [*inner.get_inputs(), *optional, *inner.get_outputs()]

    inputs = {value.name: _port(value, False) for value in inner.get_inputs()}
    for value in optional:
        inputs[value.name] = _port(value, True)
    outputs = {value.name: _port(value, False) for value in inner.get_outputs()}

    # an adapter's A begins with a number: optional inputs are refused here too, as the server does
    if max_batch and not _have_one_dynamic_batch(values):
        shown = ", ".join(f"{value.name} {value.shape}" for value in values)
        raise LoraFxError(
            f"{name}: a batch size needs one dynamic dimension 0 that all inputs and outputs "
            f"have, and no adapters as inputs; found {shown}",
            "leave the batch size out, or export with a dynamic batch",
        )
    return Config(name, inputs, outputs, max_batch)


def _adapter_tensors(text: str | None, where: str) -> set[str]:
    """Return the names of adapters' tensors in a file of mode switch, from its manifest."""
    if text is None or read_manifest(text, where).get("mode") != "switch":
        return set()
    return set(Manifest.from_text(text, where).names())


def _have_one_dynamic_batch(values: Iterable[ort.NodeArg]) -> bool:
    """Whether all values have the same symbol as the size of dimension 0."""
    first_dims = {value.shape[0] if value.shape else None for value in values}
    return len(first_dims) == 1 and isinstance(first_dims.pop(), str)


def _port(value: ort.NodeArg, optional: bool) -> Port:
    """Return an input or output of a session in the server's form."""
    dtype = from_onnx(value.type).replace("bfloat", "bf").replace("float", "fp")
    kind = f"TYPE_{dtype.upper()}"
    if kind not in KINDS.values():
        raise LoraFxError(
            f"{value.name!r} is {value.type}, which Triton cannot pass", "leave --triton out"
        )
    dims = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    if any(size < 1 and size != -1 for size in dims):
        raise LoraFxError(
            f"{value.name!r} is {list(dims)}; Triton takes no dimension of 0", "leave --triton out"
        )
    return Port(kind, dims or (1,), optional)
