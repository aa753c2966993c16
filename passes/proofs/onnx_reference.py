"""An .onnx file in ONNX Runtime as the reference of what is made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import slots_of, variant_of
from lora_fx.compare import (
    CEILING,
    COARSE,
    EPSILON,
    Gate,
    Parity,
    gates_of,
    narrow_gate,
    rel,
    shapes_of,
    sizes_text,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import retold
from lora_fx.files.read import scratch_folder
from lora_fx.inputs import OTHER_SIZES, SIZES, Extents, Named, expect_input
from lora_fx.ir.graph import Role
from lora_fx.ir.view import Cast
from lora_fx.onnx.choices import choosing_file
from lora_fx.onnx.graph.graph import OnnxGraph, highest
from lora_fx.onnx.graph.ops import rounds_activations, shares_ranges
from lora_fx.onnx.save import save
from lora_fx.onnx.session import (
    RuntimeSession,
    feeds_of_sizes,
    open_session,
    signature,
    tensors_by_name,
)
from lora_fx.onnx.steps import stepped_file
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.reference import SEEDS, Choices, Rerun, Run, Shown
from lora_fx.passes.proofs.run_comparison import compared, spread
from lora_fx.progress import stage
from lora_fx.targets.target import Target
from lora_fx.text import Json

STEP = 2.0**-8
"""One code of eight bits, of the range that they span."""


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
            if not file.same:
                file.follow(feeds, others)
            made = file.run(feeds, file.chosen(others))
            shapes = {name: choices.outputs[name].shape for name in file.floats}
            floats = {name: made[own].reshape(shapes[name]) for name, own in file.floats.items()}
            chosen = {name: choices.values[name] for name in file.same.values()}
            return {**file.outputs(made), **floats, **chosen}

        return run


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
