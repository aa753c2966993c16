"""Writing ONNX files: one file, or external data beside it when the weights are large."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import EXISTS, replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.switch import reread

EXTERNAL_OVER = 256 << 20
"""With more bytes of weights than this they go to `NAME.onnx.data`; protobuf ends at 2 GiB."""

INLINE = 256
"""A tensor of fewer bytes stays in the file: sizes and axes, which the runtime wants to read."""


def weight_bytes(model: ir.Model) -> int:
    """How many bytes all initialisers have."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def is_external(path: Path) -> bool:
    """True when a file keeps tensors in another file."""
    values = ir.load(path).graph.initializers.values()
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in values)


def save(
    model: ir.Model,
    path: Path,
    *,
    external_over: int = EXTERNAL_OVER,
    data: str = "",
    beside: Collection[str] = (),
    delta: bool = False,
) -> list[Path]:
    """Write a model; returns the files that were made.

    A data file is called `data`, or `NAME.data` where that is empty. Initialisers named in
    `beside` go there however small they are, since a session can replace only what lies in it. With
    `delta`, tensors that lie in a data file of the same folder stay there.

    Tensors are written one after the other, so that those that are computed on demand are in
    memory one at a time.
    """
    data = data or path.name + ".data"
    if beside or delta:
        return _with_data(model, path, data, beside, delta)
    if weight_bytes(model) <= external_over:
        ir.external_data.load_to_model(model)  # else it would name the data of another file
        ir.save(model, path)
        return [path]
    ir.save(model, path, external_data=data, max_workers=1, max_in_flight_bytes=1 << 26)
    return [path, path.with_name(data)]


def _with_data(
    model: ir.Model, path: Path, data: str, beside: Collection[str], delta: bool
) -> list[Path]:
    for graph in () if delta else model.graphs():  # else they would name the data of another file
        for v in graph.initializers.values():
            held, body = v.const_value, graph is not model.graph
            if isinstance(held, ir.ExternalTensor) and (body or held.nbytes < INLINE):
                v.const_value = ir.tensor(held.numpy().copy(), name=held.name)
    # what a session replaces has to lie beside the file, however small it is
    kept = {
        v: held
        for v in model.graph.initializers.values()
        if (held := v.const_value) is not None
        and (held.nbytes >= INLINE or v.name in beside)
        and not (delta and isinstance(held, ir.ExternalTensor))
    }
    moved = ir.external_data.convert_tensors_to_external(
        list(kept.values()), path.parent, data, max_workers=1
    )
    try:
        for value, tensor in zip(kept, moved, strict=True):
            value.const_value = tensor
        ir.save(model, path)
    finally:
        for value, was in kept.items():
            value.const_value = was
    return [path, path.with_name(data)]


def save_beside(model: ir.Model, path: Path, other: Path) -> int:
    """Write a model that reads the tensors in the data file of another; returns the bytes left.

    A tensor that is stored transposed there is read so, with a Transpose where a reader needs one.

    Args:
        model: The model, edited in place. Its tensors that are not found lie in its own file.
        path: Where to write.
        other: A saved file of that folder.
    """
    graph = OnnxGraph(model)
    known = {_digest(t): t for _, t in _large(ir.load(other))}
    left = 0
    for value, held in _large(model):
        same = known.get(_digest(held))
        turned = known.get(_digest(held, turned=True)) if same is None else None
        if turned is not None:
            name, marked = str(value.name), dict(value.metadata_props)
            new = ir.val(name, const_value=turned, metadata_props=marked)
            del model.graph.initializers[name]
            model.graph.initializers[name] = new
            reread(graph, value, new, (1, 0))
        elif same is not None:
            value.const_value = same
        else:
            left += held.nbytes
    ir.save(model, path)
    return left


def _large(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The initialisers that lie in a data file, and their tensors."""
    stored = ((v, v.const_value) for v in model.graph.initializers.values())
    return [(v, t) for v, t in stored if t is not None and t.nbytes >= INLINE]


def _digest(tensor: ir.TensorProtocol, *, turned: bool = False) -> tuple[object, ...] | None:
    """What tells a tensor from others: its dtype, shape and bytes; of a matrix its transpose's."""
    array = tensor.numpy()
    if turned:
        if array.ndim != 2:
            return None
        array = array.T
    data = np.ascontiguousarray(array)
    return str(tensor.dtype), data.shape, hashlib.sha256(data.data).hexdigest()


class Place(Protocol):
    """Where a copy of a file goes, for a server."""

    def config(self, model: Path) -> object:
        """What is written of an .onnx file there; raises where it cannot go there."""

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Copy an .onnx file, its data and its adapters there, beside a main output."""


@dataclass
class Output:
    """A file that has no name yet.

    Attributes:
        target: The name that it gets.
        path: Where it is written.
        data: The name that its data gets, if it is saved with any.
        seen: What can be loaded before it has its name: `path`, but for a file that shares data.
        external: True when it was saved with data.
        places: Where copies go.
        adapters: The files of adapters that were written beside it.
        copies: The names of the copies' files.
        beside: What is written beside the file, and goes again where that gets no name.
    """

    target: Path
    path: Path
    data: Path
    seen: Path
    external: bool = False
    places: Sequence[Place] = ()
    adapters: list[Path] = field(default_factory=list)
    copies: list[Path] = field(default_factory=list)
    beside: Beside = field(default_factory=Beside)

    def save(
        self,
        model: ir.Model,
        external_over: int = EXTERNAL_OVER,
        beside: Collection[str] = (),
        *,
        delta: bool = False,
    ) -> None:
        """Write a model, in the place of what was written before; see save."""
        files = save(
            model,
            self.path,
            external_over=external_over,
            data=self.data.name,
            beside=beside,
            delta=delta,
        )
        self.external = len(files) > 1
        if delta:
            self._show()
        for place in self.places:
            place.config(self.path)  # refused before any proof

    def _show(self) -> None:
        """Put a copy of the model next to its target, where it can read the data that it shares.

        Links to that data would be refused by onnx_ir and by the onnx package.
        """
        proto = onnx.load(self.path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == self.data.name:
                    entry.value = f"{self.path.parent.name}/{self.data.name}"
        if self.seen == self.path:
            stem = f".{self.target.name}.lora_fx_"
            for left in self.target.parent.glob(f"{glob.escape(stem)}{'[0-9a-f]' * 8}.onnx"):
                left.unlink()  # by a killed run: this one has the lock of the target
            self.seen = self.target.with_name(f"{stem}{secrets.token_hex(4)}.onnx")
        self.seen.write_bytes(proto.SerializeToString())

    @property
    def files(self) -> list[Path]:
        """The names of what was written."""
        return [self.target, *([self.data] if self.external else []), *self.adapters, *self.copies]


@contextlib.contextmanager
def output(
    target: Path,
    *,
    force: bool = False,
    places: Sequence[Place] = (),
    owner: Path | None = None,
) -> Iterator[Output]:
    """A context with a file that gets its name, after its data, when nothing has raised.

    An existing data file is never replaced: it may be an input's, and a run that is killed between
    the two names would leave a model with the data of another. The new one is then `NAME.1.data`,
    NAME being that of `owner` where the data is of several files.
    Copies are there before the file has its name, and go again if that fails.

    Raises:
        LoraFxError: The file exists and `force` is not given; its data exists and it is not.
    """
    beside = Beside()
    with replacing(target, force=force, parts=beside) as temporary:
        owner = owner or target
        names = (f"{owner.name}.{i}.data" for i in itertools.count(1))
        paths = map(owner.with_name, itertools.chain([f"{owner.name}.data"], names))
        data = next(path for path in paths if not (path.exists() or path.is_symlink()))
        made = Output(target, temporary, data, temporary, places=places, beside=beside)
        try:
            yield made
        finally:
            if made.seen != made.path:
                made.seen.unlink(missing_ok=True)
        if made.external and made.data.name != f"{owner.name}.data" and not force:
            raise LoraFxError(f"{owner}.data exists already", EXISTS)
        for other in places:
            made.copies += other.place(temporary, beside, made.adapters)
        if made.external:
            with replacing(made.data, beside=beside) as place:
                temporary.with_name(made.data.name).replace(place)
