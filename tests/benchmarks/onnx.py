"""Latency of exported files, in ratios to the base model, with the gates that they are held to.

A gate compares with another file of the same run; the ratio to torch's eager model is reported and
has no gate, because it depends on the processor.

    python -m tests.benchmarks.onnx [GROUP ...] [--rounds 25] [--layers 2] [--width 256]

One thread, CPU time of the process, rounds A B C A B C …, the base twice (the control). A ratio is
the median of the ratios within rounds; its bounds are those of `lora_fx.onnx.timing`. A gate fails
only where the lower 95 % bound is above it. Models are random, every linear layer adapted with
rank 8; everything is exported by lora_fx.export into a temporary folder.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora_fx
from lora_fx import Adapter
from lora_fx.onnx import Session as Switchable
from lora_fx.onnx.bench import time_sessions
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.timing import bounds
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, gated, report, rounded

RANK, WORDS = 8, 1000
COUNTS = (8, 64, 256)
SECONDS = 0.03
"""Of a sample: long enough that the first run, which finds caches full of others, counts little."""
Feeds = dict[str, Any]


@dataclass
class Chosen(RuntimeSession):
    """A switchable file with one of its adapters."""

    owner: Any = None

    def run(self, feeds: Mapping[str, Any]) -> Feeds:
        """As the session's own run."""
        found: Feeds = self.owner.run(feeds, adapter="one")
        return found


@dataclass
class Eager(RuntimeSession):
    """A torch module."""

    def run(self, feeds: Mapping[str, Any]) -> Feeds:
        """The module's outputs stay torch's."""
        with torch.no_grad():
            return {"": self.session(*(torch.from_numpy(v) for v in feeds.values()))}


@dataclass
class Made:
    """A model, its adapters, and the files of it that were asked for."""

    name: str
    folder: Path
    layers: int
    width: int
    most: int = max(COUNTS)
    model: Any = None
    args: tuple[Any, ...] = ()
    adapters: list[Adapter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.args = build(self.name, self.layers, self.width)
        low = lora_fx.insert(self.model, self.args, rank=RANK, include=linears(self.model))
        self.adapters = [filled(low.adapter(), i) for i in range(self.most)]

    def file(self, kind: str) -> Path:
        """Base, merged, optimised, switch or batch8, batch64 …; written once."""
        path = self.folder / f"{self.name}_{kind}.onnx"
        if not path.exists():
            how: dict[str, Any] = {"optimise": kind == "optimised"}
            coded: dict[str, Any] = {"quantise": "int4"} if kind.startswith("int4") else {}
            if kind.endswith("switch"):
                how = {"mode": "switch", "adapters": {kind: self.adapters[0]}, **coded}
            elif coded:
                how = coded
            elif kind.startswith("batch"):
                how = {"mode": "batch", "adapters": self.adapters[: int(kind[5:])]}
            elif kind != "base":
                how["adapters"] = self.adapters[0]
            lora_fx.export(self.model, path, self.args, provider="cpu", **how)
        return path

    def open(self, kind: str) -> RuntimeSession:
        """A session on one thread."""
        if kind == "eager":
            return Eager(copy.deepcopy(self.model), "cpu")  # none finds its weights in a cache
        if kind.endswith("switched"):
            owner = Switchable(self.file(kind[:-2]), provider="cpu", threads=1)
            owner.load("one", self.adapters[0])
            return Chosen(owner.session, "cpu", owner=owner)
        return open_session(self.file(kind), "cpu", threads=1)


def build(name: str, layers: int, width: int) -> tuple[Any, tuple[Any, ...]]:
    """A random transformer of the given shape, and example inputs."""
    import transformers as tf

    torch.manual_seed(0)
    if name == "bert":
        config = tf.BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=4 * width,
        )  # fmt: skip
        model: Any = tf.BertModel(config, add_pooling_layer=False)
    else:
        config = tf.GPT2Config(
            vocab_size=WORDS, n_embd=width, n_layer=layers, n_head=4, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = tf.GPT2Model(config)
    return model.eval(), (torch.randint(0, WORDS, (2, 8)),)


def linears(model: Any) -> list[str]:
    """Selectors of all linear layers, GPT-2's Conv1D too."""
    found = {type(m).__name__ for m in model.modules()} & {"Linear", "Conv1D"}
    return [f"class:{n}" for n in sorted(found)]


def filled(adapter: Adapter, seed: int) -> Adapter:
    """Factors at random, small enough to leave the model's numbers as they are."""
    rng = np.random.default_rng(seed)
    entries = {}
    for key, low in adapter.lowrank.items():
        a, b = (rng.standard_normal(v.shape).astype(np.float32) * 0.1 for v in (low.a, low.b))
        entries[key] = replace(low, a=a, b=b)
    return Adapter(entries)


@dataclass(frozen=True)
class Ratio:
    """A ratio to the first of its group, and its bounds."""

    what: str
    seconds: float
    ratio: float
    lower: float
    upper: float

    def row(self) -> Row:
        """A row of a table."""
        row = {"what": self.what, "CPU ms": self.seconds * 1e3, "ratio": self.ratio}
        bounds_of_95 = f"{self.lower:.3f} to {self.upper:.3f}"
        return {**{name: rounded(value) for name, value in row.items()}, "95 %": bounds_of_95}


Limit = tuple[str, Callable[[Ratio], float]]
"""What a limit is relative to, and the limit, given the control's ratio."""


def measure(
    title: str,
    opened: Mapping[str, RuntimeSession],
    feeds: Mapping[str, Feeds],
    gates: Mapping[str, Limit],
    rounds: int,
) -> list[Row]:
    """Time sessions in turn; the first is the baseline, the one named "… again" the control.

    Args:
        title: Of the group.
        opened: Sessions by name.
        feeds: Their inputs, by the same names.
        gates: Name → the gate.
        rounds: How many are counted.
    """
    found = time_sessions(opened, feeds, rounds, warmup=3, seconds=SECONDS).samples
    base = [s.cpu for s in found[next(iter(found))]]
    measured: dict[str, Ratio] = {}
    for name, samples in found.items():
        ratios = [s.cpu / b for s, b in zip(samples, base, strict=True)]
        lower, upper = bounds(ratios) or (0.0, 0.0)
        measured[name] = Ratio(
            f"{title}: {name}", statistics.median(s.cpu for s in samples),
            statistics.median(ratios), lower, upper,
        )  # fmt: skip
    control = next(ratio for name, ratio in measured.items() if name.endswith("again"))
    rows: list[Row] = []
    for name, ratio in measured.items():
        row = ratio.row()
        if name in gates:
            relative_to, limit = gates[name]
            row = gated(row, relative_to, limit(control), ratio.lower)
        rows.append(row)
    return rows


def tokens(batch: int, length: int) -> Any:
    """Token ids."""
    return np.random.default_rng(0).integers(0, WORDS, (batch, length))


def modes(bert: Made, rounds: int) -> list[Row]:
    """Merged and switch beside the base."""
    kinds = {
        "base": "base", "base again": "base", "merged": "merged",
        "switch, no adapter": "switch", "switch, an adapter": "switched",
    }  # fmt: skip
    opened = {n: bert.open(k) for n, k in kinds.items()}
    rows = []
    for size in ((1, 128), (1, 8)):
        feeds = {n: {"input_ids": tokens(*size)} for n in opened}
        gates: dict[str, Limit] = {}
        if size == (1, 128):
            gates["switch, no adapter"] = "control + .03", lambda control: control.ratio + 0.03
            gates["switch, an adapter"] = "1.10 × base", lambda control: 1.10
        rows += measure(f"BERT {size[0]}×{size[1]}", opened, feeds, gates, rounds)
    return rows


def codes(bert: Made, rounds: int) -> list[Row]:
    """Switch over int4 codes beside the int4 base, and the base in floats."""
    kinds = {
        "int4": "int4", "int4 again": "int4", "switch over int4, no adapter": "int4_switch",
        "switch over int4, an adapter": "int4_switched", "floats": "base",
    }  # fmt: skip
    opened = {n: bert.open(k) for n, k in kinds.items()}
    rows = []
    for size in ((1, 128), (1, 1)):
        feeds = {n: {"input_ids": tokens(*size)} for n in opened}
        gates: dict[str, Limit] = {}
        if size == (1, 128):
            gates["switch over int4, an adapter"] = "1.10 × int4", lambda control: 1.10
        title = f"BERT, width {bert.width}, {size[0]}×{size[1]}"
        rows += measure(title, opened, feeds, gates, rounds)
    return rows


def batch(bert: Made, rounds: int) -> list[Row]:
    """Rows with adapters of their own, beside the base."""

    def group(size: tuple[int, int], distinct: Sequence[int], gate: float, upto: int) -> list[Row]:
        some = {n: bert.open("base") for n in ("base", "base again")}
        feeds: dict[str, Feeds] = {n: {"input_ids": tokens(*size)} for n in some}
        gates: dict[str, Limit] = {}
        for n in (n for n in COUNTS if n <= bert.most):
            for k in distinct:
                name = f"{k} of {n} adapters"
                some[name] = bert.open(f"batch{n}")  # its own, as for torch
                ids = 1 + np.arange(size[0]) % k * (n // k)
                feeds[name] = {"input_ids": tokens(*size), "adapter_ids": ids}
                if k <= upto:
                    gates[name] = f"{gate:.2f} × base", lambda control: gate
        return measure(f"BERT {size[0]}×{size[1]}", some, feeds, gates, rounds)

    return group((8, 128), (8,), 1.12, 8) + group((32, 1), (1, 2, 4, 8), 1.20, 4)


def optimised(made: Made, rounds: int) -> list[Row]:
    """The optimised file beside the plain one, then both beside torch at 1×8."""
    plain, fast = made.open("merged"), made.open("optimised")
    rows, name = [], {"bert": "BERT", "gpt2": "GPT-2"}[made.name]
    opened = {"plain": plain, "plain again": made.open("merged"), "optimised": fast}
    gates: dict[str, Limit] = {
        "optimised": ("1.00 × plain", lambda control: max(1.0, control.upper))
    }
    for size in ((1, 1), (1, 8), (1, 32), (1, 128), (8, 128)):
        feeds = {n: {"input_ids": tokens(*size)} for n in opened}
        rows += measure(f"{name} {size[0]}×{size[1]}", opened, feeds, gates, rounds)
    opened = {"torch": made.open("eager"), "plain": plain}  # torch warms its own code up
    opened |= {"torch again": made.open("eager"), "optimised": fast}
    feeds = {n: {"input_ids": tokens(1, 8)} for n in opened}
    return rows + measure(f"{name} 1×8, to torch", opened, feeds, {}, rounds)


GROUPS: Mapping[str, Callable[[Made, int], list[Row]]] = {
    "modes": modes,
    "codes": codes,
    "batch": batch,
    "bert": optimised,
    "gpt2": optimised,
}
"""Name → what measures a group, given a model and the number of rounds."""


def main() -> int:
    """Print a row for everything measured; 1 where a gate is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--most", type=int, default=max(COUNTS), help="adapters of one file")
    add_keep(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        maker = partial(
            Made, folder=Path(folder), layers=options.layers, width=options.width, most=options.most
        )
        chosen = options.groups or list(GROUPS)
        print(f"{processor()}, {datetime.date.today()}, {options.rounds} rounds\n")
        bert = maker("bert") if set(chosen) - {"gpt2"} else None
        for group in chosen:
            made = maker("gpt2") if group == "gpt2" else bert
            assert made is not None
            found = GROUPS[group](made, options.rounds)
            what = f"{group}, {options.layers} layers of {options.width}: ratios of CPU time"
            report("onnx", what, found, options.keep)
            rows += found
    missed = [row["what"] for row in rows if not row.get("held", True)]
    print(f"\n{len(missed)} gates missed" + "".join(f"\n  {m}" for m in missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
