"""A file that has no name yet, and gets it with its data and copies when nothing has failed."""

from __future__ import annotations

import contextlib
import glob
import itertools
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import EXISTS, Beside, replacing
from lora_fx.onnx.place import Place
from lora_fx.onnx.save import EXTERNAL_OVER, save


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
