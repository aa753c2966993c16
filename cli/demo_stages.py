"""The stages of the demo: probe, insert, train, export, predict. Each is timed and reported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.cli.demo_data import topics
from lora_fx.errors import NoEffectError
from lora_fx.text import Json

if TYPE_CHECKING:
    import torch

    from lora_fx.dtypes import Array

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """The size of a demo, and the gain in accuracy that it must reach."""

    train: int
    test: int
    steps: int
    gain: float

    @classmethod
    def of(cls, quick: bool) -> Size:
        """The whole demo must gain 5 points over the probe; the quick demo only has to learn."""
        if quick:
            return cls(600, 200, 12, -1.0)
        return cls(5000, 1000, 480, 0.05)


@dataclass
class Result:
    """The results that the table and report.json show."""

    facts: Json = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Stages:
    """The stages of one demo, in their order; each prints its result at its end.

    Args:
        out: The folder of adapter/, model.onnx and report.json.
        size: The size of the demo.
        say: Prints a line.
    """

    def __init__(self, out: Path, size: Size, say: Say) -> None:
        self.out = out
        self.size = size
        self.say = say
        self.result = Result()
        self._started = time.perf_counter()

    def end(self, stage: str, text: str) -> None:
        """Record the seconds of a stage, and print its result."""
        now = time.perf_counter()
        seconds = round(now - self._started, 1)
        self._started = now
        self.result.seconds[stage] = seconds
        self.say(f"{stage}: {text} ({seconds} s)")

    def data(self) -> None:
        """Read the training and the held-out docstrings as token ids."""
        from lora_fx.fx.load import minilm

        data = topics(self.size.train, self.size.test)
        texts, self.labels = data.train
        test_texts, test_labels = data.test
        self.classes = len(data.names)
        self.truth = np.array(test_labels)
        self.end(
            "data",
            f"{len(texts)} docstrings to train on, {len(self.truth)} held out, "
            f"{self.classes} volumes",
        )
        self.train_rows = minilm.tokenise(texts)
        self.test_rows = minilm.tokenise(test_texts)

    def probe(self) -> None:
        """Fit a linear probe on the encoder's features, which the adapter has to beat."""
        import torch

        from lora_fx.fx.load import minilm

        torch.manual_seed(0)
        self.net = minilm.Classifier(self.classes).eval().requires_grad_(False)
        features = minilm.run_all(_in_torch(self.net.features), self.train_rows)
        weight, bias, decay = minilm.best_probe(features, self.labels, self.classes)
        self.net.head.weight.copy_(weight)
        self.net.head.bias.copy_(bias)

        self.scores_before = minilm.run_all(_in_torch(self.net), self.test_rows)
        facts = self.result.facts
        facts["probe"] = self._accuracy(self.scores_before)
        facts["probe_weight_decay"] = decay
        self.end("probe", f"a fitted linear probe reaches {facts['probe']:.3f}")

    def insert(self) -> None:
        """Insert a branch at every weight matmul except the head, which is trained whole."""
        import torch

        import lora_fx
        from lora_fx.fx.load import minilm

        ids = torch.ones(4, 9, dtype=torch.long)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.model = lora_fx.insert(self.net, (), sample, rank=8, exclude="head", also_train="head")
        report = self.model.report()
        facts = self.result.facts
        facts["targets"] = len(report.targets)
        facts["reached_share"] = report.found.reached_share
        facts["adapted_share"] = report.adapted_share
        facts["trained"] = report.trained
        facts["frozen"] = report.frozen
        scores = minilm.run_all(_in_torch(self.model), self.test_rows)
        facts["before"] = self._accuracy(scores)
        self.end("insert", f"{len(report.targets)} targets, {report.trained:,} parameters to train")

    def train(self) -> None:
        """Train on batches of texts of similar length."""
        from lora_fx.data import Buckets, Table
        from lora_fx.fx.load import minilm
        from lora_fx.fx.train.loop import Settings, fit

        labels = np.array(self.labels)
        tables = []
        for places, ids, mask in minilm.batches(self.train_rows, minilm.BATCH):
            columns = {"input_ids": ids, "attention_mask": mask, "labels": labels[places]}
            tables.append(Table(columns, "labels"))

        def progress(step: int, steps: int, loss: float) -> None:
            if step % max(1, steps // 5) == 0:
                self.say(f"  step {step} of {steps}: loss {loss:.3f}")

        steps = self.size.steps
        settings = Settings(steps=steps, lr=minilm.LR)
        losses = fit(self.model, Buckets(tables), settings=settings, progress=progress).losses

        self.scores_after = minilm.run_all(_in_torch(self.model), self.test_rows)
        tenth = max(1, steps // 10)
        facts = self.result.facts
        facts["after"] = self._accuracy(self.scores_after)
        facts["loss"] = [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))]
        self.end("train", f"{steps} steps, accuracy {facts['after']:.3f}")

    def export(self) -> None:
        """Write the adapter, and the ONNX file with the adapter folded in."""
        import lora_fx

        lora_fx.save_adapter(self.model.adapter(), self.out / "adapter")
        exported = lora_fx.export(self.model, self.out / "model.onnx", provider="cpu")
        largest = max(row.rel for row in exported.parity)
        self.result.facts["parity"] = largest
        self.end("export", f"folded, checked at three sizes, largest difference {largest:.1e}")

    def runtime(self) -> None:
        """Predict the held-out texts in ONNX Runtime, and compare with torch."""
        from lora_fx.fx.load import minilm
        from lora_fx.onnx.session import open_session

        session = open_session(self.out / "model.onnx", "cpu")

        def in_runtime(ids: Array, mask: Array) -> Array:
            return session.run({"input_ids": ids, "attention_mask": mask})["output"]

        scores = minilm.run_all(in_runtime, self.test_rows)
        predictions_before = self.scores_before.argmax(1)
        predictions_after = self.scores_after.argmax(1)
        equal = int((scores.argmax(1) == predictions_after).sum())
        adapter_files = (self.out / "adapter").iterdir()
        facts = self.result.facts
        facts["runtime_difference"] = float(np.abs(scores - self.scores_after).max())
        facts["predictions_equal"] = equal
        facts["examples"] = len(self.truth)
        facts["shift"] = float(np.abs(self.scores_before - self.scores_after).max())
        facts["moved"] = int((predictions_before != predictions_after).sum())
        facts["bytes"] = {
            "adapter": sum(file.stat().st_size for file in adapter_files),
            "model.onnx": (self.out / "model.onnx").stat().st_size,
        }
        self.end("runtime", f"ONNX Runtime agrees on {equal} of {len(self.truth)} examples")

    def _accuracy(self, scores: Array) -> float:
        return float((scores.argmax(1) == self.truth).mean())


def _in_torch(module: Callable[..., torch.Tensor]) -> Callable[[Array, Array], Array]:
    """Wrap a torch module as a function of numpy token ids and a mask."""
    import torch

    @torch.no_grad()
    def run(ids: Array, mask: Array) -> Array:
        return module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return run


def run(out: Path, size: Size, say: Say) -> Result:
    """Run all stages; they write adapter/, model.onnx and report.json into `out`."""
    stages = Stages(out, size, say)
    stages.data()
    stages.probe()
    stages.insert()
    stages.train()
    stages.export()
    stages.runtime()
    _judge(stages.result, size)
    (out / "report.json").write_text(json.dumps(vars(stages.result), indent=1))
    return stages.result


def _judge(result: Result, size: Size) -> None:
    """Record every promise of the demo that the result breaks."""
    facts = result.facts
    first_loss, last_loss = facts["loss"]
    gain = facts["after"] - facts["probe"]
    if facts["probe"] > 0.70:
        result.failures.append(f"the probe reaches {facts['probe']:.3f}, above .70: too easy")
    if facts["before"] != facts["probe"]:
        result.failures.append("inserting branches with B = 0 changed the accuracy")
    if gain < size.gain:
        result.failures.append(f"after - probe is {gain:+.3f}, expected {size.gain:+.2f} or more")
    if size.gain < 0:  # a few noisy steps: the adapter has to act, no more
        if facts["shift"] < 1e-3:
            result.failures.append("training moved no score")
    elif not facts["moved"] or last_loss >= first_loss:
        result.failures.append("training moved no prediction or did not lower the loss")
    if facts["predictions_equal"] != facts["examples"]:
        result.failures.append("ONNX Runtime and torch predict differently")


def table(result: Result, out: Path) -> str:
    """The results as a table."""
    facts = result.facts
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items())
    rows = [
        ("targets", f"{facts['targets']}, {facts['adapted_share']:.1%} of the weight FLOPs"),
        ("parameters trained", f"{facts['trained']:,} of {facts['trained'] + facts['frozen']:,}"),
        ("accuracy: linear probe", f"{facts['probe']:.3f}"),
        ("accuracy: before training", f"{facts['before']:.3f}"),
        (
            "accuracy: after training",
            f"{facts['after']:.3f}  ({facts['after'] - facts['probe']:+.3f})",
        ),
        ("adapter/", f"{facts['bytes']['adapter'] / 1e6:.1f} MB"),
        ("model.onnx", f"{facts['bytes']['model.onnx'] / 1e6:.1f} MB"),
        ("ONNX Runtime vs torch", f"largest difference {facts['runtime_difference']:.1e}"),
        ("predictions equal", f"{facts['predictions_equal']} of {facts['examples']}"),
        ("seconds", f"{sum(result.seconds.values()):.0f}  ({stages})"),
        ("written to", str(out)),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


def refusal(result: Result) -> NoEffectError | None:
    """The error if the result breaks a promise of the demo; else None."""
    if not result.failures:
        return None
    return NoEffectError("; ".join(result.failures), "report.json contains every number")
