"""MiniLM over codes: the demo's task in floats, int4 and nf4, and int8 files of ONNX Runtime's own.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.quantised task|files|decoder [--quick]

task: the demo's data, probe, steps and settings; the frozen encoder is floats, int4 or nf4, and
everything else is alike. The head is trained whole in each. Accuracies are of the 1,000 held-out
texts, in torch and of the exported switch file in ONNX Runtime.

files: the encoder and its probe exported, then quantised by ONNX Runtime (quantize_dynamic, and
quantize_static over 64 of the training texts); the float adapter of the same run rides on them in
switch and batch. Of every target, what is added to its product has to be s·B(Ax) in fp64, x being
what the product reads in that run.

decoder: SmolLM2-135M (samples/qlora_smollm2.py says how to get it), the sample's steps and texts
over floats, int8, int4 and nf4 of lora-fx's own.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli.demo_data import topics
from lora_fx.cli.demo_stages import Size
from lora_fx.compare import rel
from lora_fx.data import Buckets, Table
from lora_fx.fx.load import minilm
from lora_fx.fx.train.loop import Settings, fit
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find

Array = np.ndarray[Any, Any]
Run = Callable[[Array, Array], Array]
KINDS = (None, "int4", "nf4")
OPS = ["MatMul", "Gemm", "Gather"]


class Task:
    """The demo's data, and its net with a fitted probe as its head."""

    def __init__(self, quick: bool) -> None:
        self.size = Size.of(quick)
        data = topics(self.size.train, self.size.test)
        self.labels, self.truth = data.train[1], np.array(data.test[1])
        torch.manual_seed(0)
        self.net = minilm.Classifier(len(data.names)).eval().requires_grad_(False)
        self.rows, self.held = minilm.tokenise(data.train[0]), minilm.tokenise(data.test[0])
        features = minilm.run_all(in_torch(self.net.features), self.rows)
        weight, bias, _ = minilm.best_probe(features, self.labels, len(data.names))
        self.probe = {"head.weight": weight, "head.bias": bias}
        self.put(self.probe)
        ids = torch.ones(4, 9, dtype=torch.long)
        self.sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            self.net.get_parameter(name).copy_(value)

    def keep_head(self, adapter: Adapter) -> Adapter:
        """Put the trained head into the net; returns the branches."""
        self.put({n: torch.from_numpy(full.value) for n, full in adapter.full.items()})
        return Adapter(adapter.lowrank, metadata=adapter.metadata)

    def scores(self, run: Run) -> Array:
        return minilm.run_all(run, self.held)

    def accuracy(self, scores: Array) -> float:
        return float((scores.argmax(1) == self.truth).mean())

    def trained(self, kind: str | None) -> Any:
        """The demo's adapter and head over one kind of base, and the accuracy before."""
        more = {"exclude": "head", "also_train": "head", "quantise": kind}
        model = lora_fx.insert(self.net, (), self.sample, rank=8, **more)
        before = self.accuracy(self.scores(in_torch(model)))
        y = np.array(self.labels)
        tables = [
            Table({"input_ids": ids, "attention_mask": mask, "labels": y[at]}, "labels")
            for at, ids, mask in minilm.batches(self.rows, minilm.BATCH)
        ]
        fit(model, Buckets(tables), settings=Settings(steps=self.size.steps, lr=minilm.LR))
        return model.eval(), before


def in_torch(module: Callable[..., torch.Tensor]) -> Run:
    def call(ids: Array, mask: Array) -> Array:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy())

    return call


def in_runtime(run: Callable[..., dict[str, Array]]) -> Run:
    return lambda ids, mask: run({"input_ids": ids, "attention_mask": mask})["output"]


def switched(path: Path, low: Adapter | Path) -> Callable[..., dict[str, Array]]:
    """A switch file with an adapter."""
    session = Session(path, "cpu", threads=1)
    session.load("own", low)
    return partial(session.run, adapter="own")


def batched(path: Path) -> Callable[..., dict[str, Array]]:
    """A batch file, every row with its one adapter."""
    run = open_session(path, "cpu").run
    return lambda feeds: run({**feeds, "adapter_ids": np.ones(len(feeds["input_ids"]), np.int64)})


def task(of: Task, folder: Path) -> None:
    """One line a kind."""
    for kind in KINDS:
        start = time.process_time()
        model, before = of.trained(kind)
        seconds = time.process_time() - start
        scores = of.scores(in_torch(model))
        path, low = folder / f"{kind}.onnx", of.keep_head(model.adapter())
        options: dict[str, Any] = {
            "mode": "switch",
            "adapters": {str(kind): low},
            "provider": "cpu",
        }
        if kind:  # the head, which was trained whole, stays in floats
            options["quantise"] = {kind: [key.removesuffix(".weight") for key in low.lowrank]}
        lora_fx.export(of.net, path, (), of.sample, **options)
        of.put(of.probe)
        runtime = of.scores(in_runtime(switched(path, low)))
        same = int((runtime.argmax(1) == scores.argmax(1)).sum())
        print(
            f"{kind or 'float'}: accuracy {before:.3f} → {of.accuracy(scores):.3f}, ONNX Runtime "
            f"{of.accuracy(runtime):.3f} ({same} of {len(of.truth)} classes equal); "
            f"{path.stat().st_size:,} bytes; {seconds:.0f} s of CPU",
            flush=True,
        )


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of training texts."""

    def __init__(self, rows: Sequence[dict[str, object]]) -> None:
        made = minilm.batches(rows, 16)
        self.feeds = iter([{"input_ids": i, "attention_mask": m} for _, i, m in made])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def joins(model: ir.Model) -> dict[str, list[str]]:
    """Key → the names of x, of the product and of its sum with the branch, of a switch file."""
    found = {}
    for node in model.graph:
        factor = next((v for v in node.inputs if v and str(v.name).endswith(".lora_A")), None)
        seen, ahead = set(node.outputs), list(node.outputs) if factor is not None else []
        while ahead:
            for use in ahead.pop().uses():
                others = [v for v in use.node.inputs if v is not None and v not in seen]
                whole = [v for v in others if v.producer() is not None]
                if use.node.op_type in ("Add", "Gemm") and whole:
                    made = [node.inputs[0], whole[0], use.node.outputs[0]]
                    key = str(factor and factor.name).removesuffix(".lora_A")
                    found[key], ahead = [str(v and v.name) for v in made], []
                    break
                seen |= set(use.node.outputs)
                ahead += use.node.outputs
    return found


def judged(path: Path, feeds: dict[str, Array], low: Path, lows: dict[str, LowRank]) -> str:
    """How far the products of a switch file are from y + s·B(Ax) in fp64, and what that adds."""
    places = joins(load(path))
    model, worst, least = onnx.load(path), 0.0, 1.0
    have = {o.name for o in model.graph.output}
    for name in {n for names in places.values() for n in names} - have:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    seen = path.with_name("seen.onnx")
    onnx.save(model, seen)
    got = switched(seen, low)(feeds)
    for key, names in places.items():
        x, y, made = (got[n].astype(np.float64) for n in names)
        update = lows[key]
        a, b = (f.astype(np.float64) for f in (update.a, update.b))
        change = update.scale * x @ a.T @ b.T
        worst, least = max(worst, rel(made, y + change)), min(least, rel(y + change, y))
    return f"{len(places)} products off by {worst:.1e} at most; branches add {least:.1e} or more"


def files(of: Task, folder: Path) -> None:
    """Foreign int8 files, with the float adapter in switch and batch."""
    model, _ = of.trained(None)
    low = of.keep_head(model.adapter())
    paths = {n: folder / f"{n}.onnx" for n in ("float", "dynamic", "static")}
    source = paths["float"]
    lora_fx.export(of.net, source, (), of.sample, provider="cpu")
    plain = onnx.load(source)
    stored = {t.name for t in plain.graph.initializer}
    made = [v for v in plain.graph.value_info if v.name not in stored]
    del plain.graph.value_info[:]  # the quantiser turns a Gemm's weight, not its shape
    plain.graph.value_info.extend(made)
    quantize_dynamic(plain, paths["dynamic"], op_types_to_quantize=OPS)
    # not the sum with the mask, whose -3e38 would take the range of its codes
    quantize_static(source, paths["static"], Reader(of.rows[:64]), quant_format=QuantFormat.QDQ,
                    per_channel=True, op_types_to_quantize=OPS)  # fmt: skip
    some = minilm.batches(of.held, 8)
    _, ids, mask = some[len(some) // 2]
    feeds = {"input_ids": ids, "attention_mask": mask}
    for name, path in paths.items():
        found = find(OnnxGraph(load(path)))
        every = (*found.targets, *found.optional)
        told = (f"{t.parameter.format or 'float'} {t.parameter.bits or 32}" for t in every)
        listed = ", ".join(f"{n} × {k}" for k, n in Counter(told).items())
        print(
            f"{name}: {path.stat().st_size:,} bytes; {len(every)} weights: {listed}; "
            f"{found.reached_share:.1%} reached, {len(found.unreached)} unreached"
        )
        base = of.accuracy(of.scores(in_runtime(open_session(path, "cpu").run)))
        print(f"  accuracy without the adapter {base:.3f}")
        names = {n: t.key for t in every for n in (t.key, *t.parameter.aliases)}
        lows = {names[key]: update for key, update in low.lowrank.items()}
        kept: dict[str, Any] = {"provider": "cpu", "inputs": feeds}
        outs = {mode: folder / f"{name}_{mode}.onnx" for mode in ("switch", "batch")}
        given: dict[str, Any] = {"switch": {name: low}, "batch": [low]}
        oks = [
            bool(lora_fx.export(path, outs[m], mode=m, adapters=g, **kept))
            for m, g in given.items()
        ]
        own = folder / f"{name}.onnx_adapter"  # in the names of the file
        one, many = switched(outs["switch"], own), batched(outs["batch"])
        scores = [of.scores(in_runtime(run)) for run in (one, many)]
        print(
            f"  switch and batch {oks}: accuracy {of.accuracy(scores[0]):.3f}, "
            f"{of.accuracy(scores[1]):.3f}; of one batch they differ by "
            f"{rel(many(feeds)['output'], one(feeds)['output']):.1e}"
        )
        print(f"  switch: {judged(outs['switch'], feeds, own, lows)}", flush=True)


def decoder(quick: bool) -> None:
    """Perplexities of SmolLM2 before and after the sample's 20 steps, one line a kind."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "samples"))
    from beside_peft import train  # the samples' own steps
    from sources import smollm2

    model, tokenizer = smollm2()
    model.requires_grad_(False)
    model.config.use_cache = False
    if quick:
        model.config.num_hidden_layers = 1
        del model.model.layers[1:]
    data, (steps, held, length) = topics(6000, 600), (2, 1, 64) if quick else (20, 8, 256)

    def windows(texts: list[str], count: int) -> torch.Tensor:
        ids = tokenizer("\n\n".join(texts))["input_ids"][: count * length]
        return torch.tensor(ids).view(count, length)

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        logits = module(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    def perplexity(module: torch.nn.Module) -> float:
        with torch.no_grad():
            return math.exp(np.mean([float(loss(module, {"input_ids": x[None]})) for x in test]))

    texts, test = windows(data.train[0], steps * 2), windows(data.test[0], held)
    batches = [{"input_ids": x} for x in texts.split(2)]
    for kind in (None, "int8", "int4", "nf4"):
        module = lora_fx.insert(model, (), {"input_ids": texts[:2]}, rank=8, quantise=kind)
        before = perplexity(module)
        train(module, batches, loss, 1e-3)
        print(f"{kind or 'float'}: perplexity {before:.2f} → {perplexity(module):.2f}", flush=True)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("task", "files", "decoder"))
    parser.add_argument("--quick", action="store_true")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if told.part == "decoder":
        decoder(told.quick)
        return
    with tempfile.TemporaryDirectory() as folder:
        {"task": task, "files": files}[told.part](Task(told.quick), Path(folder))


if __name__ == "__main__":
    main()
