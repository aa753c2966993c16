"""What a rewritten model has to equal: the model as it was, alone or with an adapter in branches.

Of an .onnx file, run in ONNX Runtime, it is made here, without torch; parity.py has that of a
captured model. The branches' factors are inputs, so that adapters of the same keys and ranks share
one session.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, slots_of
from lora_fx.compare import (
    CEILING,
    COARSE,
    EPSILON,
    Gate,
    Parity,
    compare_fairly,
    gates_of,
    narrow_gate,
    rel,
    shapes_of,
    sizes_text,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import LoraFxError, one_line
from lora_fx.inputs import SIZES, Extents, Inputs, Named
from lora_fx.ir.graph import Role
from lora_fx.ir.layout import Cast
from lora_fx.onnx.graph.graph import OnnxGraph, highest
from lora_fx.onnx.graph.ops import rounds_activations, shares_ranges
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, feeds_of_sizes, open_session, signature
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.progress import stage
from lora_fx.targets.target import Target
from lora_fx.text import Json

STEP = 2.0**-8
"""One code of eight bits, of the range that they span."""
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""{input: array} → {output: array}."""


class Reference(Protocol):
    """A model whose graph was not rewritten: in torch, or a file in ONNX Runtime."""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What sizes have to satisfy, by the names of ONNX inputs."""

    @property
    def inputs(self) -> Inputs:
        """The signature, and the sizes of every check."""

    def details(self) -> Json:
        """`ranges[]`, and `unproven[]`: sizes at which nothing was compared."""

    def guards(self) -> tuple[Condition, ...]:
        """The conditions outside which a file of this model may be another model."""

    @property
    def ceiling(self) -> float:
        """The widest gate that rounding can ask for."""

    @property
    def mixes(self) -> bool:
        """True where activations of a whole batch share a range, so that no row is alone."""

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Inputs by their ONNX names, symbols at (batch, other); a user's own where given."""

    def run(self, adapter: Adapter | None) -> Run:
        """{input: array} → {output: array}, with an adapter's branches."""

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Per output, how far rounding alone moves it: the largest so far, run by run."""

    def prove(self, run: Run, adapter: Adapter | None, of: str) -> list[Parity]:
        """Compare at every size; `of` is the word for it in the report."""


class OnnxReference:
    """See Reference; made by `reference_of`.

    Args:
        graph: The base; not changed. Without it no adapter can be added.
        source: Its file.
        provider: auto, cpu or cuda.
        folder: Where graphs with branches are written.
        arrays: A user's inputs by name, instead of sampled ones.
    """

    def __init__(
        self,
        graph: OnnxGraph | None,
        source: Path,
        provider: str,
        folder: Path,
        arrays: Named | None,
    ) -> None:
        self.graph, self.source, self.folder = graph, source, folder
        self.session = session = open_session(source, provider)
        self.arrays = dict(arrays or {})
        found = {} if graph is None else highest(graph)
        said = signature(session)
        specs = tuple(replace(s, high=found.get(s.name)) for s in said.specs)
        self.inputs = replace(said, specs=specs)
        for name in self.arrays:
            if name not in self.inputs.names:
                raise LoraFxError(
                    f"no input is named {name!r}", f"the inputs are {', '.join(self.inputs.names)}"
                )
        rough = graph is not None and rounds_activations(graph.model)
        self._step = STEP if rough else 0.0
        self._made: dict[Any, Path] = {}
        self._open: dict[tuple[Path | None, bool], RuntimeSession] = {(None, True): session}

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See Reference."""
        return self.inputs.conditions

    def details(self) -> Json:
        """See Reference; nothing is unproven, since what the file does not take is an error."""
        ranges = [c.to_json() for c in self.conditions if not self.inputs.implied(c)]
        return {"ranges": ranges, "unproven": []}

    def guards(self) -> tuple[Condition, ...]:
        """None: a file of ours has its guards already, and of others nothing is known."""
        return ()

    @property
    def ceiling(self) -> float:
        """See Reference."""
        return COARSE if self._step else CEILING

    @property
    def mixes(self) -> bool:
        """See Reference."""
        return self.graph is not None and shares_ranges(self.graph.model)

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
        worst: dict[str, float] = dict.fromkeys(self._outputs_of(), self._step)
        yield worst
        updates = {} if adapter is None else adapter.lowrank
        path = self._path(updates, moved=True) if updates else None
        moved = open_session(path, self.session.provider) if path else self.session
        for feeds in self.sizes():
            plain, fused = (self._run(adapter, level, feeds) for level in (False, True))
            feeds = {**feeds, **_factors(updates)}
            for values in (plain, self._outputs(moved, feeds)):
                for name in (n for n, v in fused.items() if v.any()):
                    worst[name] = max(worst[name], rel(values[name], fused[name]))
                yield worst

    def prove(self, run: Run, adapter: Adapter | None, of: str) -> list[Parity]:
        """See Reference."""
        results = []
        for feeds in self.sizes():
            expected, own = self._run(adapter, True, feeds), partial(self.own_errors, adapter)
            gates, shapes = self._gates(adapter, expected, feeds), shapes_of(feeds)
            with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
                results.append(compare_fairly(run(feeds), expected, shapes, gates, own, of=of))
        return results

    def _gates(
        self, adapter: Adapter | None, expected: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> dict[str, Gate]:
        """The base gates, wider where an adapted weight is stored in a narrower dtype."""
        gates = gates_of(expected, self.ceiling)
        if adapter is None or self.graph is None:
            return gates
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
        base = session.run(feeds)
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
        names = self._outputs_of()
        try:
            values = session.session.run(names, dict(feeds))
        except Exception as e:  # the runtime's exceptions have no common base
            known = ((n, v) for n, v in feeds.items() if n in self.inputs.names)
            text = ", ".join(f"{name} {list(value.shape)}" for name, value in known)
            raise LoraFxError(
                f"the model does not run at {text}: {one_line(e, 160)}",
                "give real data with --inputs FILE.npz",
            ) from e
        return dict(zip(names, values, strict=True))

    def _outputs_of(self) -> list[str]:
        return [o.name for o in self.session.session.get_outputs()]

    def _session(self, updates: Mapping[str, LowRank], rewrites: bool) -> RuntimeSession:
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

    def _path(self, updates: Mapping[str, LowRank], *, moved: bool = False) -> Path:
        """The file of the graph with branches for these keys and ranks, its weights as rounded."""
        key = (
            moved,
            *((k, u.rank, u.use, str(u.layout), u.magnitude is None) for k, u in updates.items()),
        )
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


def _factors(updates: Mapping[str, LowRank]) -> dict[str, Array]:
    scaled = {
        k: replace(u, b=u.b * np.float32(u.scale), frozen=0, group=0) for k, u in updates.items()
    }
    return {slot.name: slot.value for k, u in scaled.items() for slot in slots_of(k, u)}


@contextlib.contextmanager
def reference_of(
    source: Path, graph: OnnxGraph | None, provider: str, arrays: Named | None
) -> Iterator[OnnxReference]:
    """The reference of a file, and room for its variants while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        yield OnnxReference(graph, source, provider, Path(folder), arrays)
