"""Prove a batch graph: every row of mixed batches equals its adapter alone.

Every adapter and the base run unfolded, in the reference, on the rows that they got in shuffled,
mixed batches; an id is repeated. The reference runs on the row itself, twice over, so that nothing
of the other rows is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Parity, compare_fairly
from lora_fx.dtypes import Array
from lora_fx.errors import NoEffectError
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.batch import IDS, SCALES
from lora_fx.passes.proofs.reference import Reference, Run

AT_ONCE = 16
"""Rows of one batch of the check."""


def prove_rows(
    run: Run,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    *,
    fixed: bool,
    scales: bool,
) -> list[Parity]:
    """Every id at least once, row by row.

    Args:
        run: {input: array} → {output: array}, of the batch graph.
        reference: The model without adapters.
        adapters: Bound, in the order of their ids.
        rowed: Inputs that have the batch dimension.
        fixed: The inputs are a user's own: one size.
        scales: The graph takes weights by row.

    Raises:
        NoEffectError: A row that differs.
    """
    batches = list(_batches(reference, len(adapters), rowed, fixed))
    rng = np.random.default_rng(1)
    got, weights = [], []
    for feeds, ids in batches:
        w = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32) if scales else np.ones(len(ids))
        weights.append(w)
        got.append(run({**feeds, IDS: ids, **({SCALES: w} if scales else {})}))
    found: list[list[Parity]] = [[] for _ in batches]
    for i, name in enumerate(["", *adapters]):
        for k, (feeds, ids) in enumerate(batches):
            for row in np.flatnonzero(ids == i):
                weight = float(weights[k][row])
                adapter = adapters[name] if i else None
                if adapter is not None and scales:
                    adapter = adapter.weighted(weight)
                parity = _row(reference, adapter, feeds, rowed, int(row), got[k])
                found[k].append(parity)
                if not parity.ok:
                    raise NoEffectError(
                        f"row {row} of a mixed batch differs from {name or 'the base'!r} (id {i}) "
                        f"alone: output {parity.output!r} rel {parity.rel:.2e}, "
                        f"the gate is {parity.tol:.1e}",
                        "nothing was written; does the model mix the rows of a batch?",
                    )
    return [max(rows, key=lambda p: p.rel / p.tol) for rows in found if rows]


def _batches(
    reference: Reference, count: int, rowed: Sequence[str], fixed: bool
) -> Iterator[tuple[dict[str, Array], Array]]:
    """(inputs, ids) until every id had a row, one repeated; then batches of few ids."""
    order = np.random.default_rng(0).permutation(count + 1)
    todo = [*order.tolist(), int(order[-1]) or 1, 0]
    number = 0
    while todo or (not fixed and number < len(SIZES)):
        rows = min(max(len(todo), 4), AT_ONCE)
        feeds = reference.feeds((rows, SIZES[number % len(SIZES)][1]), number)
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


def _row(
    reference: Reference,
    adapter: Adapter | None,
    feeds: Mapping[str, Array],
    rowed: Sequence[str],
    row: int,
    got: Named,
) -> Parity:
    """One row against the reference, which runs on this row alone."""
    alone = {n: np.repeat(v[row : row + 1], 2, 0) if n in rowed else v for n, v in feeds.items()}
    whole = reference.run(adapter)(alone)
    expected, gates = {n: v[:1] for n, v in whole.items()}, reference.gates(adapter, whole, alone)
    ours = {n: v[row : row + 1] for n, v in got.items()}
    shapes, own = {n: v.shape for n, v in feeds.items()}, partial(reference.own_errors, adapter)
    return compare_fairly(ours, expected, shapes, gates, own, of="mixed batch")
