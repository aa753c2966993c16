"""Rows of a batch graph: every row of mixed batches equals its adapter alone.

Every adapter and the base run unfolded, in the reference, on the rows that they got in shuffled,
mixed batches; an id is repeated. The reference runs on the row itself, twice over, so that
nothing of the other rows is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import (
    Parity,
    compare_fairly,
    demand,
    gates_of,
    rel,
)
from lora_fx.dtypes import Array
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.batch import SCALES
from lora_fx.onnx.manifest import IDS
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.reference import Choices, Reference, Run
from lora_fx.passes.proofs.run_comparison import compared

AT_ONCE = 16
"""Rows of one batch of the check."""


def prove_rows(
    run: Run,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    *,
    scales: bool,
    rerun: FileRerun | None = None,
) -> list[Parity]:
    """The base at every size, and every id at least once, row by row.

    Args:
        run: {input: array} → {output: array}, of the batch graph.
        reference: The model without adapters.
        adapters: Bound, in the order of their ids.
        rowed: Inputs that have the batch dimension.
        scales: The graph takes weights by row.
        rerun: Other ways to run the batch graph.

    Raises:
        NoEffectError: A row that differs.
    """

    def of_base(feeds: Named) -> Named:
        """Inputs with the id of the base in every row."""
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        more = {SCALES: np.ones(rows, np.float32)} if scales else {}
        return {**feeds, IDS: np.zeros(rows, np.int64), **more}

    found = reference.prove(
        lambda feeds: run(of_base(feeds)), None, "base", rerun and replace(rerun, also=of_base)
    )
    demand(found, "ONNX Runtime differs from the model")
    if reference.mixes:
        return [*found, *_together(run, reference, adapters, rowed, scales=scales)]
    batches = list(_batches(reference, len(adapters), rowed))
    rng = np.random.default_rng(1)
    got, weights = [], []
    for feeds, ids in batches:
        w = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32) if scales else np.ones(len(ids))
        weights.append(w)
        got.append(run({**feeds, IDS: ids, **({SCALES: w} if scales else {})}))
    wanted: list[dict[int, dict[str, Array]]] = [{} for _ in batches]
    rows: list[dict[int, tuple[Adapter | None, Named]]] = [{} for _ in batches]
    for i, adapter in enumerate([None, *adapters.values()]):
        for k, (feeds, ids) in enumerate(batches):
            for row in map(int, np.flatnonzero(ids == i)):
                given = adapter.weighted(float(weights[k][row])) if adapter and scales else adapter
                two = partial(np.repeat, repeats=2, axis=0)
                alone = {n: two(v[row : row + 1]) if n in rowed else v for n, v in feeds.items()}
                wanted[k][row] = {n: v[:1] for n, v in reference.run(given)(alone).items()}
                rows[k][row] = given, alone
    names = ["", *adapters]
    for k, (feeds, ids) in enumerate(batches):
        # all rows at once: what one row rounds by may be large beside its own numbers
        whole = {
            n: np.concatenate([wanted[k][r][n] for r in range(len(ids))]) for n in wanted[k][0]
        }
        chosen = [adapters[names[i]] if i else None for i in {*ids}]
        weighed = {**feeds, IDS: ids, **({SCALES: weights[k]} if scales else {})}
        gates = gates_of(whole, reference.ceiling, partial(reference.run(None), feeds))
        parity, _ = compared(
            run, rerun, weighed, whole, gates, partial(_own_errors, reference, chosen),
            partial(_choices_of_rows, reference, rows[k]), of="mixed batch",
        )  # fmt: skip
        found.append(parity)
        if not parity.ok:
            ours, theirs = got[k][parity.output], whole[parity.output]
            row = int(np.argmax([rel(ours[r], theirs[r]) for r in range(len(ids))]))
            whose = f"{names[ids[row]] or 'the base'!r} (id {ids[row]})"
            demand([parity], f"row {row} of a batch, which the model may mix, is not {whose} alone")
    return found


def _choices_of_rows(
    reference: Reference, rows: Mapping[int, tuple[Adapter | None, Named]]
) -> Choices:
    """What every row of a batch chooses alone, with its adapter, one below the other."""
    alone = [reference.choices(*rows[row]) for row in sorted(rows)]

    def joined(parts: Sequence[Named]) -> dict[str, Array]:
        return {n: np.concatenate([p[n][:1] for p in parts]) for n in parts[0] if parts[0][n].ndim}

    values = joined([c.values for c in alone])
    among = {n: floats for n, floats in alone[0].among.items() if n in values}
    return Choices(values, among, joined([c.outputs for c in alone]), lambda _: [])


def _own_errors(
    reference: Reference, adapters: Sequence[Adapter | None]
) -> Iterator[Mapping[str, float]]:
    """Per output, how far rounding moves any of these: the more, the longer it is asked."""
    worst: dict[str, float] = {}
    for adapter in adapters:
        for found in reference.own_errors(adapter):
            worst |= {n: max(e, worst.get(n, 0.0)) for n, e in found.items()}
            yield worst


def _together(
    run: Run,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    *,
    scales: bool,
) -> Iterator[Parity]:
    """Every id for a whole batch, and a mixed one with its rows in another order.

    For models whose activations have one range over all rows: a row alone is another row there.
    """
    feeds = reference.feeds((4, SIZES[0][1]))
    rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
    weight = 0.75 if scales else 1.0
    more = {SCALES: np.full(rows, weight, np.float32)} if scales else {}
    shapes = {n: v.shape for n, v in feeds.items()}
    ids = np.arange(rows, dtype=np.int64) % (len(adapters) + 1)
    back = {n: v[::-1].copy() if n in rowed else v for n, v in feeds.items()}
    turned = {n: v[::-1] for n, v in run({**back, IDS: ids[::-1].copy(), **more}).items()}
    tried: list[tuple[str, Adapter | None, Named]] = [("mixed rows", None, turned)]
    expected: list[Named] = [run({**feeds, IDS: ids, **more})]
    for i, (name, adapter) in enumerate({"the base": None, **adapters}.items()):
        adapter = adapter.weighted(weight) if adapter and scales else adapter
        tried.append((name, adapter, run({**feeds, IDS: np.full(rows, i, np.int64), **more})))
        expected.append(reference.run(adapter)(feeds))
    for (name, adapter, ours), wanted in zip(tried, expected, strict=True):
        own, gates = partial(reference.own_errors, adapter), gates_of(wanted, reference.ceiling)
        parity = compare_fairly(ours, wanted, shapes, gates, own, of=name)
        demand([parity], "a batch differs")
        yield parity


def _batches(
    reference: Reference, count: int, rowed: Sequence[str]
) -> Iterator[tuple[dict[str, Array], Array]]:
    """(inputs, ids) until every id had a row, one repeated; then batches of few ids."""
    lengths = [size[1] for size in reference.inputs.checks if isinstance(size, tuple)]
    order = np.random.default_rng(0).permutation(count + 1)
    todo = [*order.tolist(), int(order[-1]) or 1, 0]
    number = 0
    while todo or (not reference.arrays and number < len(lengths)):
        rows = min(max(len(todo), 4), AT_ONCE)
        feeds = reference.feeds((rows, lengths[number % len(lengths)]), number)
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        part, todo = todo[:rows], todo[rows:]
        part += [int(order[(number + j) % len(order)]) for j in range(rows - len(part))]
        number += 1
        yield feeds, np.array(part, np.int64)
    last = int(order[order > 0][-1])
    for pattern in ((last, 0, 0, last), (last, last)):  # few adapters share one product
        feeds = reference.feeds((len(pattern), SIZES[0][1]), number)
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        yield feeds, np.array([pattern[j % len(pattern)] for j in range(rows)], np.int64)
