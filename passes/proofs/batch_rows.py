"""The proof of a batch graph: each row of a mixed batch equals a run with its adapter alone.

Every adapter and the base run unfolded, in the reference, on the rows that they got in shuffled,
mixed batches; an id is repeated. The reference runs on the row itself, twice over, so that
nothing of the other rows is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import planted
from lora_fx.compare import (
    Parity,
    compare_fairly,
    demand,
    gates_of,
    rel,
)
from lora_fx.dtypes import Array
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.batch_inputs import SCALES
from lora_fx.onnx.row_starts import STARTS, Starts
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.reference import Choices, Reference, Run
from lora_fx.passes.proofs.run_comparison import compared
from lora_fx.passes.proofs.starts_runs import with_starts

AT_ONCE = 16
"""The largest number of rows in one batch of the check."""


def prove_rows(
    run: Run,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    *,
    scales: bool,
    starts: Starts | None = None,
    rerun: FileRerun | None = None,
    evaluate: Callable[[Adapter], Adapter] = lambda adapter: adapter,
) -> list[Parity]:
    """Compare the base at every size, and each adapter id in at least one row of mixed batches.

    Args:
        run: {input: array} → {output: array}, of the batch graph.
        reference: The model without adapters.
        adapters: Bound, in the order of their ids.
        rowed: Inputs that have the batch dimension.
        scales: The graph takes weights by row.
        starts: The graph takes the token from which on each row's adapter acts.
        rerun: Other ways to run the batch graph.
        evaluate: Makes what a weight can multiply of an adapter that reads its base.

    Raises:
        NoEffectError: A row that differs.
    """

    def of_base(feeds: Named) -> Named:
        """Add the id of the base to the inputs, for every row."""
        n_rows = _row_count(feeds, rowed)
        feeds_of_base = {**feeds, IDS: np.zeros(n_rows, np.int64)}
        if scales:
            feeds_of_base[SCALES] = np.ones(n_rows, np.float32)
        if starts is not None:
            feeds_of_base = with_starts(starts, feeds_of_base, None)
        return feeds_of_base

    base_rerun = rerun and replace(rerun, also=of_base)
    results = reference.prove(lambda feeds: run(of_base(feeds)), None, "base", base_rerun)
    demand(results, "ONNX Runtime differs from the model")
    if reference.mixes:
        return [*results, *_together(run, reference, adapters, rowed, evaluate, scales=scales)]

    batches: list[MixedBatch] = []
    rng = np.random.default_rng(1)
    longest = max((len(adapter.invocation) for adapter in adapters.values()), default=0)
    for feeds, ids in list(_batches(reference, len(adapters), rowed, longest)):
        choices: list[Array | None] = [None]
        if scales:
            choices = [rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)]
            if any(evaluate(adapter) is not adapter for adapter in adapters.values()):
                choices.append(np.ones(len(ids), np.float32))  # with the adapter as it is
        for weights in choices:
            batch = MixedBatch(feeds, ids, weights)
            if starts is not None:
                batch.invoke(starts, [(), *(adapter.invocation for adapter in adapters.values())])
            batch.outputs = run(batch.graph_feeds)
            batches.append(batch)

    # one adapter after the other: the reference makes a graph of each
    for i, adapter in enumerate([None, *adapters.values()]):
        for batch in batches:
            for row in map(int, np.flatnonzero(batch.ids == i)):
                _run_alone(reference, batch, row, adapter, rowed, evaluate)

    for batch in batches:
        results.append(_compare_rows(run, rerun, reference, adapters, batch))
    return results


@dataclass
class MixedBatch:
    """A batch whose rows use different adapters.

    Attributes:
        feeds: Inputs of the model.
        ids: The id of each row's adapter.
        weights: The weight of each row's adapter; None where the graph takes none.
        starts: The token from which on each row's adapter acts; None where the graph takes none.
        outputs: Of the batch graph.
        rows: Row → its adapter and the inputs with which it runs alone.
        expected: Row → the outputs of the reference for the row alone.
    """

    feeds: dict[str, Array]
    ids: Array
    weights: Array | None
    starts: Array | None = None
    outputs: dict[str, Array] = field(default_factory=dict)
    rows: dict[int, tuple[Adapter | None, Named]] = field(default_factory=dict)
    expected: dict[int, dict[str, Array]] = field(default_factory=dict)

    @property
    def graph_feeds(self) -> dict[str, Array]:
        """The inputs of the batch graph: the model's inputs, the ids, and any weights."""
        feeds = {**self.feeds, IDS: self.ids}
        if self.weights is not None:
            feeds[SCALES] = self.weights
        if self.starts is not None:
            feeds[STARTS] = self.starts
        return feeds

    def invoke(self, starts: Starts, invocations: Sequence[Sequence[int]]) -> None:
        """Put each row's invocation among its token ids, but for every third row; set the starts.

        Args:
            starts: What the manifest of the graph says of them.
            invocations: The tokens of each adapter in the order of ids, the base first.
        """
        tokens = np.array(self.feeds[starts.ids])
        of_rows = [invocations[int(number)] for number in self.ids]
        for row, invocation in enumerate(of_rows):
            tokens[row : row + 1] = planted(tokens[row : row + 1], invocation, row)
        self.feeds = {**self.feeds, starts.ids: tokens}
        self.starts = starts.within(self.feeds, of_rows)

    def expected_rows(self) -> dict[str, Array]:
        """Join the reference's outputs of all rows, in the order of the batch."""
        return {
            name: np.concatenate([self.expected[row][name] for row in range(len(self.ids))])
            for name in self.expected[0]
        }


def _row_count(feeds: Named, rowed: Sequence[str]) -> int:
    """Return the number of rows of a batch."""
    return next(int(feeds[name].shape[0]) for name in rowed if name in feeds)


def _run_alone(
    reference: Reference,
    batch: MixedBatch,
    row: int,
    adapter: Adapter | None,
    rowed: Sequence[str],
    evaluate: Callable[[Adapter], Adapter],
) -> None:
    """Run one row of a batch, given twice, in the reference with its adapter; store the outputs."""
    weight = 1.0 if batch.weights is None else float(batch.weights[row])
    if adapter and weight != 1.0:
        adapter = evaluate(adapter).weighted(weight)
    feeds: dict[str, Array] = {}
    for name, values in batch.feeds.items():
        if name in rowed:
            values = np.repeat(values[row : row + 1], 2, axis=0)
        feeds[name] = values
    outputs = reference.run(adapter)(feeds)
    batch.rows[row] = (adapter, feeds)
    batch.expected[row] = {name: value[:1] for name, value in outputs.items()}


def _compare_rows(
    run: Run,
    rerun: FileRerun | None,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    batch: MixedBatch,
) -> Parity:
    """Compare the outputs of a mixed batch with the outputs of each row alone.

    Raises:
        NoEffectError: It differs; the message names the row that differs most.
    """
    names = ["", *adapters]
    # all rows at once: what one row rounds by may be large beside its own numbers
    expected = batch.expected_rows()
    adapters_of_rows = [adapters[names[i]] if i else None for i in set(batch.ids)]
    gates = gates_of(expected, reference.ceiling, partial(reference.run(None), batch.feeds))
    own = partial(_own_errors, reference, adapters_of_rows)
    choose = partial(_choices_of_rows, reference, batch.rows)
    parity, _ = compared(
        run, rerun, batch.graph_feeds, expected, gates, own, choose, of="mixed batch"
    )
    if not parity.ok:
        ours = batch.outputs[parity.output]
        theirs = expected[parity.output]
        differences = [rel(ours[row], theirs[row]) for row in range(len(batch.ids))]
        row = int(np.argmax(differences))
        i = batch.ids[row]
        whose = f"{names[i] or 'the base'!r} (id {i})"
        demand(
            [parity],
            f"row {row} of a batch differs from a run of {whose} alone (the model may mix rows)",
        )
    return parity


def _choices_of_rows(
    reference: Reference, rows: Mapping[int, tuple[Adapter | None, Named]]
) -> Choices:
    """Join the reference's choices for every row, each run alone with its adapter."""
    of_rows = [reference.choices(*rows[row]) for row in sorted(rows)]
    values = _first_rows([choices.values for choices in of_rows])
    outputs = _first_rows([choices.outputs for choices in of_rows])
    among = {name: floats for name, floats in of_rows[0].among.items() if name in values}
    return Choices(values, among, outputs, lambda _: [])


def _first_rows(runs: Sequence[Named]) -> dict[str, Array]:
    """Join the first row of each run; leave out outputs that have no axis."""
    return {
        name: np.concatenate([values[name][:1] for values in runs])
        for name in runs[0]
        if runs[0][name].ndim
    }


def _own_errors(
    reference: Reference, adapters: Sequence[Adapter | None]
) -> Iterator[Mapping[str, float]]:
    """Yield the rounding error of each output, the largest so far over all these adapters."""
    largest_errors: dict[str, float] = {}
    for adapter in adapters:
        for errors in reference.own_errors(adapter):
            for name, error in errors.items():
                largest_errors[name] = max(error, largest_errors.get(name, 0.0))
            yield largest_errors


def _together(
    run: Run,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    rowed: Sequence[str],
    evaluate: Callable[[Adapter], Adapter],
    *,
    scales: bool,
) -> Iterator[Parity]:
    """Compare batches of one id each, and one mixed batch with the same batch in reverse order.

    For models whose activations have one range over all rows: a row alone is another row there.
    """
    feeds = reference.feeds((4, SIZES[0][1]))
    n_rows = _row_count(feeds, rowed)
    weight = 0.75 if scales else 1.0
    shapes = {name: value.shape for name, value in feeds.items()}

    def with_ids(values: Named, ids: Array) -> dict[str, Array]:
        graph_feeds = {**values, IDS: ids}
        if scales:
            graph_feeds[SCALES] = np.full(n_rows, weight, np.float32)
        return graph_feeds

    ids = np.arange(n_rows, dtype=np.int64) % (len(adapters) + 1)
    reversed_feeds = {
        name: value[::-1].copy() if name in rowed else value for name, value in feeds.items()
    }
    reversed_outputs = run(with_ids(reversed_feeds, ids[::-1].copy()))
    turned_back = {name: value[::-1] for name, value in reversed_outputs.items()}

    results: list[tuple[str, Adapter | None, Named]] = [("mixed rows", None, turned_back)]
    expected: list[Named] = [run(with_ids(feeds, ids))]
    for i, (name, adapter) in enumerate({"the base": None, **adapters}.items()):
        if adapter and scales:
            adapter = evaluate(adapter).weighted(weight)
        outputs = run(with_ids(feeds, np.full(n_rows, i, np.int64)))
        results.append((name, adapter, outputs))
        expected.append(reference.run(adapter)(feeds))

    for (name, adapter, ours), theirs in zip(results, expected, strict=True):
        own = partial(reference.own_errors, adapter)
        gates = gates_of(theirs, reference.ceiling)
        parity = compare_fairly(ours, theirs, shapes, gates, own, of=name)
        demand([parity], "a batch differs")
        yield parity


def _batches(
    reference: Reference, count: int, rowed: Sequence[str], longer: int = 0
) -> Iterator[tuple[dict[str, Array], Array]]:
    """Yield (inputs, ids) until every id had a row and one id had two; then batches of few ids.

    Rows of tokens are longer by `longer`.
    """
    lengths = [size[1] for size in reference.inputs.checks if isinstance(size, tuple)]
    order = np.random.default_rng(0).permutation(count + 1)
    waiting_ids = [*order.tolist(), int(order[-1]) or 1, 0]
    number = 0
    while waiting_ids or (not reference.arrays and number < len(lengths)):
        n_rows = min(max(len(waiting_ids), 4), AT_ONCE)
        feeds = reference.feeds((n_rows, lengths[number % len(lengths)] + longer), number)
        n_rows = _row_count(feeds, rowed)  # a user's inputs have rows of their own
        ids = waiting_ids[:n_rows]
        waiting_ids = waiting_ids[n_rows:]
        n_free = n_rows - len(ids)
        ids += [int(order[(number + j) % len(order)]) for j in range(n_free)]
        number += 1
        yield feeds, np.array(ids, np.int64)

    last = int(order[order > 0][-1])
    for pattern in ((last, 0, 0, last), (last, last)):  # few adapters share one product
        feeds = reference.feeds((len(pattern), SIZES[0][1] + longer), number)
        n_rows = _row_count(feeds, rowed)
        ids = [pattern[j % len(pattern)] for j in range(n_rows)]
        yield feeds, np.array(ids, np.int64)
