"""merge for .onnx files: W + s·b·a in the initialisers, streamed, proven, then named.

The folded graph has exactly the base's nodes. Values are computed while they are written, so that
memory holds one tensor at a time; afterwards the file is opened again, what was not touched is
compared byte for byte, and rows of what was are computed again in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.checkpoint.merge import GAIN, given
from lora_fx.checkpoint.osfile import check_output
from lora_fx.checkpoint.plan import Given
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.lowrank import LowRank
from lora_fx.mix import mix
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.matching import Matched, match
from lora_fx.onnx.names import restore_weight_names
from lora_fx.onnx.save import EXTERNAL_OVER, is_external, output, weight_bytes
from lora_fx.onnx.session import open_session
from lora_fx.onnx.triton import Repository
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold, fold_rows
from lora_fx.target import Found, table

METADATA = "lora_fx.merge"
CHUNK = 1 << 24
PROOF_ROWS = 4
"""Rows of every touched tensor that are computed again."""

Array = np.ndarray[Any, Any]


def merge_onnx(
    base: str | PathLike[str],
    adapters: Any,
    out: str | PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    again: bool = False,
    trust: bool = False,
    force: bool = False,
    external_over: int = EXTERNAL_OVER,
    repository: Repository | None = None,
) -> Report:
    """Fold adapters into an .onnx file and write another.

    Args:
        base: The file; it and its data are not changed.
        adapters: Paths or Adapters, or pairs of one and its weight; their sum is rounded once.
        out: The file to write; large weights go to `OUT.data` beside it.
        names: Adapter key → tensor of the file, where the names do not tell.
        again: Fold an adapter that the file's metadata says is in it already.
        trust: Read an adapter_model.bin, by torch's unpickler that runs no code.
        force: Replace an output that exists.
        external_over: Bytes of weights above which they go to a file of their own.
        repository: Where a copy goes, for Triton.

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    source, target = Path(base), Path(out)
    check_output(target, force=force)
    if target.resolve() == source.resolve():
        raise LoraFxError(f"{target}: the output would replace the input", "choose another output")
    parts = given(adapters, trust)
    model = load(source)
    _refuse_again(source, model.metadata_props.get(METADATA), parts, again)
    renamed = restore_weight_names(model)
    graph = OnnxGraph(model)
    found = find(graph)
    matched = _sum(parts, graph, found, names)
    before = {n: graph.reader(n) for n in graph.flow.stores}
    nodes = graph.model.graph.num_nodes()
    fold = Fold(matched.updates, lazy=True)
    fold(graph)
    for name, value in matched.whole.items():
        graph.store(name, value)
    model.metadata_props[METADATA] = _record(model.metadata_props.get(METADATA), parts)
    assert graph.model.graph.num_nodes() == nodes
    with output(target, force=force, repository=repository) as made:
        made.save(model, 0 if is_external(source) else external_over)
        changed = {*fold.applied.values(), *matched.whole}
        written = _prove(made.path, target, before, changed, found, matched)
        if all(n in before and _same(written.reader(n)(), before[n]()) for n in changed):
            raise NoEffectError(
                f"{target}: not written: no element of {len(changed)} tensors would change",
                "is the adapter untrained, or its weight 0?",
            )
        notes = [*graph.notes, *_loads(source, made.path, weight_bytes(model))]
    return _report(made.files, fold, matched, renamed, notes)


def _loads(source: Path, written: Path, size: int) -> list[str]:
    """Load what was written in ONNX Runtime, where that takes little memory; returns notes."""
    if size > EXTERNAL_OVER:
        return ["not loaded in ONNX Runtime, which would read all of it: tensors were compared"]
    try:
        open_session(written, "cpu")
    except LoraFxError:
        try:
            open_session(source, "cpu")
        except LoraFxError as error:  # bfloat16, say, of which the CPU has few ops
            return [f"ONNX Runtime here loads neither the base nor the output: {error.message}"]
        raise
    return []


def _sum(
    parts: Sequence[Given], graph: OnnxGraph, found: Found, names: Mapping[str, str] | None
) -> Matched:
    """All adapters as one, in the graph's keys."""
    each = [match(p.adapter, graph, found, names) for p in parts]
    if len(parts) == 1:
        (one,) = each
        updates = {k: replace(u, alpha=u.alpha * parts[0].weight) for k, u in one.updates.items()}
        if one.whole and parts[0].weight != 1.0:
            raise LoraFxError(
                f"{parts[0].where}: weight {parts[0].weight:g}, and it holds whole tensors",
                "only updates in proportion to their scale can be weighted",
            )
        return Matched(updates, one.whole)
    bound = [
        (replace(p.adapter, entries=dict(m.updates)), p.weight)
        for p, m in zip(parts, each, strict=True)
    ]
    if any(m.whole for m in each):
        raise LoraFxError("several adapters, and one holds whole tensors", "merge that one alone")
    return Matched(dict(mix(bound, "cat").lowrank), {})


def _refuse_again(source: Path, text: str | None, parts: Sequence[Given], again: bool) -> None:
    folded = {a["hash"] for m in _history(text) for a in m["adapters"]}
    for part in parts:
        if part.hash in folded and not again:
            raise LoraFxError(
                f"{source}: {part.where} is merged into it already",
                "start from the original base; --again merges it once more",
            )


def _history(text: str | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
        return [m for m in found if all("hash" in a for a in m["adapters"])]
    except (ValueError, TypeError, KeyError):
        return []


def _record(text: str | None, parts: Sequence[Given]) -> str:
    adapters = [{"hash": p.hash, "weight": p.weight} for p in parts]
    return json.dumps([*_history(text), {"adapters": adapters}])


def _prove(
    temporary: Path,
    target: Path,
    before: Mapping[str, Any],
    changed: set[str],
    found: Found,
    matched: Matched,
) -> OnnxGraph:
    """Open what was written, and compare it with what it has to be."""
    written = OnnxGraph(load(temporary))
    for name in before:
        if name in changed:
            continue
        if not _same(written.reader(name)(), before[name]()):
            raise LoraFxError(f"{target}: not written: {name!r} is not the base's", "a full disk?")
    for name, wrong in _wrong_rows(written, before, found, matched):
        raise LoraFxError(
            f"{target}: not written: {name!r} is off by {wrong:.2e}",
            "was the base changed meanwhile? if not, this is a mistake of lora-fx",
        )
    for name, value in matched.whole.items():
        if (
            written.reader(name)().astype(np.float64).tobytes()
            != value.astype(before[name]().dtype).astype(np.float64).tobytes()
        ):
            raise LoraFxError(f"{target}: not written: {name!r} is not the adapter's")
    return written


def _same(a: Array, b: Array) -> bool:
    """Equal bytes, some at a time: both may be files larger than memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (a, b))
    return all(np.array_equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, len(x), CHUNK))


def _wrong_rows(
    written: OnnxGraph, before: Mapping[str, Any], found: Found, matched: Matched
) -> Iterator[tuple[str, float]]:
    by_name: dict[str, list[tuple[Any, LowRank]]] = {}
    for key, update in matched.updates.items():
        t = found[key]
        by_name.setdefault(t.parameter.name, []).append((t, update))
    rng = np.random.default_rng()
    for name, pairs in by_name.items():
        base, got = before[name](), written.reader(name)()
        if base.ndim != 2:
            rows = slice(None)
        else:
            first = int(rng.integers(0, max(1, base.shape[0] - PROOF_ROWS + 1)))
            rows = slice(first, min(base.shape[0], first + PROOF_ROWS))
        exact = fold_rows(base, pairs, rows)
        eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}.get(
            base.dtype.name, 2.0**-40
        )
        size = np.abs(exact).max(initial=0.0) + np.abs(base[rows].astype(np.float64)).max(initial=0)
        gap = float(np.abs(got[rows].astype(np.float64) - exact).max(initial=0.0))
        if not gap <= eps * size:
            yield name, gap


def _report(
    files: Sequence[Path],
    fold: Fold,
    matched: Matched,
    renamed: int,
    notes: Sequence[str],
) -> Report:
    rows = [
        {"key": ", ".join(f.keys), "tensor": fold.applied.get(f"{f.parameter}|{'|'.join(f.keys)}"),
         "gain": f.kept}
        for f in fold.report
    ]  # fmt: skip
    rows += [{"key": n, "tensor": n, "gain": None} for n in matched.whole]
    warnings = list(notes)
    low = [(f.kept, f.parameter) for f in fold.report if f.kept < GAIN]
    if low:
        warnings.append(
            f"{len(low)} of {len(fold.report)} tensors kept less than {GAIN:.0%} of their update "
            f"when rounded, {min(low)[1]} only {min(low)[0]:.1%}"
        )
    if renamed:
        warnings.append(f"{renamed} tensors got the names that the exporter's metadata tells")
    added = sorted(set(fold.applied.values()) - {f.parameter for f in fold.report})
    if added:
        warnings.append(f"tied uses that differ have constants of their own: {', '.join(added)}")
    outputs = [str(f) for f in files]
    return Report("merge", True, (), tuple(outputs), tuple(warnings), {"tensors": rows})


def lines(report: Report) -> str:
    """The report as a table for people."""
    rows = [("tensor", "gain")]
    for r in report.details["tensors"]:
        rows.append((r["key"], "replaced whole" if r["gain"] is None else f"{r['gain']:.3f}"))
    return "\n".join([*table([(*r,) for r in rows]), f"wrote {' and '.join(report.outputs)}"])
