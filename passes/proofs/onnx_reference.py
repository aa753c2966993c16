"""The reference for files made from an .onnx file: this file itself, run in ONNX Runtime.

An adapter's branches stand beside the file's own products. Their factors are inputs, so that
adapters of the same keys and ranks share one session.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import LowRank, Updates, draw
from lora_fx.adapter.starts import matrix
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import (
    CEILING,
    COARSE,
    EPSILON,
    Gate,
    Parity,
    gates_of,
    grow,
    narrow_gate,
    rel,
    shapes_of,
    sizes_text,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import retold
from lora_fx.files.run_files import scratch_folder
from lora_fx.inputs import OTHER_SIZES, SIZES, Extents, Named, expect_input
from lora_fx.ir.graph import Role
from lora_fx.ir.view import Cast
from lora_fx.onnx.discrete_choices import choosing_file
from lora_fx.onnx.graph.coded_weights import dtypes_of_products, rounds_activations, shares_ranges
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.id_limits import highest
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, few_runs, open_session, tensors_by_name
from lora_fx.onnx.sigmoid_step import stepped_file
from lora_fx.onnx.signature import feeds_of_sizes, signature
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.reference import SEEDS, Choices, Rerun, Run, Shown
from lora_fx.passes.proofs.run_comparison import compared, spread
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use
from lora_fx.targets.target import Target
from lora_fx.text import Json

STEP = 2.0**-8
"""One step of an 8-bit code, as a share of the range of codes."""


@dataclass(frozen=True)
class FileRerun:
    """The Rerun of an .onnx file.

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
        """Implement `Rerun.stepped`."""
        for seed in (None, *SEEDS):
            session = stepped_file(self.path, self.provider, seed, self.stored)
            if session is None:
                return
            yield partial(self._run, session)

    def _run(self, session: RuntimeSession, feeds: Named) -> dict[str, Array]:
        return session.run(self.also(feeds))

    def plain(self) -> Run:
        """Implement `Rerun.plain`."""
        stored = self.stored or None
        session = open_session(self.path, self.provider, rewrites=False, external=stored)
        return partial(self._run, session)

    def choosing(self, choices: Choices) -> Run | None:
        """Implement `Rerun.choosing`."""
        file = choosing_file(self.path, self.provider, self.stored)
        if file is None:
            return None
        reference_choices = choices.named()

        def run(feeds: Named) -> dict[str, Array]:
            feeds = self.also(feeds)
            if not file.shared_choices:
                file.follow(feeds, reference_choices)
            values = file.run(feeds, file.chosen(reference_choices))
            floats: dict[str, Array] = {}
            for name, name_in_file in file.floats.items():
                floats[name] = values[name_in_file].reshape(choices.outputs[name].shape)
            shared = {name: choices.values[name] for name in file.shared_choices.values()}
            return {**file.outputs(values), **floats, **shared}

        return run


@dataclass(eq=False)
class OnnxReference:
    """The Reference of an .onnx file, made by `reference_of`.

    Attributes:
        graph: The base; not changed. Without it no adapter can be added.
        source: Its file.
        provider: auto, cpu, cuda or webgpu.
        folder: Where graphs with branches are written.
        arrays: A user's inputs by name, instead of sampled ones.
    """

    graph: OnnxGraph | None
    source: Path
    provider: str
    folder: Path
    arrays: Named

    def __post_init__(self) -> None:
        """Open the file, and raise for an array that is not an input of the file."""
        graph = self.graph
        self.session = open_session(self.source, self.provider)
        self.inputs = signature(self.session)
        if graph is not None:
            highest_ids = highest(graph)
            specs = tuple(
                replace(spec, high=highest_ids.get(spec.name)) for spec in self.inputs.specs
            )
            self.inputs = replace(self.inputs, specs=specs)
        for name in self.arrays:
            expect_input(name, self.inputs.names)

        self._step = 0.0
        self.ceiling = CEILING
        if graph is not None and rounds_activations(graph.model):
            self._step = STEP
            self.ceiling = COARSE
        # ONNX Runtime's CPU computes a product with codes in float16 where its neighbours are, and
        # in float32 elsewhere, so that a branch beside it changes how it is rounded
        dtypes = set() if graph is None else dtypes_of_products(graph.model)
        epsilon = max((EPSILON.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        self._branches_round = epsilon > 0
        self.ceiling = max(self.ceiling, 8 * epsilon)
        self.mixes = graph is not None and shares_ranges(graph.model)
        self._names = [output.name for output in self.session.session.get_outputs()]
        self._paths: dict[tuple[object, ...], Path] = {}
        self._unproven: list[Json] = []
        self._sessions: dict[tuple[Path | None, bool], RuntimeSession] = {
            (None, True): self.session
        }

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Implement `Reference.conditions`."""
        return self.inputs.conditions

    def details(self) -> Json:
        """Implement `Reference.details`; a size that the file refuses is an error, not unproven."""
        ranges = [
            condition.to_json()
            for condition in self.conditions
            if not self.inputs.implied(condition)
        ]
        return {"ranges": ranges, "unproven": self._unproven}

    def guards(self) -> tuple[Condition, ...]:
        """Return no guards: our files already have guards, and other files tell nothing."""
        return ()

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Implement `Reference.feeds`."""
        return {**self.inputs.sample(size, seed), **self.arrays}

    def sizes(self) -> Iterator[dict[str, Array]]:
        """Yield inputs at every distinct size; once if the user gave arrays."""
        return feeds_of_sizes(self.inputs, self.arrays)

    ids = ""

    def invoked(self, feeds: Named, adapter: Adapter | None) -> dict[str, Array]:
        """Implement `Reference.invoked`: an .onnx file takes no aLoRA."""
        return dict(feeds)

    def run(self, adapter: Adapter | None) -> Run:
        """Implement `Reference.run`."""
        return partial(self._run, adapter, True)

    def drawn(self, seed: int) -> dict[str, Array]:
        """Implement `Reference.drawn`."""
        return self.inputs.sample(SIZES[0], seed)

    def varied(self) -> OnnxReference:
        """Implement `Reference.varied`: adapters of the same keys and ranks share a session."""
        return self

    def narrow(self, adapter: Adapter | None, feeds: Named) -> None:
        """Return None: the runtime has no other precision for a file."""

    def base_facts(self) -> Json:
        """Implement `Reference.base_facts`, by the bytes of the file without its data file."""
        with self.source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": self.source.name, "sha256": digest}

    def targets(self) -> Found:
        """Implement `Reference.targets`."""
        assert self.graph is not None
        return find(self.graph)

    def weight(self, key: str) -> Array:
        """Implement `Reference.weight`."""
        assert self.graph is not None
        target = self.targets()[key]
        return matrix(target, self.graph.read(target.parameter.name))

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Yield how far outputs move by the runtime's rewrites and by the rounding of a fold.

        A fold moves every weight by half a unit of its last place, at most. Where activations are
        rounded to codes of eight bits, a difference of one part in 1e7 moves some by a whole step.
        Where branches change how products are rounded, so do branches that add zeros.
        """
        largest_errors: dict[str, float] = dict.fromkeys(self._names, self._step)
        yield largest_errors
        if adapter is None and self._branches_round:
            idle = self._idle_branches()
            session = self._session(idle, True)
            for feeds in self.sizes():
                outputs = self._outputs(session, {**feeds, **_factors(idle)})
                yield grow(largest_errors, outputs, self._run(None, True, feeds))
        updates = {} if adapter is None else adapter.lowrank
        moved_session = self.session
        if updates:
            moved_session = open_session(self._path(updates, moved=True), self.session.provider)
        for feeds in self.sizes():
            plain = self._run(adapter, False, feeds)
            fused = self._run(adapter, True, feeds)
            moved = self._outputs(moved_session, {**feeds, **_factors(updates)})
            for values in (plain, moved):
                for name, value in fused.items():
                    if value.any():
                        error = rel(values[name], value)
                        largest_errors[name] = max(largest_errors.get(name, self._step), error)
                yield largest_errors

    def _idle_branches(self) -> Updates:
        """Return an update of rank 1 for each target of the default plan, which adds zeros."""
        assert self.graph is not None
        updates = {}
        for target in find(self.graph).targets:
            a, b = draw(target.key, target.layout, 1, 0)
            updates[target.key] = LowRank(a, b, 1.0, target.layout, use=own_use(target.key))
        return updates

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """Implement `Reference.prove`."""
        results = []
        own = partial(self.own_errors, adapter)
        for feeds in self.sizes():
            expected = self._run(adapter, True, feeds)
            shapes = shapes_of(feeds)
            gates = self._gates(adapter, expected, feeds)
            choose = partial(self.choices, adapter, feeds)
            with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
                parity, note = compared(run, rerun, feeds, expected, gates, own, choose, of=of)
            results.append(parity)
            if note:
                sizes = {name: list(shape) for name, shape in shapes.items()}
                self._unproven.append({"sizes": sizes, "reason": note})
        return results

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """Run the file with an adapter's branches, and return its choices."""
        updates = {} if adapter is None else adapter.lowrank
        path = self._path(updates) if updates else self.source
        file = choosing_file(path, self.session.provider, {})
        if file is None:
            return Choices({}, {}, {}, lambda _: [])

        factors = _factors(updates)
        outputs = file.run({**feeds, **factors})
        values = {name: outputs[name] for name in file.choices}

        def run_with_choices(feeds: Named) -> dict[str, Array]:
            return {**file.run({**feeds, **factors}, values), **values}

        def own(shown: Shown) -> Iterable[Mapping[str, float]]:
            exact = shown(run_with_choices(feeds))
            return spread(exact, lambda feeds: shown(run_with_choices(feeds)), None, feeds)

        return Choices(values, file.choices, outputs, own)

    def _gates(
        self, adapter: Adapter | None, expected: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> dict[str, Gate]:
        """Return the base's gates, wider if an adapted weight is stored in a narrower dtype."""
        if adapter is None or self.graph is None:
            return gates_of(expected, self.ceiling)
        gates = gates_of(expected, self.ceiling, partial(self._run, None, True, feeds))
        dtypes: set[str] = set()
        for target in self._targets(adapter.lowrank):
            dtypes |= _dtypes_of(target)
        eps = max(EPSILON.get(dtype, 0.0) for dtype in dtypes)
        if not eps:
            return gates
        base = self._run(None, True, feeds)
        return {
            name: narrow_gate(gate.first, eps, base[name], expected[name])
            for name, gate in gates.items()
        }

    def idle(self, adapter: Adapter) -> list[str]:
        """Return the keys whose update alone changes no output."""
        feeds = self.feeds(SIZES[0])
        session = self._session(adapter.lowrank, True)
        base = self._outputs(session, feeds)
        idle_keys = []
        for key, update in adapter.lowrank.items():
            outputs = self._outputs(session, {**feeds, **_factors({key: update})})
            if all(np.array_equal(outputs[name], value) for name, value in base.items()):
                idle_keys.append(key)
        return idle_keys

    def _run(
        self, adapter: Adapter | None, rewrites: bool, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run with an adapter's branches, with or without the runtime's graph rewrites."""
        updates = {} if adapter is None else adapter.lowrank
        return self._outputs(self._session(updates, rewrites), {**feeds, **_factors(updates)})

    def _outputs(self, session: RuntimeSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
        sizes = {name: value.shape for name, value in feeds.items() if name in self.inputs.names}
        where = f"the model does not run at {sizes_text(sizes)}"
        with retold(where, OTHER_SIZES, most=160):
            values = session.session.run(self._names, {**session.base_factors, **feeds})
        return tensors_by_name(self._names, values)

    def _session(self, updates: Updates, rewrites: bool) -> RuntimeSession:
        """Return the session with branches for these updates; it is opened once."""
        path = self._path(updates) if updates else None
        session = self._sessions.get((path, rewrites))
        if session is None:
            session = open_session(path or self.source, self.session.provider, rewrites=rewrites)
            self._sessions[path, rewrites] = session
        return session

    def _targets(self, keys: Iterable[str]) -> list[Target]:
        assert self.graph is not None
        targets = find(self.graph)
        return [targets[key] for key in keys]

    def _path(self, updates: Updates, *, moved: bool = False) -> Path:
        """Return a file of the graph with branches for these keys and ranks.

        Args:
            updates: The updates; files are kept by what does not change with their numbers.
            moved: Move the adapted weights by half a unit of their last place.
        """
        identity = (moved, *(_form_of(key, update) for key, update in updates.items()))
        if identity not in self._paths:
            path = self.folder / f"branches-{len(self._paths)}.onnx"
            save(self._branched(updates, moved).model, path)
            self._paths[identity] = path
        return self._paths[identity]

    def _branched(self, updates: Updates, moved: bool) -> OnnxGraph:
        """Return a copy of the graph with branches that read their factors from inputs."""
        assert self.graph is not None
        graph = self.graph.clone()
        zeros = {
            key: replace(
                update,
                a=np.zeros_like(update.a),
                b=np.zeros_like(update.b),
                alpha=update.alpha / update.scale,
            )
            for key, update in updates.items()
        }
        Insert(zeros, role=Role.OPTIONAL_INPUT)(graph)
        graph.model.ir_version = max(graph.model.ir_version, 4)
        if moved:
            for name in {target.parameter.name for target in self._targets(updates)}:
                _move(graph, name)
        return graph


def _move(graph: OnnxGraph, name: str) -> None:
    """Move a weight at random by up to a unit of its last place."""
    value = graph.read(name)
    if "float" not in value.dtype.name:
        return
    signs = np.random.default_rng(0).integers(0, 2, value.shape) * 2 - 1
    eps = float(finfo(value.dtype.name).eps)
    graph.store(name, value.astype(np.float64) * (1 + signs * (eps / 2)))


def _dtypes_of(target: Target) -> set[str]:
    """Return the dtypes in which a weight is stored and read."""
    dtypes = {target.parameter.dtype}
    for site in target.sites:
        dtypes |= {step.dtype for step in site.view.steps if isinstance(step, Cast)}
    return dtypes


def _form_of(key: str, update: LowRank) -> tuple[object, ...]:
    """Return the properties of an update that its branch in the graph depends on."""
    fields = tuple(variant_of(update).beside(update))
    return key, update.rank, update.use, str(update.layout), fields


def _factors(updates: Updates) -> dict[str, Array]:
    """Return the inputs of the branches: a, and b multiplied by the scale."""
    values: dict[str, Array] = {}
    for key, update in updates.items():
        scaled = replace(update, b=update.b * np.float32(update.scale))
        values |= {slot.name: slot.value for slot in slots_of(key, scaled, split=False)}
    return values


@contextlib.contextmanager
def reference_of(
    source: Path, graph: OnnxGraph | None, provider: str, arrays: Named | None
) -> Iterator[OnnxReference]:
    """Open a file as a reference, with a scratch folder for its variants while the block runs."""
    with scratch_folder() as folder, few_runs():
        yield OnnxReference(graph, source, provider, Path(folder), arrays or {})
