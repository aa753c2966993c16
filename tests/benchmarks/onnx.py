"""Latency of exported files, in ratios to the base model, with the gates that they are held to.

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
class Row:
    """A ratio to the first of its group, its bounds, and what it may be."""

    what: str
    seconds: float
    ratio: float
    lower: float
    upper: float
    gate: float | None = None

    @property
    def ok(self) -> bool:
        """False where all of the interval is above the gate."""
        return self.gate is None or self.lower <= self.gate

    def __str__(self) -> str:
        """A row of a Markdown table."""
        said = "" if self.gate is None else f"{self.gate:.2f}{'' if self.ok else ' MISSED'}"
        return (
            f"| {self.what} | {self.seconds * 1e3:.2f} | {self.ratio:.3f} | "
            f"{self.lower:.3f} to {self.upper:.3f} | {said} |"
        )


def measure(
    title: str,
    opened: Mapping[str, RuntimeSession],
    feeds: Mapping[str, Feeds],
    gates: Mapping[str, Callable[[Row], float]],
    rounds: int,
) -> list[Row]:
    """Time sessions in turn; the first is the baseline, the one named "… again" the control.

    Args:
        title: Of the group.
        opened: Sessions by name.
        feeds: Their inputs, by the same names.
        gates: Name → the gate, given the control's row.
        rounds: How many are counted.
    """
    found = time_sessions(opened, feeds, rounds, warmup=3, seconds=SECONDS).samples
    base = [s.cpu for s in found[next(iter(found))]]
    rows: list[Row] = []
    for name, samples in found.items():
        ratios = [s.cpu / b for s, b in zip(samples, base, strict=True)]
        lower, upper = bounds(ratios) or (0.0, 0.0)
        row = Row(
            f"{title}: {name}", statistics.median(s.cpu for s in samples),
            statistics.median(ratios), lower, upper,
        )  # fmt: skip
        rows.append(row)
    control = next(r for r in rows if r.what.endswith("again"))
    rows = [
        Row(**{**vars(r), "gate": gates[n](control) if n in gates else None})
        for n, r in zip(found, rows, strict=True)
    ]
    print("\n".join(map(str, rows)), flush=True)
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
        gates: dict[str, Callable[[Row], float]] = {}
        if size == (1, 128):
            gates["switch, no adapter"] = lambda control: control.ratio + 0.03
            gates["switch, an adapter"] = lambda control: 1.10
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
        gates: dict[str, Callable[[Row], float]] = {}
        if size == (1, 128):
            gates["switch over int4, an adapter"] = lambda control: 1.10
        title = f"BERT, width {bert.width}, {size[0]}×{size[1]}"
        rows += measure(title, opened, feeds, gates, rounds)
    return rows


def batch(bert: Made, rounds: int) -> list[Row]:
    """Rows with adapters of their own, beside the base."""

    def group(size: tuple[int, int], distinct: Sequence[int], gate: float, upto: int) -> list[Row]:
        some = {n: bert.open("base") for n in ("base", "base again")}
        feeds: dict[str, Feeds] = {n: {"input_ids": tokens(*size)} for n in some}
        gates: dict[str, Callable[[Row], float]] = {}
        for n in (n for n in COUNTS if n <= bert.most):
            for k in distinct:
                name = f"{k} of {n} adapters"
                some[name] = bert.open(f"batch{n}")  # its own, as for torch
                ids = 1 + np.arange(size[0]) % k * (n // k)
                feeds[name] = {"input_ids": tokens(*size), "adapter_ids": ids}
                if k <= upto:
                    gates[name] = lambda control: gate
        return measure(f"BERT {size[0]}×{size[1]}", some, feeds, gates, rounds)

    return group((8, 128), (8,), 1.12, 8) + group((32, 1), (1, 2, 4, 8), 1.20, 4)


def optimised(made: Made, eager: float, rounds: int) -> list[Row]:
    """The optimised file beside the plain one, then beside torch at 1×8."""
    plain, fast = made.open("merged"), made.open("optimised")
    rows, name = [], {"bert": "BERT", "gpt2": "GPT-2"}[made.name]
    opened = {"plain": plain, "plain again": made.open("merged"), "optimised": fast}
    for size in ((1, 1), (1, 8), (1, 32), (1, 128), (8, 128)):
        feeds = {n: {"input_ids": tokens(*size)} for n in opened}
        gates: dict[str, Callable[[Row], float]] = {"optimised": lambda c: max(1.0, c.upper)}
        rows += measure(f"{name} {size[0]}×{size[1]}", opened, feeds, gates, rounds)
    opened = {"torch": made.open("eager"), "plain": plain}  # torch warms its own code up
    opened |= {"torch again": made.open("eager"), "optimised": fast}
    feeds = {n: {"input_ids": tokens(1, 8)} for n in opened}
    return rows + measure(f"{name} 1×8", opened, feeds, {"optimised": lambda c: eager}, rounds)


def main() -> int:
    """Print a row for everything measured; 1 where a gate is missed."""
    parser = argparse.ArgumentParser()
    groups = ("modes", "codes", "batch", "bert", "gpt2")
    parser.add_argument("groups", nargs="*", choices=[[], *groups])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--most", type=int, default=max(COUNTS), help="adapters of one file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        maker = partial(
            Made, folder=Path(folder), layers=options.layers, width=options.width, most=options.most
        )
        chosen = options.groups or groups
        print(f"{processor()}, {datetime.date.today()}, {options.rounds} rounds\n")
        print("| | CPU ms | ratio | 95 % | gate |\n|---|---|---|---|---|")
        bert = maker("bert") if set(chosen) - {"gpt2"} else None
        if bert is not None:
            rows += modes(bert, options.rounds) if "modes" in chosen else []
            rows += codes(bert, options.rounds) if "codes" in chosen else []
            rows += batch(bert, options.rounds) if "batch" in chosen else []
            rows += optimised(bert, 0.50, options.rounds) if "bert" in chosen else []
        if "gpt2" in chosen:
            rows += optimised(maker("gpt2"), 0.30, options.rounds)
    missed = [r.what for r in rows if not r.ok]
    print(f"\n{len(missed)} gates missed" + "".join(f"\n  {m}" for m in missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
