"""--report PAGE.html: the result of a command as one HTML file, beside what it prints."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import click

from lora_fx import __version__
from lora_fx.cli.arguments import split_weight
from lora_fx.cli.input_paths import input_paths, texts_of
from lora_fx.cli.library_versions import installed
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_output, replacing
from lora_fx.text import Json, JsonView

LIBRARIES = ("torch", "numpy", "safetensors", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime")


FILES = 100
"""The most files of a folder that are hashed."""


def check_page(report: str, force: bool, given: JsonView) -> None:
    """Refuse, before any work, a page that cannot be written or that would be something else."""
    if not report.endswith((".html", ".htm")):
        raise LoraFxError(f"--report {report} does not end in .html", "--report page.html")
    if Path(report).resolve() in [path.resolve() for path in input_paths(given)]:
        raise LoraFxError(f"--report {report} is also an input", "choose another name")
    check_output(report, force=force)
    if Path(report).is_dir():
        raise LoraFxError(f"--report {report} is a folder", "choose another name")


def write_page(path: str, force: bool, shown: JsonView) -> str:
    """Write the page of a result, all of it or nothing; its path."""
    from lora_fx.report.page import page

    ctx = click.get_current_context()
    run = ctx.find_root().obj
    added: Json = {"argv": run.get("argv") or [], "versions": versions(), **when(run["began"])}
    added["notes"] = [text for text in run["notes"] if text not in run["warned"]]
    outputs = [Path(p) for p in shown["outputs"]]
    source = [p for p in input_paths(ctx.params) if p not in outputs]
    added |= _hashed([("input", p) for p in source] + [("output", p) for p in outputs], path)
    added["adapters"], said = _adapters(outputs, ctx.params)
    added["unhashed"] += said
    _once(added["adapters"], shown)
    text = page({**shown, "page": added})
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _once(adapters: list[Json], told: JsonView) -> None:
    """Take out of the adapters' rows what the result's own row of the same key says."""
    own = told.get("targets")
    rows = {t["key"]: t for t in own} if isinstance(own, list) else {}
    for adapter in adapters:
        for i, row in enumerate(adapter["updates"]):
            same = rows.get(row["key"], {})
            kept = {k: v for k, v in row.items() if k == "key" or k not in same or same[k] != v}
            adapter["updates"][i] = kept


def when(began: dict[str, float]) -> Json:
    """When the command began, in local time, how many seconds it took, and on which machine."""
    start = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(began["when"]))
    seconds = time.monotonic() - began["seconds"]
    return {"when": start, "seconds": round(seconds, 1), "host": platform.node()}


def versions() -> dict[str, str]:
    """{library: version} of those that are installed; nothing is imported."""
    found = {"lora-fx": __version__, "python": platform.python_version(), **installed(*LIBRARIES)}
    return {**found, "platform": platform.platform(terse=True)}


def _hashed(paths: list[tuple[str, Path]], page: str) -> Json:
    """Rows of files with their hashes; of a folder the files in it, hidden ones left out."""
    rows: list[Json] = []
    said: list[str] = []
    seen: set[Path] = set()
    for of, path in paths:
        files = sorted(f for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else [path]
        plain = [f for f in files if f.is_file() and f.resolve() != Path(page).resolve()]
        for file in plain[:FILES]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                with file.open("rb") as f:
                    digest = hashlib.file_digest(f, "sha256").hexdigest()
                size = file.stat().st_size
            except OSError as e:
                said.append(f"{file}: not hashed: {e.strerror or e}")
                continue
            rows.append({"of": of, "path": str(file), "bytes": size, "sha256": digest})
        if len(plain) > FILES:
            said.append(f"{path}: {len(plain) - FILES} more files are not hashed")
    return {"files": rows, "unhashed": said}


def _adapters(outputs: list[Path], given: JsonView) -> tuple[list[Json], list[str]]:
    """The adapters that were written, or else those that were given, with their spectra."""
    found, said = [], []
    base = given.get("base")
    base = base if base and not str(base).endswith(".onnx") else None
    asked = map(split_weight, texts_of(given, ("adapter", "adapters", "b")))
    for path, weight in _loadable((str(p), 1.0) for p in outputs) or _loadable(asked):
        from lora_fx.adapter.truncate import summary
        from lora_fx.formats.io import load_adapter

        try:
            loaded = load_adapter(path, base=base)
            rows = summary(loaded.weighted(weight))
        except LoraFxError as e:
            said.append(f"{path}: no spectra: {e.message}")
            continue
        found.append({"path": path, "weight": weight, "updates": rows})
    return found, said


def _loadable(paths: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    from lora_fx.formats.io import is_adapter

    plain = ((p, w) for p, w in paths if not p.endswith((".onnx", ".pt2", ".data")))
    return [(path, weight) for path, weight in plain if is_adapter(path)]
