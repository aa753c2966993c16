"""The demo's stages: probe, insert, train, export, predict; each timed, each said as it ends."""

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
    """How much the demo does, and what it demands of the result."""

    train: int
    test: int
    steps: int
    gain: float

    @classmethod
    def of(cls, quick: bool) -> Size:
        """The whole demo gains 5 points or more over the probe; the quick one only has to learn."""
        return cls(600, 200, 12, -1.0) if quick else cls(5000, 1000, 480, 0.05)


@dataclass
class Result:
    """What the table and report.json show."""

    facts: Json = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def run(out: Path, size: Size, say: Say) -> Result:
    """All stages; leaves adapter/, model.onnx and report.json in `out`."""
    import torch

    import lora_fx
    from lora_fx.data import Buckets, Table
    from lora_fx.fx.load import minilm
    from lora_fx.fx.train.loop import Settings, fit
    from lora_fx.onnx.session import open_session

    result, started = Result(), time.perf_counter()
    facts = result.facts

    def done(stage: str, text: str) -> None:
        nonlocal started
        now = time.perf_counter()
        result.seconds[stage] = round(now - started, 1)
        started = now
        say(f"{stage}: {text} ({result.seconds[stage]} s)")

    data = topics(size.train, size.test)
    classes = len(data.names)
    texts, labels = data.train
    truth = np.array(data.test[1])
    done("data", f"{len(texts)} docstrings to train on, {len(truth)} held out, {classes} volumes")

    torch.manual_seed(0)
    net = minilm.Classifier(classes).eval().requires_grad_(False)
    rows, held = minilm.tokenise(texts), minilm.tokenise(data.test[0])

    def in_torch(module: Callable[..., torch.Tensor]) -> Callable[[Array, Array], Array]:
        given = torch.from_numpy
        return torch.no_grad()(lambda ids, mask: module(given(ids), given(mask)).numpy())

    features = minilm.run_all(in_torch(net.features), rows)
    weight, bias, decay = minilm.best_probe(features, labels, classes)
    net.head.weight.copy_(weight)
    net.head.bias.copy_(bias)

    def accuracy(scores: Array) -> float:
        return float((scores.argmax(1) == truth).mean())

    before_scores = minilm.run_all(in_torch(net), held)
    facts["probe"] = accuracy(before_scores)
    facts["probe_weight_decay"] = decay
    done("probe", f"a fitted linear probe reaches {facts['probe']:.3f}")

    sample = {"input_ids": torch.ones(4, 9, dtype=torch.long)}
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    model = lora_fx.insert(net, (), sample, rank=8, exclude="head", also_train="head")
    report = model.report()
    facts |= {
        "targets": len(report.targets),
        "reached_share": report.found.reached_share,
        "adapted_share": report.adapted_share,
        "trained": report.trained,
        "frozen": report.frozen,
        "before": accuracy(minilm.run_all(in_torch(model), held)),
    }
    done("insert", f"{len(report.targets)} targets, {report.trained:,} parameters to train")

    y = np.array(labels)
    buckets = Buckets(
        [
            Table({"input_ids": ids, "attention_mask": mask, "labels": y[at]}, "labels")
            for at, ids, mask in minilm.batches(rows, minilm.BATCH)
        ]
    )
    settings = Settings(steps=size.steps, lr=minilm.LR)

    def progress(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0:
            say(f"  step {step} of {steps}: loss {loss:.3f}")

    losses = fit(model, buckets, settings=settings, progress=progress).losses
    after_scores = minilm.run_all(in_torch(model), held)
    tenth = max(1, size.steps // 10)
    loss = [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))]
    facts |= {"after": accuracy(after_scores), "loss": loss}
    done("train", f"{size.steps} steps, accuracy {facts['after']:.3f}")

    lora_fx.save_adapter(model.adapter(), out / "adapter")
    exported = lora_fx.export(model, out / "model.onnx", provider="cpu")
    facts["parity"] = max(p.rel for p in exported.parity)
    done("export", f"folded, checked at three sizes, largest difference {facts['parity']:.1e}")

    session = open_session(out / "model.onnx", "cpu")
    runtime = minilm.run_all(
        lambda ids, mask: session.run({"input_ids": ids, "attention_mask": mask})["output"], held
    )
    facts["runtime_difference"] = float(np.abs(runtime - after_scores).max())
    facts["predictions_equal"] = int((runtime.argmax(1) == after_scores.argmax(1)).sum())
    facts["examples"] = len(truth)
    facts["shift"] = float(np.abs(before_scores - after_scores).max())
    facts["moved"] = int((before_scores.argmax(1) != after_scores.argmax(1)).sum())
    facts["bytes"] = {
        "adapter": sum(f.stat().st_size for f in (out / "adapter").iterdir()),
        "model.onnx": (out / "model.onnx").stat().st_size,
    }
    done("runtime", f"ONNX Runtime agrees on {facts['predictions_equal']} of {len(truth)} examples")
    _judge(result, size)
    (out / "report.json").write_text(json.dumps(vars(result), indent=1))
    return result


def _judge(result: Result, size: Size) -> None:
    """Say what is not as promised."""
    facts = result.facts
    gain = facts["after"] - facts["probe"]
    idle = not facts["moved"] or facts["loss"][1] >= facts["loss"][0]
    quick = size.gain < 0  # a few noisy steps: the adapter has to act, no more
    differ = facts["predictions_equal"] != facts["examples"]
    wrong = {
        f"the probe reaches {facts['probe']:.3f}, above .70: too easy": facts["probe"] > 0.70,
        "inserting branches with B = 0 changed the accuracy": facts["before"] != facts["probe"],
        f"after - probe is {gain:+.3f}, expected {size.gain:+.2f} or more": gain < size.gain,
        "training moved no score": quick and facts["shift"] < 1e-3,
        "training moved no prediction or did not lower the loss": not quick and idle,
        "ONNX Runtime and torch predict differently": differ,
    }
    result.failures += [told for told, is_so in wrong.items() if is_so]


def table(result: Result, out: Path) -> str:
    """The facts for a person to read."""
    f = result.facts
    stages = ", ".join(f"{stage} {s:.0f}" for stage, s in result.seconds.items())
    rows = [
        ("targets", f"{f['targets']}, {f['adapted_share']:.1%} of the weight FLOPs"),
        ("parameters trained", f"{f['trained']:,} of {f['trained'] + f['frozen']:,}"),
        ("accuracy: linear probe", f"{f['probe']:.3f}"),
        ("accuracy: before training", f"{f['before']:.3f}"),
        ("accuracy: after training", f"{f['after']:.3f}  ({f['after'] - f['probe']:+.3f})"),
        ("adapter/", f"{f['bytes']['adapter'] / 1e6:.1f} MB"),
        ("model.onnx", f"{f['bytes']['model.onnx'] / 1e6:.1f} MB"),
        ("ONNX Runtime vs torch", f"largest difference {f['runtime_difference']:.1e}"),
        ("predictions equal", f"{f['predictions_equal']} of {f['examples']}"),
        ("seconds", f"{sum(result.seconds.values()):.0f}  ({stages})"),
        ("written to", str(out)),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


def refusal(result: Result) -> NoEffectError | None:
    """The error when something is not as promised."""
    said = "; ".join(result.failures)
    return NoEffectError(said, "report.json has every number") if said else None
