"""What a rewritten model has to equal: the model as it was, alone or with an adapter in branches.

Of an .onnx file, run in ONNX Runtime, it is made here, without torch; parity.py has that of a
captured model. The branches' factors are inputs, so that adapters of the same keys and ranks share
one session. The rows of a batch graph are compared with it here, and the tensors of a merged file
with those of its base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import (
    CEILING,
    COARSE,
    EPSILON,
    Choice,
    Gate,
    Outputs,
    Parity,
    compare_fairly,
    demand,
    fills,
    gates_of,
    grow,
    narrow_gate,
    rel,
    shapes_of,
    sizes_text,
    wider_gates,
    without,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import LoraFxError, MistakeError, retold
from lora_fx.files.run_files import check_unchanged, scratch_folder
from lora_fx.files.stored_tensors import same_bytes
from lora_fx.inputs import OTHER_SIZES, SIZES, Extents, Inputs, Named, expect_input
from lora_fx.ir.graph import Role
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.ir.view import Cast
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.batch_inputs import SCALES
from lora_fx.onnx.discrete_choices import choosing_file
from lora_fx.onnx.graph.coded_weights import rounds_activations, shares_ranges
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.id_limits import highest
from lora_fx.onnx.load import load
from lora_fx.onnx.match import Matched
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session, tensors_by_name
from lora_fx.onnx.sigmoid_step import stepped_file
from lora_fx.onnx.signature import feeds_of_sizes, signature
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold, fold_rows
from lora_fx.passes.insert import Insert
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.targets.target import Target
from lora_fx.text import Json

STEP = 2.0**-8
"""One code of eight bits, of the range that they span."""
REWRITES = 1e-2
"""The most that the runtime's rewrites may move an output of a file that is right without them."""
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""{input: array} → {output: array}."""
Shown = Callable[[Outputs], dict[str, Array]]
"""Outputs → what is compared of them."""


class Rerun(Protocol):
    """Other ways to run what is compared with a reference."""

    def stepped(self) -> Iterator[Run]:
        """The same with its sigmoids off by what their kernel is exact to; none without any."""

    def plain(self) -> Run | None:
        """The same without the runtime's rewrites; None where there are none."""

    def choosing(self, choices: Choices) -> Run | None:
        """The same with the choices of the reference, and with the floats that they are among.

        Choices and floats have their names in the reference. A choice that is not the reference's,
        turned by rounding, stays the run's own. None where it makes none.
        """


@dataclass(frozen=True)
class Choices:
    """A run of a reference, and what it chose: what integers and booleans it made of floats.

    Attributes:
        values: The choices, by name.
        among: Choice → the names of the floats that it was made among.
        outputs: The outputs of the run, these floats with them.
        own: How far rounding moves what is shown of them where the choices stay.
    """

    values: Named
    among: Mapping[str, tuple[str, ...]]
    outputs: Outputs
    own: Callable[[Shown], Iterable[Mapping[str, float]]]

    def named(self) -> dict[str, Choice]:
        """The choices, each with its floats."""
        return {
            name: Choice(value, {n: self.outputs[n] for n in self.among[name] if n in self.outputs})
            for name, value in self.values.items()
        }


@dataclass(frozen=True)
class FileRerun:
    """See Rerun: of an .onnx file.

    Attributes:
        path: The file.
        provider: As in open_session.
        also: Adds to the inputs what the file takes beside them.
        stored: Arrays in the place of initialisers, in mode load.
    """

    path: Path
    provider: str
    also: Callable[[Named], Named] = dict
    stored: Mapping[str, Array] = field(default_factory=dict)

    def stepped(self) -> Iterator[Run]:
        """See Rerun."""
        for seed in (None, *SEEDS):
            session = stepped_file(self.path, self.provider, seed, self.stored)
            if session is None:
                return
            yield partial(self._run, session)

    def _run(self, session: RuntimeSession, feeds: Named) -> dict[str, Array]:
        return session.run(self.also(feeds))

    def plain(self) -> Run:
        """See Rerun."""
        stored = self.stored or None
        session = open_session(self.path, self.provider, rewrites=False, external=stored)
        return partial(self._run, session)

    def choosing(self, choices: Choices) -> Run | None:
        """See Rerun."""
        file = choosing_file(self.path, self.provider, self.stored)
        if file is None:
            return None
        others = choices.named()

        def run(feeds: Named) -> dict[str, Array]:
            feeds = self.also(feeds)
            if not file.shared_choices:
                file.follow(feeds, others)
            made = file.run(feeds, file.chosen(others))
            shapes = {name: choices.outputs[name].shape for name in file.floats}
            floats = {name: made[own].reshape(shapes[name]) for name, own in file.floats.items()}
            chosen = {name: choices.values[name] for name in file.shared_choices.values()}
            return {**file.outputs(made), **floats, **chosen}

        return run


class Reference(Protocol):
    """A model whose graph was not rewritten: in torch, or a file in ONNX Runtime.

    Attributes:
        ceiling: The widest gate that rounding can ask for.
        mixes: True where activations of a whole batch share a range, so that no row is alone.
    """

    ceiling: float
    mixes: bool

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What sizes have to satisfy, by the names of ONNX inputs."""

    @property
    def inputs(self) -> Inputs:
        """The signature, and the sizes of every check."""

    @property
    def arrays(self) -> Named | None:
        """A user's inputs by name, where some are given: they are of one size."""

    def details(self) -> Json:
        """`ranges[]`, and `unproven[]`: sizes at which nothing was compared."""

    def guards(self) -> tuple[Condition, ...]:
        """The conditions outside which a file of this model may be another model."""

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Inputs by their ONNX names, symbols at (batch, other); a user's own where given."""

    def run(self, adapter: Adapter | None) -> Run:
        """{input: array} → {output: array}, with an adapter's branches."""

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Per output, how far rounding alone moves it: the largest so far, run by run."""

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """What a run with an adapter's branches chooses."""

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """Compare at every size.

        Args:
            run: What has to equal this.
            adapter: The adapter of both.
            of: The word for it in the report.
            rerun: Other ways to run it.
        """


SEEDS = (0, 1, 2)
"""Of the inputs, and of the moves of weights, by which a model's rounding is told."""


def spread(
    outputs: Outputs, run: Run, plain: Run | None, feeds: Named
) -> Iterator[dict[str, float]]:
    """Per output, how far a runtime's own rounding moves it: the largest so far, run by run.

    ONNX Runtime folds batch norms into convolutions, which rounds their weights once more. That is
    seen where it rewrites nothing, and other rounding where every float of the inputs is moved by
    half a unit of its last place.

    Args:
        outputs: What was compared.
        run: What gave it.
        plain: The same without the runtime's rewrites.
        feeds: The inputs that it was compared at.
    """
    worst: dict[str, float] = {}
    if plain is not None:
        yield grow(worst, plain(feeds), outputs)
    if not any("float" in value.dtype.name for value in feeds.values()):
        return
    for seed in SEEDS:
        moved = nearby_feeds(feeds, seed)
        for other in (run, plain) if plain is not None else (run,):
            yield grow(worst, other(moved), outputs)


def compared(
    run: Run,
    rerun: Rerun | None,
    feeds: Named,
    expected: Outputs,
    gates: Mapping[str, Gate],
    own: Callable[[], Iterable[Mapping[str, float]]],
    choose: Callable[[], Choices],
    *,
    of: str,
) -> tuple[Parity, str]:
    """The comparison of a run with what it has to give, and what has to be said of it.

    1. A file that is too far off, and is not without the runtime's rewrites, is right: the
       comparison is the one without them.
    2. Where outputs depend on choices, both make those of the reference, and what they are made
       among is compared as well.
    3. A turned choice in a measure of rounding takes the widest gate, which a wrong adapter may
       pass: what needs it is compared with the choices of the reference, where those stay.

    Args:
        run: What is compared.
        rerun: Other ways to run it.
        feeds: The inputs, which `expected` was computed from.
        expected: The outputs of the reference.
        gates: See compare_fairly.
        own: See compare_fairly: the rounding of the reference.
        choose: Runs the reference for its choices.
        of: A word for the report.
    """
    shapes = shapes_of(feeds)
    measured: dict[str, float] = {}

    def rounding() -> Iterator[Mapping[str, float]]:
        if rerun is None:
            yield from either(spread(made, run, None, feeds), own())
            return
        runtime = spread(made, run, rerun.plain(), feeds)
        for errors in either(either(runtime, own()), _of_steps(made, rerun, feeds)):
            measured.update(errors)
            yield errors

    try:
        made = run(feeds)
    except LoraFxError as e:
        raise LoraFxError(e.message, OTHER_SIZES, exit_code=e.exit_code) from e
    found = compare_fairly(made, expected, shapes, gates, rounding, of=of)
    if rerun is None or (found.ok and not _needs_most(made, expected, gates, measured)):
        return found, ""
    plain = rerun.plain() if found.rel <= REWRITES and not found.ok else None
    if plain is not None:
        exact = compare_fairly(plain(feeds), expected, shapes, gates, own, of=of)
        if exact.ok:
            moved = f"ONNX Runtime's own rewrites move {found.output!r} by {found.rel:.1e}"
            return exact, f"{moved} of its largest number; it was compared without them"
    choices = choose()
    choosing = rerun.choosing(choices) if choices.values else None
    if choosing is None:
        return found, ""
    alike = _with_choices(choosing, choices, feeds, gates, of)
    if found.ok:
        return alike, ""
    if not alike.ok:
        return found, ""
    told = f"rounding turns a choice among near-equal numbers that {found.output!r} depends on"
    return alike, f"{told}; both were compared with the same choices, and what these are among"


def _needs_most(
    ours: Outputs, expected: Outputs, gates: Mapping[str, Gate], rounding: Mapping[str, float]
) -> bool:
    """Whether an output passes by nothing but the widest gate that rounding can ask for."""
    wider = wider_gates(gates, rounding)
    widest = {n for n, gate in gates.items() if gate.first < gate.most <= wider[n]}
    return any(rel(ours[n], expected[n]) > gates[n].first for n in widest)


def _of_steps(outputs: Outputs, rerun: Rerun, feeds: Named) -> Iterator[Mapping[str, float]]:
    """Per output, how far a step of each sigmoid moves it: the largest so far, run by run."""
    worst: dict[str, float] = {}
    for run in rerun.stepped():
        yield grow(worst, run(feeds), outputs)


def _with_choices(
    run: Run, choices: Choices, feeds: Named, gates: Mapping[str, Gate], of: str
) -> Parity:
    """The comparison of a run that makes the reference's choices, and of what they are among."""
    made = run(feeds)
    expected = {n: v for n, v in choices.outputs.items() if n in made}
    scores = {n for floats in choices.among.values() for n in floats}
    masked = {n: fills(made[n], v) for n, v in expected.items() if n in scores}

    def shown(outputs: Outputs) -> dict[str, Array]:
        """What is compared of outputs, with 0 where scores have the number of a mask.

        A run on moved inputs may share more choices with the reference, and so more floats.
        """
        compared = {n: v for n, v in outputs.items() if n in expected}
        return {n: without(v, masked[n]) if n in masked else v for n, v in compared.items()}

    ours, theirs = shown(made), shown(expected)
    usual = gates_of(theirs)
    limits = {n: gates.get(n, usual[n]) for n in theirs}

    def rounding() -> Iterator[Mapping[str, float]]:
        moved = spread(ours, lambda feeds: shown(run(feeds)), None, feeds)
        return either(moved, choices.own(shown))

    return compare_fairly(ours, theirs, shapes_of(feeds), limits, rounding, of=of)


def nearby_feeds(feeds: Named, seed: int) -> dict[str, Array]:
    """Inputs with their floats moved by up to a unit of their last place, by lot."""
    rng = np.random.default_rng(seed)

    def moved(value: Array) -> Array:
        if "float" not in value.dtype.name:
            return value
        signs = rng.integers(0, 2, value.shape) * 2 - 1
        half = float(finfo(value.dtype.name).eps) / 2
        return (value.astype(np.float64) * (1 + signs * half)).astype(value.dtype)

    return {name: moved(value) for name, value in feeds.items()}


def either(
    first: Iterable[Mapping[str, float]], then: Iterable[Mapping[str, float]]
) -> Iterator[dict[str, float]]:
    """What two measures of rounding tell, one after the other: the larger of both."""
    told: dict[str, float] = {}
    for measure in (first, then):
        for errors in measure:
            told |= {n: max(e, told.get(n, 0.0)) for n, e in errors.items()}
            yield told


@dataclass(eq=False)
class OnnxReference:
    """See Reference; made by `reference_of`.

    Attributes:
        graph: The base; not changed. Without it no adapter can be added.
        source: Its file.
        provider: auto, cpu or cuda.
        folder: Where graphs with branches are written.
        arrays: A user's inputs by name, instead of sampled ones.
    """

    graph: OnnxGraph | None
    source: Path
    provider: str
    folder: Path
    arrays: Named

    def __post_init__(self) -> None:
        """Open the file; raises for an array that is no input of it."""
        graph = self.graph
        self.session = session = open_session(self.source, self.provider)
        found = {} if graph is None else highest(graph)
        said = signature(session)
        specs = tuple(replace(s, high=found.get(s.name)) for s in said.specs)
        self.inputs = replace(said, specs=specs)
        for name in self.arrays:
            expect_input(name, self.inputs.names)
        rough = graph is not None and rounds_activations(graph.model)
        self._step, self.ceiling = (STEP, COARSE) if rough else (0.0, CEILING)
        self.mixes = graph is not None and shares_ranges(graph.model)
        self._names = [o.name for o in session.session.get_outputs()]
        self._made: dict[tuple[object, ...], Path] = {}
        self._unproven: list[Json] = []
        self._open: dict[tuple[Path | None, bool], RuntimeSession] = {(None, True): session}

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See Reference."""
        return self.inputs.conditions

    def details(self) -> Json:
        """See Reference; what the file does not take is an error, and no row of unproven."""
        ranges = [c.to_json() for c in self.conditions if not self.inputs.implied(c)]
        return {"ranges": ranges, "unproven": self._unproven}

    def guards(self) -> tuple[Condition, ...]:
        """None: a file of ours has its guards already, and of others nothing is known."""
        return ()

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """See Reference."""
        return {**self.inputs.sample(size, seed), **self.arrays}

    def sizes(self) -> Iterator[dict[str, Array]]:
        """Feeds of every size that differs; one where the user gave arrays."""
        return feeds_of_sizes(self.inputs, self.arrays)

    def run(self, adapter: Adapter | None) -> Run:
        """See Reference."""
        return partial(self._run, adapter, True)

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """How far the runtime's own rewrites, and a fold's rounding, move the outputs.

        A fold moves every weight by half a unit of its last place, at most. Where activations are
        rounded to codes of eight bits, a difference of one part in 1e7 moves some by a whole step.
        """
        worst: dict[str, float] = dict.fromkeys(self._names, self._step)
        yield worst
        updates = {} if adapter is None else adapter.lowrank
        path = self._path(updates, moved=True) if updates else None
        moved = open_session(path, self.session.provider) if path else self.session
        for feeds in self.sizes():
            plain, fused = (self._run(adapter, level, feeds) for level in (False, True))
            feeds = {**feeds, **_factors(updates)}
            for values in (plain, self._outputs(moved, feeds)):
                for name in (n for n, v in fused.items() if v.any()):
                    found = max(worst.get(name, self._step), rel(values[name], fused[name]))
                    worst[name] = found
                yield worst

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """See Reference."""
        results = []
        own = partial(self.own_errors, adapter)
        for feeds in self.sizes():
            expected, shapes = self._run(adapter, True, feeds), shapes_of(feeds)
            gates = self._gates(adapter, expected, feeds)
            with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
                choose = partial(self.choices, adapter, feeds)
                found, said = compared(run, rerun, feeds, expected, gates, own, choose, of=of)
            results.append(found)
            if said:
                row = {"sizes": {k: list(v) for k, v in shapes.items()}, "reason": said}
                self._unproven.append(row)
        return results

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """The choices of the file with an adapter's branches."""
        updates = {} if adapter is None else adapter.lowrank
        path = self._path(updates) if updates else self.source
        file = choosing_file(path, self.session.provider, {})
        if file is None:
            return Choices({}, {}, {}, lambda _: [])
        factors = _factors(updates)
        made = file.run({**feeds, **factors})
        values = {name: made[name] for name in file.choices}

        def chosen_again(feeds: Named) -> dict[str, Array]:
            return {**file.run({**feeds, **factors}, values), **values}

        def own(shown: Shown) -> Iterable[Mapping[str, float]]:
            exact = shown(chosen_again(feeds))
            return spread(exact, lambda feeds: shown(chosen_again(feeds)), None, feeds)

        return Choices(values, file.choices, made, own)

    def _gates(
        self, adapter: Adapter | None, expected: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> dict[str, Gate]:
        """The base gates, wider where an adapted weight is stored in a narrower dtype."""
        if adapter is None or self.graph is None:
            return gates_of(expected, self.ceiling)
        gates = gates_of(expected, self.ceiling, partial(self._run, None, True, feeds))
        targets = self._targets(adapter.lowrank)
        casts = (v for t in targets for s in t.sites for v in s.view.steps if isinstance(v, Cast))
        dtypes = {*(t.parameter.dtype for t in targets), *(v.dtype for v in casts)}
        eps = max(EPSILON.get(dtype, 0.0) for dtype in dtypes)
        base = self._run(None, True, feeds) if eps else {}
        return {n: narrow_gate(g.first, eps, base[n], expected[n]) if eps else g
                for n, g in gates.items()}  # fmt: skip

    def idle(self, adapter: Adapter) -> list[str]:
        """Keys whose update, alone, changes no output."""
        feeds = self.feeds(SIZES[0])
        session = self._session(adapter.lowrank, True)
        base = self._outputs(session, feeds)
        result = []
        for key, u in adapter.lowrank.items():
            changed = self._outputs(session, {**feeds, **_factors({key: u})})
            if all(np.array_equal(changed[n], base[n]) for n in base):
                result.append(key)
        return result

    def _run(
        self, adapter: Adapter | None, rewrites: bool, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        updates = {} if adapter is None else adapter.lowrank
        return self._outputs(self._session(updates, rewrites), {**feeds, **_factors(updates)})

    def _outputs(self, session: RuntimeSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
        sizes = {n: v.shape for n, v in feeds.items() if n in self.inputs.names}
        where = f"the model does not run at {sizes_text(sizes)}"
        with retold(where, OTHER_SIZES, most=160):
            values = session.session.run(self._names, dict(feeds))
        return tensors_by_name(self._names, values)

    def _session(self, updates: Updates, rewrites: bool) -> RuntimeSession:
        path = self._path(updates) if updates else None
        known = self._open.get((path, rewrites))
        if known is None:
            known = open_session(path or self.source, self.session.provider, rewrites=rewrites)
            self._open[path, rewrites] = known
        return known

    def _targets(self, keys: Iterable[str]) -> list[Target]:
        assert self.graph is not None
        found = find(self.graph)
        return [found[k] for k in keys]

    def _path(self, updates: Updates, *, moved: bool = False) -> Path:
        """The file of the graph with branches for these keys and ranks, its weights as rounded."""
        rows = (
            (k, u.rank, u.use, str(u.layout), tuple(variant_of(u).beside(u)))
            for k, u in updates.items()
        )
        key = (moved, *rows)
        if key not in self._made:
            assert self.graph is not None
            graph = self.graph.clone()
            zeros = {
                k: replace(u, a=np.zeros_like(u.a), b=np.zeros_like(u.b), alpha=u.alpha / u.scale)
                for k, u in updates.items()
            }
            Insert(zeros, role=Role.OPTIONAL_INPUT)(graph)
            graph.model.ir_version = max(graph.model.ir_version, 4)
            for name in {t.parameter.name for t in self._targets(updates)} if moved else ():
                value = graph.read(name)
                up = np.random.default_rng(0).integers(0, 2, value.shape) * 2 - 1
                if "float" in value.dtype.name:
                    eps = float(finfo(value.dtype.name).eps)
                    graph.store(name, value.astype(np.float64) * (1 + up * (eps / 2)))
            path = self.folder / f"branches-{len(self._made)}.onnx"
            save(graph.model, path)
            self._made[key] = path
        return self._made[key]


def _factors(updates: Updates) -> dict[str, Array]:
    """The inputs of branches that hold a and b as they are, with the scale in b."""
    values: dict[str, Array] = {}
    for key, update in updates.items():
        scaled = replace(update, b=update.b * np.float32(update.scale))
        values |= {slot.name: slot.value for slot in slots_of(key, scaled, split=False)}
    return values


@contextlib.contextmanager
def reference_of(
    source: Path, graph: OnnxGraph | None, provider: str, arrays: Named | None
) -> Iterator[OnnxReference]:
    """The reference of a file, and room for its variants while the block runs."""
    with scratch_folder() as folder:
        yield OnnxReference(graph, source, provider, Path(folder), arrays or {})


# Rows of a batch graph: every row of mixed batches equals its adapter alone.
#
# Every adapter and the base run unfolded, in the reference, on the rows that they got in shuffled,
# mixed batches; an id is repeated. The reference runs on the row itself, twice over, so that
# nothing of the other rows is in it.


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


# A merged .onnx file, tensor by tensor: nothing is run.
#
# What no update touches has the base's bytes, and rows of everything else are computed again in
# fp64.


PROOF_ROWS = 4
"""Rows of every touched tensor that are computed again."""


def prove_merge(
    temporary: Path,
    target: Path,
    before: Named,
    changed: set[str],
    found: Found,
    matched: Matched,
    fold: Fold,
) -> OnnxGraph:
    """Open what was written, and compare it with what it has to be."""
    written = OnnxGraph(load(temporary))
    for name in before:
        if name not in changed and not same_bytes(written.reader(name)(), before[name]()):
            check_unchanged()  # a base that is another one now has other numbers
            raise LoraFxError(f"{target}: not written: {name!r} is not the base's", "a full disk?")
    for name, wrong in _wrong_rows(written, before, found, fold):
        check_unchanged()
        raise LoraFxError(
            f"{target}: not written: {name!r} is off by {wrong:.2e}",
            "this is a mistake of lora-fx: please report it",
        )
    for name, value in matched.whole.items():
        if not same_bytes(written.reader(name)(), value.astype(before[name]().dtype)):
            raise MistakeError(f"{target}: not written: {name!r} is not the adapter's")
    return written


def _wrong_rows(
    written: OnnxGraph, before: Named, found: Found, fold: Fold
) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng()
    idents = {f"{f.parameter}|{'|'.join(f.keys)}": f for f in fold.report}
    for name in dict.fromkeys(fold.applied.values()):  # parts of one tensor lie in one constant
        parts = [idents[i] for i, stored in fold.applied.items() if stored == name]
        if (moved := fold.moved.get(parts[0].keys[0])) is not None:
            yield from _wrong_zeros(written, name, *moved)
            continue
        pairs = [(found[k], fold.updates[k]) for f in parts for k in f.keys]
        base, got = before[parts[0].parameter](), written.reader(name)()
        if base.ndim != 2:
            rows = slice(None)
        else:
            first = int(rng.integers(0, max(1, base.shape[0] - PROOF_ROWS + 1)))
            rows = slice(first, min(base.shape[0], first + PROOF_ROWS))
        exact = fold_rows(base, pairs, rows)
        eps = EPSILON.get(base.dtype.name, 8 * 2.0**-23 if base.dtype == np.float32 else 2.0**-40)
        size = np.abs(exact).max(initial=0.0) + np.abs(base[rows].astype(np.float64)).max(initial=0)
        gap = float(np.abs(got[rows].astype(np.float64) - exact).max(initial=0.0))
        if not gap <= eps * size:
            yield name, gap


def _wrong_zeros(
    written: OnnxGraph, name: str, old: ZeroPoints, delta: Array
) -> Iterator[tuple[str, float]]:
    """Zero points of codes that are not the old ones less Δ/scale."""
    zero = written.reader(name)().astype(np.float64) if delta.any() else old.zero
    size = (np.abs(zero) + np.abs(old.zero.astype(np.float64))) * np.abs(old.scale)
    gap = np.abs(old.change(zero) - delta)
    if not (gap <= EPSILON.get(old.scale.dtype.name, 2.0**-23) * size).all():
        yield name, float(gap.max())
