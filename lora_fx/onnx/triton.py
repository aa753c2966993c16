"""Model repositories for NVIDIA Triton's ONNX Runtime backend, which KServe runs too.

    DIR/NAME/config.pbtxt      names, dtypes and dimensions
    DIR/NAME/1/model.onnx      and its data under its own name, so that the reference stays true

A model that is there gets the next version; its config stays as it is and has to fit. A folder
gets its name when the copy was loaded and agrees with the config that was written.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessages
from google.protobuf.text_encoding import CEscape

from lora_fx.dtypes import from_onnx
from lora_fx.errors import LoraFxError, explained, one_line, retold
from lora_fx.files.atomic import replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.load import data_names
from lora_fx.onnx.manifest import PROPERTY, Manifest, read_manifest
from lora_fx.onnx.session import RuntimeSession, open_session

if TYPE_CHECKING:
    import onnxruntime as ort

CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class Repository:
    """A place for one model: the next version of DIR/NAME.

    Attributes:
        folder: DIR.
        name: NAME.
        max_batch: None: 0, or what the config that is there says.
    """

    folder: Path
    name: str
    max_batch: int | None = None

    @property
    def home(self) -> Path:
        """DIR/NAME."""
        return self.folder / self.name

    def existing(self) -> Config | None:
        """The config that is there, before any work is done.

        Raises:
            LoraFxError: What is there is no model repository of the ONNX Runtime backend.
        """
        if (self.max_batch or 0) < 0:
            raise LoraFxError(f"a batch size of {self.max_batch}", "0 or more")
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise LoraFxError(f"{self.name!r} is no name of a folder", "name=…")
        for path in (self.folder, self.home):
            if (path.exists() or path.is_symlink()) and not path.is_dir():
                raise LoraFxError(f"{path} exists and is no folder", "choose another folder")
        if not self.folder.parent.is_dir():
            raise LoraFxError(f"the folder {self.folder.parent} does not exist", "create it first")
        return _read(self.home) if self.home.exists() else None

    def config(self, model: Path) -> Config:
        """The config of an .onnx file here.

        Raises:
            LoraFxError: It does not fit the one that is there, named by what differs.
        """
        there = self.existing()
        size = there.max_batch if there and self.max_batch is None else self.max_batch or 0
        made = config_of(open_session(model, "cpu"), self.name, size)
        if there and (found := there.difference(made)):
            raise LoraFxError(
                f"{self.home / CONFIG} is for another model: {found}",
                "versions of one model have the same inputs and outputs: choose another name",
            )
        return made

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Copy an .onnx file and its data in as the next version, beside a main output.

        The server reads no adapters, and they are not copied.

        Raises:
            LoraFxError: It does not fit what is there; nothing is written.
        """
        config = self.config(model)
        first = not self.home.exists()
        number = "1" if first else str(max([0, *_versions(self.home)]) + 1)
        made = self.home if first else self.home / number
        if not self.folder.exists():
            beside.on_error(partial(_remove_empty, self.folder))
            with explained(self.folder):
                self.folder.mkdir()
        with replacing(made, listed=False, beside=beside) as new:
            version = new / number if first else new
            version.mkdir(parents=True)
            if first:
                (new / CONFIG).write_text(config.to_text(), encoding="utf-8")
            copied = copy_model(model, version)
            _compare(_read(new if first else self.home), version / MODEL, self.name)
        return [self.home / CONFIG] * first + [self.home / number / n for n in copied]


def copy_model(model: Path, folder: Path) -> list[str]:
    """Copy an .onnx file, as MODEL, and its data into a folder; returns their names.

    Raises:
        LoraFxError: Its data has the name of something that is there.
    """
    data = data_names(model)
    shutil.copyfile(model, folder / MODEL)
    for name in data:
        if (folder / name).exists():
            raise LoraFxError(f"{model}: its data is called {name!r}", "rename it")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.parent / name, folder / name)
    return [MODEL, *data]


def repository_of(
    folder: str | PathLike[str] | None, model: str | PathLike[str], max_batch: int | None
) -> tuple[Repository, ...]:
    """Where a copy of `model` goes, if anywhere, looked at before any work is done.

    Raises:
        LoraFxError: No place for it, or a batch size without a folder.
    """
    if folder is None:
        if max_batch is not None:
            raise LoraFxError("a batch size is of a repository", "--triton DIR, or leave it out")
        return ()
    made = Repository(Path(folder), Path(model).stem, max_batch)
    made.existing()
    return (made,)


def write_repository(
    model: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    name: str = "",
    max_batch: int | None = None,
) -> list[Path]:
    """Copy an .onnx file into a model repository; returns the files that were made.

    Args:
        model: The .onnx file; its data is found.
        folder: The repository; made where it is not there.
        name: The model's name, instead of the file's. If it is there, the file is its next version.
        max_batch: Above 0: the server may put requests together, up to so many rows.

    Raises:
        LoraFxError: The server could not load it, or it has other inputs or outputs than the
            versions that are there. Nothing is written.
    """
    source = Path(model)
    with Beside() as beside:
        return Repository(Path(folder), name or source.stem, max_batch).place(source, beside)


def check_repository(folder: str | PathLike[str]) -> dict[str, list[int]]:
    """{model: its versions} of a repository, every version loaded and compared with its config.

    Raises:
        LoraFxError: A config and a model that disagree, named by what differs; no model at all.
    """
    found: dict[str, list[int]] = {}
    if not Path(folder).is_dir():
        raise LoraFxError(f"{folder}: no such folder", "a repository is DIR/NAME/1/model.onnx")
    for home in sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != "."):
        config = _read(home)
        found[home.name] = sorted(_versions(home))
        for version in found[home.name]:
            _compare(config, home / str(version) / MODEL, home.name)
    if not any(found.values()):
        raise LoraFxError(f"{folder}: no model in it", "a repository is DIR/NAME/1/model.onnx")
    return found


def _compare(config: Config, model: Path, name: str) -> None:
    session = open_session(model, "cpu")
    if found := config.difference(config_of(session, name, config.max_batch)):
        raise LoraFxError(f"{model}: its {CONFIG} is not true: {found}", "write it anew")


def _read(home: Path) -> Config:
    path = home / CONFIG
    unread = (OSError, UnicodeDecodeError)
    with retold(f"{path}: cannot be read", "is the folder a model's?", unread):
        text = path.read_text(encoding="utf-8")
    return Config.from_text(text, str(path), home.name)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another run may have put a model there
        folder.rmdir()


def _versions(home: Path) -> Iterator[int]:
    """Numbers of the version folders; the server reads as many digits as there are, `2b` as 2."""
    for path in home.iterdir():
        if path.is_dir() and (number := re.match(r"\d+", path.name)):
            yield int(number[0])


# The config of a model for Triton: what a config.pbtxt says, and what a session would have it say.
#
# What the server refuses is refused here. Its rules, from its sources (core's ValidateIOShape, the
# ONNX Runtime backend's ValidateInputs and CompareDimsSupported): no dimension of 0, at least one
# (a scalar is [1]), outputs exactly as the session says, initialisers that are inputs as
# `optional`, and those only without batching. With a batch size the first dimension is left out,
# and what is a vector by row then is [1] with an empty reshape.
#
# The server would complete a config without inputs and outputs (AutoCompleteConfig), but then it
# also sets a batch size of its own wherever dimension 0 is free, and leaves adapters' inputs out.


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
