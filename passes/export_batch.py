"""export in mode batch: one ONNX file for many adapters, a row of the batch each.

    base → ONNX → batch → run: row b of a mixed batch == adapter ids[b] on that row, alone

Every adapter and the base are run unfolded in torch on the rows that they got in shuffled, mixed
batches; an id is repeated. Only where all rows agree the file gets its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter import Adapter, bind
from lora_fx.checkpoint.osfile import check_output
from lora_fx.compare import ORT_TOL, Parity, Report, compare
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.adapted import AdaptedModule
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.to_onnx import OPSET, to_onnx
from lora_fx.inputs import SIZES
from lora_fx.onnx.batching import IDS, SCALES, batch_symbol
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.names import rename_dimensions, restore_weight_names, strip_traces
from lora_fx.onnx.save import EXTERNAL_OVER, output
from lora_fx.onnx.session import open_session
from lora_fx.passes.batch import Batch, Source
from lora_fx.passes.given import captured_of, opened, plain
from lora_fx.passes.pipeline import find, insert
from lora_fx.passes.prove import CEILING, EPSILON, arrays_of, own_errors, torch_run

Adapters = Adapter | Sequence[Adapter] | Mapping[str, Adapter]
AT_ONCE = 16
"""Rows of one batch of the check."""


def export_batch(
    model: Any,
    path: str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapters: Adapters | None = None,
    scales: bool = False,
    inputs: Mapping[str, Any] | None = None,
    provider: str = "auto",
    opset: int = OPSET,
    external_over: int = EXTERNAL_OVER,
    dynamic: Any = None,
    force: bool = False,
) -> Report:
    """Write one ONNX file that serves every adapter; see lora_fx.passes.export.

    Args:
        model: A module, a path, a Captured, or a module that insert returned.
        path: Where to write.
        args: Example inputs, for a model that is not captured yet.
        kwargs: Example inputs by keyword.
        adapters: In the order of their ids, 1, 2 …; a mapping names them.
        scales: Add the input `adapter_scales`, a weight by row.
        inputs: Arrays for the check, instead of sampled ones.
        provider: auto, cpu or cuda.
        opset: ONNX operator set.
        external_over: Bytes of weights above which they go to a file of their own.
        dynamic: As in capture.
        force: Replace an existing file.

    Raises:
        LoraFxError: A target whose rows cannot be told apart, or that has no form by row.
        NoEffectError: A row differs from its adapter alone; nothing is written.
    """
    check_output(path, force=force)
    model = opened(model)
    if adapters is None and isinstance(model, AdaptedModule):
        adapters = model.adapter()
    named = _named(adapters)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise LoraFxError("this module's weights are folded already", "export the original")
    cap = captured_of(model, args, kwargs, dynamic)
    base, found = plain(cap), find(cap)
    base.eval()
    bound = {name: bind(a, found) for name, a in named.items()}
    for name, adapter in bound.items():
        if adapter.full:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {min(adapter.full)!r}",
                "rows of one batch share everything but low-rank updates",
            )
    made = to_onnx(base, opset)
    restore_weight_names(made.model)
    rename_dimensions(made.model, made.symbols)
    strip_traces(made.model)
    graph = OnnxGraph(made.model)
    before = sum(1 for _ in made.model.graph.all_nodes())
    rewrite = Batch({n: a.lowrank for n, a in bound.items()}, _sources(base, graph), scales)
    rewrite(graph)
    graph.lint()
    symbol = batch_symbol(made.model)
    rowed = [
        str(v.name)
        for v in made.model.graph.inputs
        if v.shape is not None and len(v.shape) and str(v.shape[0]) == symbol
    ]
    target = Path(path)
    with output(target, force=force) as made_file:
        made_file.save(made.model, external_over)
        session = open_session(made_file.path, provider)
        parity = prove_rows(session.run, base, bound, rowed, arrays=inputs, scales=scales)
    sizes = {str(f): f.stat().st_size for f in made_file.files}
    warnings = [str(p) for p in cap.pinned] + [session.note] * bool(session.note)
    details = {
        "files": sizes,
        "provider": session.provider,
        "opset": opset,
        "mode": "batch",
        "adapters": list(bound),
        "nodes": sum(1 for _ in made.model.graph.all_nodes()),
        "nodes_of_base": before,
    }
    return Report("export", True, tuple(parity), tuple(sizes), tuple(warnings), details)


def _named(adapters: Adapters | None) -> dict[str, Adapter]:
    if isinstance(adapters, Adapter):
        adapters = [adapters]
    if not adapters:
        raise LoraFxError("mode batch needs adapters", "adapters=[first, second, …]")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    return {f"adapter_{i}": a for i, a in enumerate(adapters, 1)}


def _sources(base: CapturedModule, graph: OnnxGraph) -> dict[str, tuple[str, Source]]:
    """Which parameter each stored tensor is, by name; by its value, whether it is transposed."""
    torch_side = base.graph(False)
    names = {n: p for p in torch_side.parameters() for n in (p.name, *p.aliases)}
    result: dict[str, tuple[str, Source]] = {}
    for stored in graph.parameters():
        stem, _, number = stored.name.rpartition(".")
        p = names.get(stored.name) or (names.get(stem) if number.isdigit() else None)
        if p is None or len(p.shape) < 2:
            continue
        ours, theirs = graph.read(stored.name), torch_side.read(p.name)
        if ours.shape == theirs.shape and np.array_equal(ours, theirs):
            result[stored.name] = (p.name, Source(p.shape))
        elif theirs.ndim == 2 and ours.shape == theirs.T.shape and np.array_equal(ours, theirs.T):
            result[stored.name] = (p.name, Source(p.shape, turned=True))
    return result


def prove_rows(
    run: Any,
    base: CapturedModule,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    *,
    arrays: Mapping[str, Any] | None = None,
    scales: bool = False,
) -> list[Parity]:
    """Every id at least once in mixed batches, row by row against the unfolded module.

    The reference runs on the row itself, twice over, so that nothing of the other rows is in it.

    Args:
        run: {input: array} → {output: array}, of the batch graph.
        base: The module without adapters.
        adapters: Bound, in the order of their ids.
        rowed: Inputs that have the batch dimension.
        arrays: A user's inputs instead of sampled ones.
        scales: The graph takes weights by row.
    """
    batches = list(_batches(base, len(adapters), arrays, rowed))
    rng = np.random.default_rng(1)
    got, weights = [], []
    for feeds, ids in batches:
        w = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32) if scales else np.ones(len(ids))
        weights.append(w)
        got.append(run({**feeds, IDS: ids, **({SCALES: w} if scales else {})}))
    worst: list[Parity | None] = [None] * len(batches)
    for i, name in enumerate(["", *adapters]):
        for k, (feeds, ids) in enumerate(batches):
            for row in np.flatnonzero(ids == i):
                module = base if not i else _with(base, adapters[name], float(weights[k][row]))
                parity = _row(module, feeds, rowed, int(row), got[k])
                last = worst[k]
                if last is None or parity.rel / parity.tol > last.rel / last.tol:
                    worst[k] = parity
                if not parity.ok:
                    raise NoEffectError(
                        f"row {row} of a mixed batch differs from {name or 'the base'!r} (id {i}) "
                        f"alone: output {parity.output!r} rel {parity.rel:.2e}, "
                        f"the gate is {parity.tol:.1e}",
                        "nothing was written; does the model mix the rows of a batch?",
                    )
    return [p for p in worst if p is not None]


def _with(base: CapturedModule, adapter: Adapter, weight: float) -> CapturedModule:
    module = insert(base.captured, adapter=adapter.weighted(weight), dead="allow")
    module.eval()
    return module


def _batches(
    base: CapturedModule, count: int, arrays: Mapping[str, Any] | None, rowed: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(inputs, ids) until every id had a row; the base's id and a repeated one are among them."""
    order = np.random.default_rng(0).permutation(count + 1)
    todo = [*order.tolist(), int(order[-1]) or 1, 0]
    number = 0
    while todo or (arrays is None and number < len(SIZES)):
        rows = min(max(len(todo), 4), AT_ONCE)
        named = base.sample((rows, SIZES[number % len(SIZES)][1]), arrays, number)
        feeds = arrays_of(named)
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        part, todo = todo[:rows], todo[rows:]
        part += [int(order[(number + j) % len(order)]) for j in range(rows - len(part))]
        number += 1
        yield feeds, np.array(part, np.int64)


def _row(
    module: CapturedModule,
    feeds: Mapping[str, Any],
    rowed: Sequence[str],
    row: int,
    got: Mapping[str, Any],
) -> Parity:
    """One row against a module that runs on this row alone."""
    alone = {n: np.repeat(v[row : row + 1], 2, 0) if n in rowed else v for n, v in feeds.items()}
    expected = {n: v[:1] for n, v in torch_run(module)(alone).items()}
    ours = {n: v[row : row + 1] for n, v in got.items()}
    shapes = {n: v.shape for n, v in feeds.items()}
    gates = {n: max(ORT_TOL, 8 * EPSILON.get(v.dtype.name, 0.0)) for n, v in expected.items()}
    parity = compare(ours, expected, shapes, gates, "mixed batch")
    if not parity.ok and gates[parity.output] == ORT_TOL:
        own = own_errors(module)
        wider = {n: min(max(g, 4 * own.get(n, 0.0) + 1e-7), CEILING) for n, g in gates.items()}
        parity = compare(ours, expected, shapes, wider, "mixed batch")
    return parity
