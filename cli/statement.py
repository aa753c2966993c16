"""Writes what a command did and proved as one JSON statement (--attest FILE.json).

The form is that of an in-toto statement, version 1, which tools that sign and check take: its
subjects are the files that the command wrote or checked, by the hash of their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from lora_fx import __version__
from lora_fx.cli.input_paths import input_paths
from lora_fx.cli.result_page import check_result_file, hashed_files, versions, when, with_data_files
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.text import Json, JsonView, strict_json

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:lora-fx:result:v1"
"""The type of the predicate: what a command did, with what, and its result as of --json."""


def check_statement(path: str, force: bool, given: JsonView) -> None:
    """Refuse, before any work, a statement that cannot be written or that is also an input."""
    if not path.endswith(".json"):
        raise LoraFxError(
            f"--attest {path} does not end in .json",
            "pass a name that ends in .json: --attest statement.json",
        )
    check_result_file("--attest", path, force, given)


def write_statement(path: str, force: bool, result: JsonView) -> str:
    """Write the statement on a result, completely or not at all; returns its path."""
    ctx = click.get_current_context()
    run = ctx.find_root().obj
    outputs = [Path(output) for output in result["outputs"]]
    inputs = _with_parts([file for file in input_paths(ctx.params) if file not in outputs])
    subjects = hashed_files([("output", file) for file in outputs], path)
    materials = hashed_files([("input", file) for file in inputs], path)
    if not outputs:  # a check is about what it read
        subjects, materials = materials, {"files": [], "unhashed": []}
    statement: Json = {
        "_type": STATEMENT,
        "subject": [_resource(row) for row in subjects["files"]],
        "predicateType": PREDICATE,
        "predicate": {
            "tool": {"name": "lora-fx", "version": __version__},
            "command": ["lora-fx", *(run.get("argv") or [])],
            "when": when(run["began"])["when"],
            "materials": [_resource(row) for row in materials["files"]],
            "notHashed": [*subjects["unhashed"], *materials["unhashed"]],
            "versions": versions(),
            "result": dict(result),
        },
    }
    text = json.dumps(strict_json(statement), indent=1, default=str)
    with replacing(path, force=force) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _with_parts(files: Sequence[Path]) -> list[Path]:
    """Return files, each with those that hold its weights and those of its adapters."""
    with_parts = []
    for file in files:
        with_parts += [*with_data_files([file]), *_adapters_of(file)]
    return with_parts


def _adapters_of(file: Path) -> list[Path]:
    """Return the files of adapters that the probe of a file names, where they lie beside it."""
    if file.suffix not in (".onnx", ".pt2"):
        return []
    try:
        if file.suffix == ".pt2":
            from lora_fx.probe.in_program import probe_of_program

            probe = probe_of_program(file)
        else:
            from lora_fx.onnx.probe_runs import probe_of

            probe = probe_of(file)
    except LoraFxError:
        return []  # it has none
    names = [adapter.file for adapter in probe.adapters.values() if adapter.file is not None]
    names += [probe.base_file] if probe.base_file is not None else []
    paths = [file.with_name(name) for name in names]
    return [path for path in paths if path.exists()]


def _resource(row: JsonView) -> Json:
    """Return a file as a statement names it."""
    return {"name": row["path"], "digest": {"sha256": row["sha256"]}}
