"""One ONNX graph through find, merge, export in its four modes and insert, against W + ΔW by hand.

ΔW is computed here in fp64, from A and B and the axes that the graph's own text gives a weight; the
model with it runs in ONNX Runtime as it is, without the runtime's rewrites.
"""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.numpy_helper import from_array, to_array

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.inserted_branches import adapter_in
from lora_fx.onnx.load import load
from lora_fx.passes.find import find
from lora_fx.passes.verbs.adapt import insert_onnx
from tests.fuzz.check import Verdict
from tests.fuzz.graphs import GraphProgram
from tests.fuzz.onnx_text import Array, Axes, Text, axes_of

VERBS = ("merge", "merged", "switch", "load", "batch", "insert")
SIZES: tuple[dict[str, int], ...] = (
    {"N": 2, "T": 6, "S": 4, "H": 9, "W": 7}, {"N": 3, "T": 7, "S": 2, "H": 8, "W": 11},
    {"N": 1, "T": 11, "S": 5, "H": 10, "W": 6}, {"N": 5, "T": 1, "S": 3, "H": 12, "W": 9},
    {"N": 1, "T": 1, "S": 1, "H": 7, "W": 7}, {"N": 4, "T": 30, "S": 7, "H": 16, "W": 13},
    {"N": 8, "T": 5, "S": 6, "H": 9, "W": 8}, {"N": 0, "T": 4, "S": 2, "H": 9, "W": 8},
)  # fmt: skip
SEEN = 5
"""So many times the gate has an update to move an output, or nothing would be seen."""
Feeds = Mapping[str, Array]


@dataclass
class GraphVerdict(Verdict):
    """What became of a graph.

    Attributes:
        partly: Verbs that served it without the targets that they had refused by name.
        unseen: Weights of products that find does not name, and readers that it does not say.
        blind: The update moves no output.
        idle: The model itself does not run.
    """

    partly: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    blind: bool = False
    idle: bool = False


def session_of(model: onnx.ModelProto | Path, *, rewrites: bool) -> ort.InferenceSession:
    """A model in the runtime, as it is or rewritten."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not rewrites:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, ["CPUExecutionProvider"])


def feeds_of(text: Text, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of one size."""
    rng = np.random.default_rng(sum(sizes.values()))
    feeds: dict[str, Array] = {}
    stored = {t.name for t in text.stored}
    for value in text.inputs:
        if value.name in stored:
            continue
        dims = text.symbols[value.name]
        shape = [sizes[n] if isinstance(n, str) else int(n or 2) for n in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = rng.integers(0, text.highs[value.name], shape) if dtype.kind == "i" else None
        feeds[value.name] = (rng.standard_normal(shape) if drawn is None else drawn).astype(dtype)
    return feeds


def sizes_of(text: Text) -> list[dict[str, int]]:
    """Sizes in no order, and on both sides of every constant."""
    near = sorted({n + k for n in text.cuts for k in (-1, 0, 1)})
    return [*SIZES, *({**SIZES[0], "T": n} for n in near if n > 0)]


def rel(got: Array, want: Array) -> float:
    """The largest difference, of the largest number; infinite where shapes or NaNs differ."""
    if got.shape != want.shape:
        return np.inf
    if not want.size:
        return 0.0
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not (np.isfinite(a) == finite).all():
        return np.inf
    if not finite.any():
        return 0.0
    return float(np.abs(a - b)[finite].max() / max(np.abs(b[finite]).max(), 1e-6))


@dataclass
class Truth:
    """A model by hand: its outputs, and how far the runtime's own rewrites move them."""

    plain: ort.InferenceSession
    fused: ort.InferenceSession
    known: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, program: GraphProgram, changed: Mapping[str, Array], *, exact: bool = False
    ) -> Truth:
        """The model with these weights."""
        model = program.text(dict(changed), exact=exact).model()
        return cls(*(session_of(model, rewrites=on) for on in (False, True)))

    def at(self, k: int, feeds: Feeds) -> tuple[dict[str, Array], float] | None:
        """Outputs and the model's own rounding; None where it does not run."""
        if k not in self.known:
            self.known[k] = self._at(feeds)
        found: tuple[dict[str, Array], float] | None = self.known[k]
        return found

    def _at(self, feeds: Feeds) -> tuple[dict[str, Array], float] | None:
        a, b = run(self.plain, feeds), run(self.fused, feeds)
        if a is None or b is None:
            return None
        a, b = ({n.removesuffix("__old"): v for n, v in found.items()} for found in (a, b))
        return a, max((rel(b[n], a[n]) for n in a if a[n].dtype.kind == "f"), default=0.0)


def survived(base: Truth, sizes: Sequence[tuple[int, Feeds]]) -> set[int]:
    """The sizes that do not end the process, as no rows do in LSTM: tried in children."""
    done: set[int] = set()
    todo = list(sizes)
    while todo:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for k, feeds in todo:
                base.at(k, feeds)
                os.write(write, bytes([k]))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            got = pipe.read()
        os.waitpid(child, 0)
        done |= set(got)
        todo = todo[len(got) + 1 :]
    return done


def run(session: Any, feeds: Feeds) -> dict[str, Array] | None:
    """Outputs by name; None where the runtime refuses the inputs."""
    names = [o.name for o in session.get_outputs()]
    quiet = ort.RunOptions()
    quiet.log_severity_level = 4
    try:
        return dict(zip(names, session.run(names, dict(feeds), quiet), strict=True))
    except Exception:
        return None


def layouts_of(layout: str, shape: Sequence[int]) -> list[Axes]:
    """What axes an update may have: the text's, the other way round, or out before all the rest."""
    own = axes_of(layout, shape)
    plain = Axes(tuple(shape), ("o", *("i" for _ in shape[1:])))
    return [own, own.swapped(), plain]


def region_of(key: str, names: Mapping[str, Any]) -> tuple[str, tuple[slice, ...]]:
    """A key's tensor, and the part of it."""
    if key in names or "[" not in key:
        return key, ()
    name, _, text = key.rstrip("]").rpartition("[")
    parts = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        lo, colon, hi = part.partition(":")
        first = int(lo or 0)
        parts.append(slice(first, int(hi) if hi else None) if colon else slice(first, first + 1))
    return name, tuple(parts)


def updated(text: Text, adapter: Any) -> dict[str, Array]:
    """W + s·BA of every weight that the adapter changes, in fp64."""
    changed: dict[str, Array] = {}
    for key, low in adapter.lowrank.items():
        name, region = region_of(key, text.weights)
        name = text.known(name) or name
        whole = changed.setdefault(name, text.weights[name].astype(np.float64))
        part = whole[region] if region else whole
        a, b = low.a.astype(np.float64), low.b.astype(np.float64)
        matrix = np.matmul(b, a) * (low.alpha / low.rank)
        *batch, out, inside = matrix.shape
        for axes in layouts_of(_narrowed(text.layouts[name], region), part.shape):
            sizes = (_more(axes.batch), axes.size("o"), axes.size("i"))
            if sizes == (_more(batch), out, inside):
                part += axes.stored(matrix, part.shape)
                break
        else:
            raise AssertionError(f"{key}: a {a.shape} and b {b.shape} fit no way to read it")
    return changed


def _more(sizes: Sequence[int]) -> list[int]:
    """Sizes without ones."""
    return [n for n in sizes if n != 1]


def _narrowed(layout: str, region: tuple[slice, ...]) -> str:
    """A layout's text for a part of the tensor: sizes are those of the part."""
    return re.sub(r"\d", "", layout) if region else layout


def drawn(found: Any, text: Text, seed: int, keys: Sequence[str] | None = None) -> Any:
    """An adapter of most targets, its numbers drawn; an update moves a weight by a third."""
    rng = np.random.default_rng(seed)
    entries = {}
    every = [_part(t, rng) for t in (*found.targets, *found.optional)] if keys is None else keys
    for target in (found.get(key) for key in every):
        if target is None or text.known(target.parameter.name) is None:
            continue
        layout = target.layout
        rank = int(rng.integers(1, max(2, min(4, layout.max_rank + 1))))
        a = rng.standard_normal((*layout.batch_shape, rank, layout.in_size)) * 0.4
        b = rng.standard_normal((*layout.batch_shape, layout.out_size, rank)) * 0.4
        alpha = float(rank * rng.choice((0.7, 1.0, 1.6)))
        entries[target.key] = lora_fx.LowRank(
            a.astype(np.float32), b.astype(np.float32), alpha, layout
        )
    return lora_fx.Adapter(entries).bind(found)  # a key without a use means all of them


def _part(target: Any, rng: np.random.Generator) -> str:
    """The key of a target, or of a part of it that is no square."""
    rows, *more = target.parameter.shape
    if len(more) == 1 and "[" not in target.key and target.op != "embedding" and rng.random() < 0.1:
        n, lead = (rows, "") if rng.random() < 0.5 else (more[0], ":, ")
        first = int(rng.integers(0, n))
        last = int(rng.integers(first + 1, n + 1))
        if n > 1 and last - first != (more[0] if not lead else rows):  # a square reads both ways
            return f"{target.key}[{lead}{first}:{last}]"
    return str(target.key)


class Check:
    """One graph, in a folder of its own."""

    def __init__(self, program: GraphProgram, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.verdict = GraphVerdict(program.seed)
        self.text = program.text()
        self.path = folder / "base.onnx"
        self.base = Truth.of(program, {})
        self.sizes = [(k, feeds_of(self.text, n)) for k, n in enumerate(sizes_of(self.text))]
        kept = survived(self.base, self.sizes)
        self.sizes = [(k, f) for k, f in self.sizes if k in kept and self.base.at(k, f)]
        model = self.text.model()
        extra = {"location": "base.data", "size_threshold": 100} if self.text.external else {}
        onnx.save(model, self.path, save_as_external_data=self.text.external, **extra)
        self.truths: dict[tuple[int, bool], tuple[Any, Truth]] = {}

    def run(self, verbs: Sequence[str]) -> GraphVerdict:
        """Every verb."""
        self.verdict.idle = not self.sizes
        if self.verdict.idle:
            return self.verdict
        found = self._tried("find", lambda: find(OnnxGraph(load(self.path))))
        if found is None:
            return self.verdict
        self._named(found)
        adapter = drawn(found, self.text, self.program.seed)
        if not adapter.lowrank:
            self.verdict.blind = True
            return self.verdict
        self.found = found
        self.verdict.blind = not self._moves(adapter)
        for verb in verbs:
            getattr(self, f"_{verb}")(adapter)
        return self.verdict

    def _named(self, found: Any) -> None:
        """Every weight of a product is named; so is what else reads it."""
        every = (*found.targets, *found.optional)
        targets = {self.text.known(t.parameter.name): t for t in every}
        known = {*targets, *(self.text.known(r.key) for r in found.refusals)}
        for name in sorted(self.text.used):
            if name not in known and self.text.weights[name].size:
                self.verdict.unseen.append(f"product of {name}")
        for name in sorted(self.text.read & set(targets)):
            if not targets[name].other_readers:
                self.verdict.unseen.append(f"reader of {name}")

    def truth(self, adapter: Any, *, exact: bool = False) -> Truth:
        """The model by hand for an adapter; exact where W + ΔW is not stored, but two terms."""
        key = (id(adapter), exact)
        if key not in self.truths:
            made = Truth.of(self.program, updated(self.text, adapter), exact=exact)
            self.truths[key] = (adapter, made)  # which keeps its id to itself
        return self.truths[key][1]

    def _moves(self, adapter: Any) -> bool:
        truth, gate = self.truth(adapter), SEEN * max(self.text.gate)
        for k, feeds in self.sizes:
            a, b = truth.at(k, feeds), self.base.at(k, feeds)
            if a and b and any(rel(a[0][n], b[0][n]) > gate for n in a[0]):
                return True
        return False

    def _tried(self, verb: str, made: Callable[[], Any]) -> Any:
        try:
            return made()
        except LoraFxError as e:
            self.verdict.refused.setdefault(verb, e.message)
        except Exception as e:
            self.verdict.raw.append(f"{verb}: {type(e).__name__}: {e}"[:300])
        return None

    def _served(self, verb: str, adapter: Any, make: Callable[[Any], Any]) -> Any:
        """The adapter that a verb took, without keys that it refused by name; None for none."""
        first = True
        for _ in range(8):
            try:
                make(adapter)
            except LoraFxError as e:
                self.verdict.refused.setdefault(verb, e.message)
                named = [k for k in adapter.lowrank if f"'{k}'" in e.message
                         or f"'{region_of(k, self.text.weights)[0]}'" in e.message]  # fmt: skip
                kept = {k: v for k, v in adapter.lowrank.items() if k not in named}
                if not named or not kept:
                    return None
                adapter, first = lora_fx.Adapter(kept), False
                continue
            except Exception as e:
                self.verdict.raw.append(f"{verb}: {type(e).__name__}: {e}"[:300])
                return None
            (self.verdict.served if first else self.verdict.partly).append(verb)
            return adapter
        return None

    def _near(
        self, verb: str, ours: Callable[[Feeds], Mapping[str, Array] | None], truth: Truth
    ) -> None:
        """Compare at every size at which the model runs."""
        for k, feeds in self.sizes:
            want = truth.at(k, feeds)
            if want is None:
                continue
            where = f"{verb} at {', '.join(f'{n} {list(v.shape)}' for n, v in feeds.items())}"
            try:
                got = ours(feeds)
            except LoraFxError as e:
                self.verdict.raw.append(f"{where}: does not run: {e.message}"[:400])
                return
            except Exception as e:
                self.verdict.raw.append(f"{where}: {type(e).__name__}: {e}"[:300])
                return
            if got is None and all(v.size for v in feeds.values()):
                self.verdict.raw.append(f"{where}: does not run")
                return
            if got is None:  # the runtime's fused Conv takes no empty batch
                continue
            values, own = want
            if set(got) != set(values):
                self.verdict.wrong.append(f"{where}: outputs {sorted(got)}, not {sorted(values)}")
                return
            for name, value in values.items():
                gap = rel(got[name], value)
                if not gap <= max(self.text.gate) + 10 * own:
                    self.verdict.wrong.append(f"{where}: {name}: rel {gap:.1e} (own {own:.1e})")
                    return

    def _file(self, verb: str, path: Path, truth: Truth) -> None:
        for rewrites in (False, True):
            try:
                session = session_of(path, rewrites=rewrites)
            except Exception as e:
                self.verdict.raw.append(f"{verb}: does not load: {e}"[:300])
                return
            self._near(verb, lambda feeds, s=session: run(s, feeds), truth)  # type: ignore[misc]

    # --- the verbs --------------------------------------------------------------------------------

    def _merge(self, adapter: Any) -> None:
        out, proof = self.folder / "merge.onnx", self.program.seed % 2 == 0
        given: Any = adapter
        if self.program.seed % 5 == 0:  # through a file
            given = self.folder / "adapter.safetensors"
            if self._tried("save", lambda: lora_fx.save_adapter(adapter, given)) is None:
                given = adapter
        took = self._served(
            "merge", adapter,
            lambda a: lora_fx.merge(self.path, [given if a is adapter else a], out, run=proof),
        )  # fmt: skip
        if took is not None:
            self._file("merge", out, self.truth(took))

    def _merged(self, adapter: Any) -> None:
        out, fast = self.folder / "merged.onnx", self.program.seed % 2 == 1
        took = self._served(
            "merged", adapter,
            lambda a: lora_fx.export(
                self.path, out, adapters=a, optimise=fast, provider="cpu", external_over=8
            ),
        )  # fmt: skip
        if took is not None:
            self._file("merged", out, self.truth(took))

    def _slots(self, mode: str, adapter: Any) -> tuple[Any, Path]:
        out = self.folder / f"{mode}.onnx"
        took = self._served(
            mode, adapter,
            lambda a: lora_fx.export(
                self.path, out, adapters={"a": a}, mode=mode, provider="cpu", force=True
            ),
        )  # fmt: skip
        return took, out

    def _switch(self, adapter: Any) -> None:
        took, out = self._slots("switch", adapter)
        if took is None:
            return
        session = self._tried("switch", lambda: Session(out, "cpu"))
        if session is None:
            return
        self._near("switch off", session.run, self.base)
        session.load("a", took)
        truth = self.truth(took, exact=True)
        self._near("switch on", lambda f: session.run(f, adapter="a"), truth)
        wide = lora_fx.Adapter({k: _padded(u) for k, u in took.lowrank.items()})
        session.load("wide", wide)
        self._near("switch padded", lambda f: session.run(f, adapter="wide"), truth)
        self._near("switch off again", session.run, self.base)

    def _load(self, adapter: Any) -> None:
        took, out = self._slots("load", adapter)
        if took is None:
            return
        for name, given, truth in (("off", None, self.base), ("on", took, self.truth(took))):
            session = self._tried("load", lambda g=given: Session(out, "cpu", adapter=g))  # type: ignore[misc]
            if session is not None:
                self._near(f"load {name}", session.run, truth)

    def _batch(self, adapter: Any) -> None:
        out = self.folder / "batch.onnx"
        second = drawn(self.found, self.text, self.program.seed + 1, list(adapter.lowrank))

        def kept(a: Any) -> Any:
            return lora_fx.Adapter({k: u for k, u in second.lowrank.items() if k in a.lowrank})

        took = self._served(
            "batch", adapter,
            lambda a: lora_fx.export(
                self.path, out, adapters={"a": a, "b": kept(a)}, mode="batch", provider="cpu"
            ),
        )  # fmt: skip
        if took is None:
            return
        session = session_of(out, rewrites=True)
        truths = [
            self.base,
            self.truth(took, exact=True),
            self.truth(kept(took), exact=True),
        ]
        for k, feeds in self.sizes:
            rows = max((v.shape[0] for v in feeds.values()), default=0)
            wants = [t.at(k, feeds) for t in truths]
            if not rows or any(w is None for w in wants):
                continue
            ids = (np.arange(rows) + k) % 3
            got = run(session, {**feeds, "adapter_ids": ids.astype(np.int64)})
            where = f"batch at {', '.join(f'{n} {list(v.shape)}' for n, v in feeds.items())}"
            if got is None:
                self.verdict.raw.append(f"{where}: does not run")
                return
            for row, i in enumerate(ids):
                values, own = wants[i]
                for name, value in values.items():
                    gap = rel(got[name][row], value[row])
                    if not gap <= max(self.text.gate) + 10 * own:
                        self.verdict.wrong.append(f"{where}: row {row}, {name}: rel {gap:.1e}")
                        return

    def _insert(self, adapter: Any) -> None:
        out = self.folder / "insert.onnx"
        given = {"rank": 1, "include": "*", "dead": "allow", "provider": "cpu"}
        if self._tried("insert", lambda: insert_onnx(self.path, out, **given)) is None:
            return
        self.verdict.served.append("insert")
        self._file("insert", out, self.base)
        model = onnx.load(out)
        rng = np.random.default_rng(self.program.seed)
        for tensor in model.graph.initializer:
            if ".lora_B" in tensor.name:
                value = to_array(tensor)
                new = rng.standard_normal(value.shape).astype(value.dtype) * 0.4
                tensor.CopyFrom(from_array(new.astype(value.dtype), tensor.name))
        onnx.save(model, out)
        trained = self._tried("insert", lambda: adapter_in(out))
        if trained is not None and all(
            self.text.known(region_of(k, self.text.weights)[0]) for k in trained
        ):
            self._file("insert trained", out, self.truth(trained, exact=True))


def _padded(low: Any) -> Any:
    """The same update with a rank more, of zeros."""
    a = np.concatenate([low.a, np.ones_like(low.a[..., :1, :])], -2)
    b = np.concatenate([low.b, np.zeros_like(low.b[..., :1])], -1)
    return lora_fx.LowRank(a, b, low.alpha / low.rank * (low.rank + 1), low.layout)


def check_graph(program: GraphProgram, verbs: Sequence[str] = VERBS) -> GraphVerdict:
    """Run a graph; nothing is raised, but for a text that makes no model."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Check(program, Path(folder)).run(verbs)
