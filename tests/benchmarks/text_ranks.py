"""The right rank, and early stopping, on text: eight seeds of every way to choose ranks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.text_ranks minilm --runs minilm.jsonl
    OMP_NUM_THREADS=1 python -m tests.benchmarks.text_ranks smollm2 --runs smollm2.jsonl

minilm   all-MiniLM-L6-v2 sorts docstrings of the standard library into the volumes of its manual,
         the task of the demo; 4 000 examples. Its head is a linear probe and trains along.
smollm2  SmolLM2-135M-Instruct writes the first line of a docstring after the definition's own line;
         the loss is that of the docstring's tokens; 240 examples.

Arms and seeds were fixed before any of them ran, in the commit that added this file; but `slower`
was added after them, when rank 32 was worse than rank 8 at the rate that suits rank 8. A seed draws
the training examples, their order and the adapter's start; the arms of a seed share all of that, so
that differences are paired. The held-out texts are the same for all seeds: one part of them chooses
the step that is kept, another is the test. The learning rate was chosen once, for uniform rank 8 on
seed 0, which is none of the eight. alpha/rank is 2 everywhere. `random` (Dirichlet shares) is a
control. `cut` is the adapter of uniform rank 32, truncated to the budget and not trained again.
`few` is a uniform rank on a quarter of the examples, which the same steps pass four times: it is
there to overfit, so that keeping a step by validation has something to win. `slower` is a uniform
rank at a third of the learning rate, and `slower-cut` its truncation.

Each run is one line of the file of `--runs`; a second call skips those that are there. The runs so
far stand in `results/text_ranks_TASK.jsonl`: of all seeds only when a table of them is kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import lora_fx
from lora_fx.adapter.truncate import truncation
from lora_fx.data import Table
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.train.loop import Saving, Settings, fit
from lora_fx.fx.train.objective import Objective, objective
from lora_fx.inputs import generator
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.plan import plan
from lora_fx.targets.budget import allocate
from tests.benchmarks.kept import Row, add_keep, report

SEEDS = range(200, 208)
RANKS = (2, 4, 8, 16, 32)
BUDGETS = {"minilm": (2, 8), "smollm2": (8,)}
"""The uniform ranks whose elements the other methods may spend."""
FEW = {"minilm": (8, 32), "smollm2": ()}
"""The uniform ranks that are also trained on few examples."""
SLOWER = {"minilm": (32,), "smollm2": ()}
"""The uniform ranks that are also trained at a lower learning rate."""
SLOWDOWN = 3
"""The learning rate of the others over that one."""
SHARE = 4
"""The examples of a seed over its few examples."""
METHODS = ("importance", "kfac", "eva", "random")
CUT_FROM = 32
BASELINE = 8
CALIBRATION = 128
"""Examples that a method reads to choose ranks."""
STUDENT = 2.365
"""The 97.5 % quantile of Student's t with 7 degrees of freedom."""


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
        captured: The model for a seed's training examples.
        draw: Seed → the training examples.
        validation: Chooses the step that is kept.
        test: Judges.
        settings: Of every run, but for its seed.
        also_train: What trains whole, beside the branches.
    """

    captured: Callable[[Table], Captured]
    draw: Callable[[int], Table]
    validation: Table
    test: Table
    settings: Settings
    also_train: str | None = None


def minilm_task() -> Task:
    """Docstrings and the volumes of the manual that they stand in."""
    from lora_fx.cli.demo_data import topics
    from lora_fx.fx.load import minilm

    data = topics(8000, 750)
    texts, labels = data.train
    held_out, labels_of_held_out = data.test
    pool = _padded(_ids(minilm.tokenise(texts)), labels)
    rest = _padded(_ids(minilm.tokenise(held_out)), labels_of_held_out)

    def captured(training: Table) -> Captured:
        torch.manual_seed(0)
        net = minilm.Classifier(len(data.names)).eval().requires_grad_(False)
        ids = torch.tensor(training.columns["input_ids"])
        mask = torch.tensor(training.columns["attention_mask"])
        with torch.no_grad():
            features = net.features(ids, mask).numpy()
        classes = training.columns["labels"].tolist()
        weight, bias, _ = minilm.best_probe(features, classes, len(data.names))
        net.head.weight.copy_(weight)
        net.head.bias.copy_(bias)
        return capture(net, (), {"input_ids": ids[:2], "attention_mask": mask[:2]})

    return Task(
        captured,
        lambda seed: _drawn(pool, 4000, seed),
        rest.rows(range(200)),
        rest.rows(range(200, len(rest))),
        Settings(steps=250, batch_size=16, lr=3e-3, checks=6),
        "head",
    )


def smollm2_task() -> Task:
    """Definitions of the standard library and the first lines of their docstrings."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "samples"))
    from sources import smollm2

    model, tokenizer = smollm2()
    model.requires_grad_(False)
    model.config.use_cache = False
    rows = []
    labels = []
    for asked, answer in _definitions():
        prompt = tokenizer(asked)["input_ids"]
        ids = prompt + tokenizer(answer)["input_ids"]
        if len(ids) <= 48:
            rows.append(ids)
            labels.append([-100] * len(prompt) + ids[len(prompt) :])
    order = np.random.default_rng(20261201).permutation(len(rows))[:3000]
    texts = _padded([rows[i] for i in order], None)
    width = texts.columns["input_ids"].shape[1]
    answers = [labels[i] + [-100] * (width - len(labels[i])) for i in order]
    columns = {**texts.columns, "labels": np.array(answers, np.int64)}
    table = Table(columns, "labels")

    def captured(training: Table) -> Captured:
        example = {name: torch.tensor(column[:2]) for name, column in training.columns.items()}
        return capture(model, (), example)

    return Task(
        captured,
        lambda seed: _drawn(table.rows(range(240, len(table))), 240, seed),
        table.rows(range(60)),
        table.rows(range(60, 240)),
        Settings(steps=100, batch_size=4, lr=1e-3, checks=5),
    )


TASKS = {"minilm": minilm_task, "smollm2": smollm2_task}


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [row["ids"] for row in rows]


def _padded(rows: Sequence[Sequence[int]], labels: Sequence[int] | None) -> Table:
    """Return texts as one table, padded with 0 on the right."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    columns = {"input_ids": ids, "attention_mask": mask}
    if labels is None:
        return Table(columns)
    return Table({**columns, "labels": np.array(labels, np.int64)}, "labels")


def _drawn(pool: Table, count: int, seed: int) -> Table:
    """Return a seed's training examples."""
    return pool.rows(np.random.default_rng(seed).permutation(len(pool))[:count])


def _definitions() -> Iterator[tuple[str, str]]:
    """Yield (the line of a definition, the first line of its docstring) of the standard library."""
    import sysconfig

    from lora_fx.cli.demo_data import SKIP

    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files for other versions
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            asked = f'def {node.name}({ast.unparse(node.args)}):\n    """'
            if len(first.split()) >= 4 and first not in seen:
                seen.add(first)
                yield asked, f'{first}"""'


@dataclass(frozen=True)
class Arm:
    """A way to choose ranks, and the uniform rank whose elements it may spend."""

    method: str
    rank: int

    def __str__(self) -> str:
        return f"{self.method} {self.rank}"


def arms_of(task: str) -> list[Arm]:
    """Return the arms that train; those of uniform rank come first."""
    arms = [Arm("uniform", rank) for rank in RANKS]
    arms += [Arm(method, rank) for rank in BUDGETS[task] for method in METHODS]
    arms += [Arm("slower", rank) for rank in SLOWER[task]]
    return arms + [Arm("few", rank) for rank in FEW[task]]


def ranks_by_chance(cap: Captured, rank: int, seed: int) -> dict[str, dict[str, float]]:
    """Return ranks by random shares, under the budget of a uniform rank."""
    even = plan(cap, budget=f"uniform:{rank}", exclude="head")
    costs = {row.key: row.cost for row in even.rows}
    targets = find(cap)
    most = {key: targets[key].layout.max_rank for key in costs}
    shares = generator("random ranks", seed).dirichlet(np.ones(len(costs)))
    gains = {
        key: share / np.arange(1.0, most[key] + 1) for key, share in zip(costs, shares, strict=True)
    }
    chosen = allocate(gains, costs, most, even.limit)
    return {key: {"rank": rank, "alpha": 2.0 * rank} for key, rank in chosen.items() if rank}


def ranks_of(cap: Captured, arm: Arm, training: Table, batch: int, seed: int) -> Any:
    """Return what insert takes as `plan`."""
    if arm.method == "random":
        return ranks_by_chance(cap, arm.rank, seed)
    budget = f"uniform:{arm.rank}"
    if arm.method in ("uniform", "slower", "few"):
        return plan(cap, budget=budget, exclude="head").ranks
    read = training.rows(range(CALIBRATION))
    data = [part.columns for part in read.batches(batch)]
    method: Any = arm.method
    return plan(cap, data=data, budget=budget, method=method, exclude="head").ranks


def judged(goal: Objective, test: Table) -> dict[str, float]:
    """Return the loss on the test, and the accuracy where an example has one label."""
    figures = {"loss": goal.mean(test, 50)}
    if test.columns["labels"].ndim == 1:
        hits = 0
        with torch.no_grad():
            for batch in test.batches(50):
                inputs = {
                    name: torch.tensor(column)
                    for name, column in batch.columns.items()
                    if name != "labels"
                }
                best = goal.model(**inputs).argmax(-1).numpy()
                hits += int((best == batch.columns["labels"]).sum())
        figures["accuracy"] = hits / len(test)
    return figures


def elements(model: AdaptedModule) -> int:
    """Return the numbers in A and B."""
    return sum(low.a.size + low.b.size for low in model.adapter().lowrank.values())


def run_arm(task: Task, cap: Captured, training: Table, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm on one seed; return its figures and those of its truncations."""
    settings = replace(task.settings, seed=seed)
    if arm.method == "slower":
        settings = replace(settings, lr=settings.lr / SLOWDOWN)
    chosen = ranks_of(cap, arm, training, settings.batch_size, seed)
    model = lora_fx.insert(cap, plan=chosen, also_train=task.also_train, seed=seed, dead="allow")
    goal, _ = objective(model, training, "ce", False, settings.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        saving = Saving(folder=f"{folder}/state", every=settings.steps)
        curve = fit(model, training, task.validation, "ce", settings, saving=saving)
        (tensors,) = Path(folder).rglob("*.safetensors")
        last = load_file(tensors)
    figures: dict[str, Any] = {
        "arm": str(arm),
        "seed": seed,
        "elements": elements(model),
        "kept step": curve.best_step,
        "verdict": curve.verdict,
        "validation": curve.validation,
        "before": curve.before,
        "kept": judged(goal, task.test),
    }
    cut = {"uniform": "cut", "slower": "slower-cut"}.get(arm.method)
    if cut and arm.rank == CUT_FROM:
        figures["cut"] = {}
        adapter = model.adapter()
        for budget in RANKS[:-1]:
            limit = plan(cap, budget=f"uniform:{budget}", exclude="head").limit
            model.load_adapter(truncation(adapter, params=limit).adapter)
            figures["cut"][f"{cut} {budget}"] = {
                "elements": elements(model),
                **judged(goal, task.test),
            }
        model.load_adapter(adapter)
    if curve.best_step == settings.steps:
        figures["last"] = figures["kept"]
        return figures
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"now/{name}" in last:
                parameter.copy_(last[f"now/{name}"])
    figures["last"] = judged(goal, task.test)
    return figures


def interval(values: Sequence[float]) -> str:
    """Return the mean and the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    half = STUDENT * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.4f} ± {half:.4f}"


def by_seed(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, dict[int, float]]:
    """Return arm → seed → a figure on the test, of the step that was kept."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        found.setdefault(run["arm"], {})[run["seed"]] = run["kept"].get(measure, math.nan)
        for name, cut in run.get("cut", {}).items():
            found.setdefault(name, {})[run["seed"]] = cut.get(measure, math.nan)
    return found


def _differences(figures: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Return the differences of an arm from another one, of the seeds that both have."""
    return [figure - baseline[seed] for seed, figure in figures.items() if seed in baseline]


def table_of_arms(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each arm: means, and differences from uniform ranks of the same budget."""
    rows: list[Row] = []
    losses = by_seed(runs, "loss")
    accuracies = by_seed(runs, "accuracy")
    for arm, figures in losses.items():
        method, _, rank = arm.partition(" ")
        baseline = f"uniform {rank}"
        if method in ("uniform", "slower"):
            baseline = f"uniform {BASELINE}"
        if method == "few":
            baseline = f"few {BASELINE}"
        row: Row = {"what": arm, "seeds": len(figures)}
        row["loss"] = interval(list(figures.values())).lstrip("+")
        if arm != baseline and baseline in losses:
            differences = _differences(figures, losses[baseline])
            row["beside"] = baseline
            row["Δ loss"] = interval(differences)
            row["better"] = f"{sum(d < 0 for d in differences)} of {len(differences)}"
        values = accuracies[arm]
        if not math.isnan(next(iter(values.values()))):
            row["accuracy"] = interval(list(values.values())).lstrip("+")
            if arm != baseline and baseline in losses:
                row["Δ accuracy"] = interval(_differences(values, accuracies[baseline]))
        rows.append(row)
    return rows


def table_of_stops(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each uniform arm: the step that validation kept beside the last one."""
    rows: list[Row] = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of_arm = [run for run in runs if run["arm"] == arm]
        if not arm.startswith(("uniform", "few")):
            continue
        kept = [run["kept"]["loss"] for run in of_arm]
        last = [run["last"]["loss"] for run in of_arm]
        pairs = list(zip(kept, last, strict=True))
        row: Row = {"what": arm}
        row["kept step"] = round(statistics.mean(run["kept step"] for run in of_arm))
        row["loss of kept"] = interval(kept).lstrip("+")
        row["loss of last"] = interval(last).lstrip("+")
        row["kept − last"] = interval([a - b for a, b in pairs])
        row["kept is better"] = f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
        if "accuracy" in of_arm[0]["kept"]:
            row["accuracy, kept − last"] = interval(
                [run["kept"]["accuracy"] - run["last"]["accuracy"] for run in of_arm]
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--runs", required=True, help="The .jsonl file of all runs.")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--arms", nargs="*", help="Only these, such as 'uniform 8'.")
    add_keep(parser)
    options = parser.parse_args()
    file = Path(options.runs)
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(run["arm"], run["seed"]) for run in runs}
    task = TASKS[options.task]()
    for seed in options.seeds:
        arms = [arm for arm in arms_of(options.task) if (str(arm), seed) not in done]
        if options.arms:
            arms = [arm for arm in arms if str(arm) in options.arms]
        if not arms:
            continue
        training = task.draw(seed)
        few = training.rows(range(len(training) // SHARE))
        start = time.process_time()
        cap = task.captured(training)
        for arm in arms:
            if arm.method == "few" and training is not few:
                training = few
                cap = task.captured(few)
            figures = run_arm(task, cap, training, arm, seed)
            figures["seconds"] = round(time.process_time() - start, 1)
            start = time.process_time()
            runs.append(figures)
            with file.open("a") as lines:
                lines.write(json.dumps(figures) + "\n")
            print(seed, arm, figures["seconds"], figures["kept"], figures["last"], flush=True)
    seconds = sum(run["seconds"] for run in runs)
    print(f"{len(runs)} runs, {seconds / 3600:.1f} hours of CPU")
    report("text_ranks", f"{options.task}: ranks", table_of_arms(runs), options.keep)
    report("text_ranks", f"{options.task}: early stopping", table_of_stops(runs), options.keep)


if __name__ == "__main__":
    main()
