"""Writes the result of a command as one HTML file (--report PAGE.html)."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx import __version__
from lora_fx.cli.adapter_arguments import split_weight
from lora_fx.cli.input_paths import input_paths, texts_of
from lora_fx.cli.library_versions import installed
from lora_fx.cli.output import result, say
from lora_fx.errors import LoraFxError, Terminated, one_line
from lora_fx.files.atomic import check_output, replacing
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    from lora_fx.fx.train.train_report import TrainReport

LIBRARIES = ("torch", "numpy", "safetensors", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime")


FILES = 100
"""The largest number of files of a folder that are hashed."""


def check_page(report: str, force: bool, given: JsonView) -> None:
    """Refuse, before any work, a page that cannot be written or that is also an input."""
    if not report.endswith((".html", ".htm")):
        raise LoraFxError(
            f"--report {report} does not end in .html",
            "pass a name that ends in .html: --report page.html",
        )
    check_result_file("--report", report, force, given)


def check_result_file(option: str, path: str, force: bool, given: JsonView) -> None:
    """Refuse a file on a result that is an input, is a folder, or would be replaced unasked."""
    if Path(path).resolve() in [other.resolve() for other in input_paths(given)]:
        raise LoraFxError(f"{option} {path} is also an input", "choose another name")
    check_output(path, force=force)
    if Path(path).is_dir():
        raise LoraFxError(f"{option} {path} is a folder", "choose another name")


@dataclass(frozen=True)
class RunSoFar:
    """A training whose page is written while it goes on.

    Attributes:
        targets: The fields of its targets.
        report: Its losses, which grow with every step.
        steps: The number of its steps.
        digest: What its saved states have in common with the page; None without states.
    """

    targets: Json
    report: TrainReport
    steps: int
    digest: str | None

    def fields(self) -> Json:
        """Return what is known of the result."""
        return {**self.targets, **self.report.to_json()}

    def page_fields(self, state: str) -> Json:
        """Return what the page adds.

        Args:
            state: Running, interrupted, terminated or failed.
        """
        place = {"state": state, "step": len(self.report.losses), "steps": self.steps}
        return {"run": {**place, "digest": self.digest}}


@dataclass
class PageFile:
    """The page of this command.

    Attributes:
        path: Where it is written.
        may_replace: Whether a page that is there may go; one of this command may.
        run: The training that is on the page until its result is.
        order: Returns the keys of the model's targets in the order of its graph; none without one.
        in_memory: Rows {of, name, what, sha256} of weights and data that are in no file by name.
    """

    path: str
    may_replace: bool
    run: RunSoFar | None = None
    order: Callable[[], list[str]] = list
    in_memory: list[Json] = field(default_factory=list)

    def write(self, shown: JsonView) -> str:
        """Write the page of a result, completely or not at all; return its path."""
        ctx = click.get_current_context()
        added = {**_added(), "in_memory": self.in_memory}
        outputs = [Path(output) for output in shown["outputs"]]
        inputs = [input_path for input_path in input_paths(ctx.params) if input_path not in outputs]
        inputs = with_data_files(inputs)
        rows = [("input", file) for file in inputs] + [("output", file) for file in outputs]
        added |= hashed_files(rows, self.path)
        added["adapters"] = []
        if ctx.command.name != "merge-all":  # whose adapters are never in one model
            added["adapters"], without_spectra = _adapters(outputs, ctx.params)
            added["unhashed"] += without_spectra
        if added["adapters"] and not isinstance(shown.get("targets"), list):
            added["order"] = self.order()
        if self.run is not None and not shown["ok"]:
            added |= self.run.page_fields("failed")
            shown = {**self.run.fields(), **shown}
        _drop_repeated(added["adapters"], shown)
        self._replace({**shown, "page": added})
        self.run = None
        return self.path

    def write_running(self, run: RunSoFar) -> None:
        """Write the page of a training that goes on; files are hashed at its end."""
        self.run = run
        added = {**_added(), **run.page_fields("running")}
        self._replace({**result(True, **run.fields()), "page": added})

    def write_stopped(self, stop: BaseException) -> None:
        """Write, where the page says that a training goes on, that it has stopped, and by what.

        Args:
            stop: What stopped it.
        """
        if self.run is None:
            return
        state = "failed"
        hint = ""
        fields: Json = {}
        if isinstance(stop, (KeyboardInterrupt, click.Abort)):
            state = "terminated" if isinstance(stop, Terminated) else "interrupted"
            hint = getattr(stop, "left", "")
        elif isinstance(stop, LoraFxError):
            fields["error"] = stop.message
            hint = stop.hint
        elif isinstance(stop, click.exceptions.Exit):
            code = stop.exit_code
            fields["error"] = f"another process of the run ended it, with exit code {code}"
        else:
            fields["error"] = f"{type(stop).__name__}: {one_line(stop)}"
        if hint:
            fields["hint"] = hint
        added = {**_added(), **self.run.page_fields(state)}
        try:
            self._replace({**result(False, **self.run.fields(), **fields), "page": added})
        except LoraFxError as error:
            say(f"{self.path} still says that the training goes on: {error.message}")

    def _replace(self, shown: JsonView) -> None:
        from lora_fx.report.page import page

        text = page(shown)
        with replacing(self.path, force=self.may_replace) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.may_replace = True


def page_of_command() -> PageFile | None:
    """Return the page of this command; None without --report."""
    page_file: PageFile | None = click.get_current_context().find_root().obj.get("page")
    return page_file


def _added() -> Json:
    """Return what a page shows beside the result: the command line, versions, times, notes."""
    run = click.get_current_context().find_root().obj
    notes = [text for text in run["notes"] if text not in run["warned"]]
    return {
        "argv": run.get("argv") or [], "versions": versions(), **when(run["began"]), "notes": notes
    }  # fmt: skip


def _drop_repeated(adapters: list[Json], shown: JsonView) -> None:
    """Remove from the adapters' rows the fields that equal those of the result's row."""
    targets = shown.get("targets")
    if not isinstance(targets, list):
        return
    target_of = {target["key"]: target for target in targets}
    for adapter in adapters:
        for update in adapter["updates"]:
            target = target_of.get(update["key"], {})
            repeated = [
                name
                for name, value in update.items()
                if name != "key" and name in target and target[name] == value
            ]
            for name in repeated:
                del update[name]


def when(began: dict[str, float]) -> Json:
    """The local start time of the command, its seconds, and the machine."""
    start = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(began["when"]))
    seconds = time.monotonic() - began["seconds"]
    return {"when": start, "seconds": round(seconds, 1), "host": platform.node()}


def versions() -> dict[str, str]:
    """The versions of installed libraries by name; nothing is imported."""
    return {
        "lora-fx": __version__,
        "python": platform.python_version(),
        **installed(*LIBRARIES),
        "platform": platform.platform(terse=True),
    }


def hashed_files(paths: list[tuple[str, Path]], page: str) -> Json:
    """Rows of files with their hashes; a folder gives its files, except hidden ones."""
    rows: list[Json] = []
    unhashed: list[str] = []
    hashed: set[Path] = set()
    for of, path in paths:
        files = _files_of(path, page)
        for file in files[:FILES]:
            if file.resolve() in hashed:
                continue
            hashed.add(file.resolve())
            try:
                with file.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                size = file.stat().st_size
            except OSError as error:
                unhashed.append(f"{file}: not hashed: {error.strerror or error}")
                continue
            rows.append({"of": of, "path": str(file), "bytes": size, "sha256": digest})
        if len(files) > FILES:
            unhashed.append(f"{path}: {len(files) - FILES} more files are not hashed")
    return {"files": rows, "unhashed": unhashed}


def with_data_files(files: Sequence[Path]) -> list[Path]:
    """Return files, each .onnx file with the files that hold its weights, if it can be read."""
    with_data = []
    for file in files:
        with_data.append(file)
        if file.suffix == ".onnx":
            with contextlib.suppress(LoraFxError):  # which the command has told
                from lora_fx.onnx.load import data_names

                with_data += [file.with_name(name) for name in data_names(file)]
    return with_data


def _files_of(path: Path, page: str) -> list[Path]:
    """A file, or the files of a folder, except hidden ones and the page."""
    files = [path]
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    page_path = Path(page).resolve()
    return [file for file in files if file.is_file() and file.resolve() != page_path]


def _adapters(outputs: list[Path], given: JsonView) -> tuple[list[Json], list[str]]:
    """The written adapters, or else the given ones, with their spectra."""
    base = given.get("base")
    if base and str(base).endswith(".onnx"):
        base = None
    adapters = _adapters_among((str(output), 1.0) for output in outputs)
    if not adapters:
        texts = [*texts_of(given, ("adapter", "adapters"))]
        texts += [text for text in texts_of(given, ("b",)) if Path(text).exists()]
        adapters = _adapters_among(map(split_weight, texts))

    rows: list[Json] = []
    without_spectra: list[str] = []
    for path, weight in adapters:
        from lora_fx.adapter.singular_values import summary
        from lora_fx.formats.io import load_adapter

        try:
            adapter = load_adapter(path, base=base or None)
            updates = summary(adapter.weighted(weight))
        except LoraFxError as error:
            without_spectra.append(f"{path}: no spectra: {error.message}")
            continue
        rows.append({"path": path, "weight": weight, "updates": updates})
    return rows, without_spectra


def _adapters_among(paths: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """The paths of adapters, with their weights."""
    from lora_fx.formats.io import is_adapter

    adapters = []
    for path, weight in paths:
        if not path.endswith((".onnx", ".pt2", ".data")) and is_adapter(path):
            adapters.append((path, weight))
    return adapters
