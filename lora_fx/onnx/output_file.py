"""Output files that get their final name, with data and copies, only after all succeeded."""

from __future__ import annotations

import contextlib
import glob
import itertools
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import EXISTS, replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.cuda_obstacles import Obstacle, cuda_obstacles
from lora_fx.onnx.made_for import make_for, say_target
from lora_fx.onnx.place import Place
from lora_fx.onnx.save import EXTERNAL_OVER, save
from lora_fx.onnx.session import few_runs
from lora_fx.progress import stage


@dataclass
class Output:
    """A file that has no final name yet.

    Attributes:
        target: The name that it gets.
        path: Where it is written.
        data: The name that its data gets, if it is saved with any.
        loadable: The file that can be loaded before it has its name: `path`, or a copy beside the
            target where the file shares the data of another.
        made_for: The target that the file is made for; empty where it stays what it was.
        external: True when it was saved with data.
        places: Where copies go.
        adapters: The files of adapters that were written beside it.
        copies: The names of the copies' files.
        beside: What is written beside the file, and goes again where that gets no name.
        obstacles: The nodes of the saved model that are in CUDA's way.
    """

    target: Path
    path: Path
    data: Path
    loadable: Path
    made_for: str = ""
    external: bool = False
    places: Sequence[Place] = ()
    adapters: list[Path] = field(default_factory=list)
    copies: list[Path] = field(default_factory=list)
    beside: Beside = field(default_factory=Beside)
    obstacles: Sequence[Obstacle] = ()

    def save(
        self,
        model: ir.Model,
        external_over: int = EXTERNAL_OVER,
        beside: Collection[str] = (),
        *,
        delta: bool = False,
        has_forms: bool = False,
    ) -> None:
        """Write a model, replacing an earlier one; see save.

        It takes the forms of its target, unless it has those that were proven already.
        """
        if self.made_for and has_forms:
            say_target(model, self.made_for)
        elif self.made_for:
            make_for(model, self.made_for)
        with stage("writing the file"):
            files = save(
                model,
                self.path,
                external_over=external_over,
                data=self.data.name,
                beside=beside,
                delta=delta,
            )
        self.external = len(files) > 1
        self.obstacles = cuda_obstacles(model)
        if delta:
            self._show()
        for place in self.places:
            place.config(self.path)  # refused before any proof

    def _show(self) -> None:
        """Write a copy of the model next to its target, from where it can read the shared data.

        Links to that data would be refused by onnx_ir and by the onnx package.
        """
        proto = onnx.load(self.path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == self.data.name:
                    entry.value = f"{self.path.parent.name}/{self.data.name}"

        if self.loadable == self.path:
            stem = f".{self.target.name}.lora_fx_"
            of_killed_runs = f"{glob.escape(stem)}{'[0-9a-f]' * 8}.onnx"
            for copy in self.target.parent.glob(of_killed_runs):
                copy.unlink()  # no other run is at work: this one has the lock of the target
            self.loadable = self.target.with_name(f"{stem}{secrets.token_hex(4)}.onnx")
        self.loadable.write_bytes(proto.SerializeToString())

    @property
    def files(self) -> list[Path]:
        """The names of the files that were written."""
        data = [self.data] if self.external else []
        return [self.target, *data, *self.adapters, *self.copies]


@contextlib.contextmanager
def output(
    target: Path,
    *,
    made_for: str = "",
    force: bool = False,
    places: Sequence[Place] = (),
    owner: Path | None = None,
    last: Callable[[], None] | None = None,
) -> Iterator[Output]:
    """A block with a file that gets its final name, after its data, if the block does not raise.

    An existing data file is never replaced: it may be an input's, and a run that is killed between
    the two names would leave a model with the data of another. The new one is then `NAME.1.data`,
    NAME being that of `owner` where the data is of several files.
    Copies are there before the file has its name, and go again if that fails; before them, `last`
    is called.

    Raises:
        LoraFxError: The file exists and `force` is not given; its data exists and it is not.
    """
    beside = Beside()
    owner = owner or target
    with replacing(target, force=force, parts=beside) as temporary:
        data = _free_data_path(owner)
        file = Output(target, temporary, data, temporary, made_for, places=places, beside=beside)
        try:
            with few_runs():
                yield file
        finally:
            if file.loadable != file.path:
                file.loadable.unlink(missing_ok=True)

        if file.external and file.data.name != f"{owner.name}.data" and not force:
            raise LoraFxError(f"{owner}.data already exists", EXISTS)
        if last is not None:
            last()
        with few_runs():
            for place in places:
                file.copies += place.place(temporary, beside, file.adapters)
        if file.external:
            with replacing(file.data, beside=beside) as temporary_data:
                temporary.with_name(file.data.name).replace(temporary_data)


def _free_data_path(owner: Path) -> Path:
    """Return the first of NAME.data, NAME.1.data, NAME.2.data … that does not exist."""
    path = owner.with_name(f"{owner.name}.data")
    numbers = itertools.count(1)
    while path.exists() or path.is_symlink():
        path = owner.with_name(f"{owner.name}.{next(numbers)}.data")
    return path
