"""Model repositories for NVIDIA Triton's ONNX Runtime backend, which KServe runs too.

    DIR/NAME/config.pbtxt      names, dtypes and dimensions
    DIR/NAME/1/model.onnx      and its data under its own name, so that the reference stays true

A model that is there gets the next version; its config stays as it is and has to fit. A folder
gets its name when the copy was loaded and agrees with the config that was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

from lora_fx.errors import LoraFxError, explained, retold
from lora_fx.files.atomic import replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.onnx.place import MODEL, copy_model
from lora_fx.onnx.session import open_session
from lora_fx.onnx.triton_config import Config, config_of

CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class Repository:
    """A place for one model: the next version of DIR/NAME.

    Attributes:
        folder: DIR.
        name: NAME.
        max_batch: The largest batch; None means that of the config that is there, and else 0.
    """

    folder: Path
    name: str
    max_batch: int | None = None

    @property
    def home(self) -> Path:
        """DIR/NAME."""
        return self.folder / self.name

    def existing(self) -> Config | None:
        """The config of the versions that are there, if there are any; it costs no work.

        Raises:
            LoraFxError: The folders are no model repository of the ONNX Runtime backend.
        """
        if (self.max_batch or 0) < 0:
            raise LoraFxError(f"a batch size of {self.max_batch}", "0 or more")
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise LoraFxError(f"{self.name!r} cannot be the name of a folder", "name=…")
        for path in (self.folder, self.home):
            if (path.exists() or path.is_symlink()) and not path.is_dir():
                raise LoraFxError(f"{path} exists and is not a folder", "choose another folder")
        if not self.folder.parent.is_dir():
            raise LoraFxError(f"the folder {self.folder.parent} does not exist", "create it first")
        return _read(self.home) if self.home.exists() else None

    def config(self, model: Path) -> Config:
        """The config of an .onnx file here.

        Raises:
            LoraFxError: It does not fit the one that is there, named by what differs.
        """
        existing = self.existing()
        max_batch = self.max_batch or 0
        if existing and self.max_batch is None:
            max_batch = existing.max_batch

        config = config_of(open_session(model, "cpu"), self.name, max_batch)
        difference = existing.difference(config) if existing else ""
        if difference:
            raise LoraFxError(
                f"{self.home / CONFIG} is for another model: {difference}",
                "choose another name: all versions of one model have the same inputs and outputs",
            )
        return config

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Copy an .onnx file and its data as the next version, next to a main output.

        The server reads no adapters, and they are not copied.

        Raises:
            LoraFxError: It does not fit what is there; nothing is written.
        """
        config = self.config(model)
        if not self.folder.exists():
            beside.on_error(partial(_remove_empty, self.folder))
            with explained(self.folder):
                self.folder.mkdir()
        if self.home.exists():
            return self._place_next_version(model, beside)

        with replacing(self.home, listed=False, beside=beside) as temporary:
            version = temporary / "1"
            version.mkdir(parents=True)
            (temporary / CONFIG).write_text(config.to_text(), encoding="utf-8")
            names = copy_model(model, version)
            _compare(_read(temporary), version / MODEL, self.name)
        return [self.home / CONFIG, *(self.home / "1" / name for name in names)]

    def _place_next_version(self, model: Path, beside: Beside) -> list[Path]:
        """Copy an .onnx file into the folder of the versions, under the next number."""
        number = max([0, *_versions(self.home)]) + 1
        folder = self.home / str(number)
        with replacing(folder, listed=False, beside=beside) as version:
            version.mkdir(parents=True)
            names = copy_model(model, version)
            _compare(_read(self.home), version / MODEL, self.name)
        return [folder / name for name in names]


def repository_of(
    folder: str | PathLike[str] | None, model: str | PathLike[str], max_batch: int | None
) -> tuple[Repository, ...]:
    """The repository for a copy of `model`, if there is one, checked before any work is done.

    Raises:
        LoraFxError: No place for it, or a batch size without a folder.
    """
    if folder is None:
        if max_batch is not None:
            raise LoraFxError(
                "a batch size is for a Triton repository", "pass --triton DIR too, or leave it out"
            )
        return ()
    repository = Repository(Path(folder), Path(model).stem, max_batch)
    repository.existing()
    return (repository,)


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
    if not Path(folder).is_dir():
        raise LoraFxError(f"{folder}: no such folder", "give a repository: DIR/NAME/1/model.onnx")

    versions: dict[str, list[int]] = {}
    for home in sorted(Path(folder).iterdir()):
        if not home.is_dir() or home.name.startswith("."):
            continue
        config = _read(home)
        versions[home.name] = sorted(_versions(home))
        for version in versions[home.name]:
            _compare(config, home / str(version) / MODEL, home.name)

    if not any(versions.values()):
        raise LoraFxError(
            f"{folder}: it holds no model", "give a repository: DIR/NAME/1/model.onnx"
        )
    return versions


def _compare(config: Config, model: Path, name: str) -> None:
    """Raise where a model has other inputs or outputs than a config says."""
    session = open_session(model, "cpu")
    difference = config.difference(config_of(session, name, config.max_batch))
    if difference:
        raise LoraFxError(
            f"{model}: its {CONFIG} does not match the model: {difference}", "write the model again"
        )


def _read(home: Path) -> Config:
    """The config of a model's folder."""
    path = home / CONFIG
    errors = (OSError, UnicodeDecodeError)
    with retold(f"{path}: cannot be read", "is it the folder of a model?", errors):
        text = path.read_text(encoding="utf-8")
    return Config.from_text(text, str(path), home.name)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another run may have put a model there
        folder.rmdir()


def _versions(home: Path) -> Iterator[int]:
    """Numbers of the version folders; the server reads as many digits as there are, `2b` as 2."""
    for path in home.iterdir():
        digits = re.match(r"\d+", path.name)
        if digits and path.is_dir():
            yield int(digits[0])
