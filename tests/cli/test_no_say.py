"""An option that is given and has no effect is an error, in every command: a table, a verb a row.

Every option of every command stands in one of two tables. ALWAYS says why it always has a say;
NO_SAY has a command line for each way in which it has none, and the words that the error says of
it. The same line without the option is no error of this kind.
"""

from __future__ import annotations

import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lora_fx
from lora_fx.cli.group import COMMANDS
from lora_fx.formats.io import save_adapter
from lora_fx.passes.verbs.program import save_program
from tests.cli.test_cli import MODEL, run
from tests.mistakes.files import SHAPES, onnx_file, updates

WRITES = "names what is written, or permits to replace it"
READS = "names what is read"
PERMITS = "permits what may come up"
GOAL = "is what the command is about"
TARGETS = "chooses targets of any model"
RUNS = "says how any run goes"
DATA = "is data that any of its options may need"

EVERYWHERE = ["as_json", "config", "save_config", "report", "attest", "force", "no_memory_check"]
"""Options of every command, which are of its result."""
ALWAYS: dict[str, dict[str, str]] = {
    "targets": {"model": READS},
    "insert": {
        "model": READS, "output": WRITES, "plan": TARGETS, "exclude": TARGETS, "variant": TARGETS,
        "init": TARGETS, "dead": RUNS, "inputs_file": READS, "seed": RUNS,
    },
    "train": {
        "model": READS, "data": READS, "output": WRITES, "label": DATA, "loss": GOAL,
        "eval_data": DATA, "curve": WRITES, "probe": GOAL, "device": RUNS, "steps": RUNS,
        "batch_size": RUNS, "lr": RUNS, "schedule": RUNS, "optimizer": RUNS,
        "weight_decay": RUNS, "clip": RUNS,
        "accumulate": RUNS, "gradient_accumulation_steps": RUNS, "mixed_precision": RUNS,
        "activation_checkpointing": RUNS, "save_state": WRITES, "resume": READS, "seed": RUNS,
        "sweep": GOAL, "seeds": RUNS,
        "trust": PERMITS, "inputs_file": DATA, "dynamic": RUNS, "static": RUNS,
    },
    "merge": {
        "base": READS, "adapters": READS, "out": WRITES, "dry_run": RUNS, "how": GOAL,
        "again": PERMITS, "trust": PERMITS, "names": READS, "old_names": READS,
    },
    "merge-all": {
        "base": READS, "adapters": READS, "out": WRITES, "processes": RUNS, "shard": RUNS,
        "dtype": GOAL, "allow_unused": PERMITS, "allow_missing": PERMITS, "any_base": PERMITS,
        "other_readers": PERMITS, "untie": PERMITS, "add": PERMITS, "again": PERMITS,
        "dequantise": GOAL, "requantise": GOAL, "link": RUNS, "trust": PERMITS,
    },
    "export": {
        "model": READS, "adapters": READS, "output": WRITES, "mode": GOAL, "optimise": GOAL,
        "target": GOAL, "triton": WRITES, "trust": PERMITS, "provider": RUNS, "probe": WRITES,
    },
    "extract": {
        "base": READS, "tuned": READS, "output": WRITES, "energy": GOAL, "include": TARGETS,
        "exclude": TARGETS, "also_full": GOAL, "whole": GOAL, "allow_missing": PERMITS,
        "fan_in_fan_out": READS, "seed": RUNS, "trust": PERMITS,
    },
    "truncate": {"adapter": READS, "table": GOAL, "trust": PERMITS},
    "plan": {
        "data": DATA,
        "model": READS, "output": WRITES, "budget": GOAL, "method": GOAL, "scale": GOAL,
        "include": TARGETS, "exclude": TARGETS, "weights": READS, "inputs_file": READS,
        "dynamic": RUNS, "static": RUNS, "trust": PERMITS,
    },
    "convert": {
        "adapter": READS, "output": WRITES, "name": GOAL, "base": READS, "kind": GOAL,
        "include": TARGETS, "exclude": TARGETS, "trust": PERMITS, "fuse": GOAL, "split": GOAL,
    },
    "verify": {"a": READS, "b": READS, "run": GOAL, "trust": PERMITS},
    "probe": {"adapter": READS, "base": GOAL, "server": GOAL},
    "doctor": {
        "base": READS, "adapter": READS, "server": GOAL,
        **dict.fromkeys(
            (
                "dtype", "allow_unused", "allow_missing", "any_base", "other_readers", "untie",
                "add", "again", "dequantise", "requantise", "link", "trust",
            ),
            "is one of the merge that is meant",
        ),
    },
    "bench": {"files": READS, "inputs_file": READS, "rounds": RUNS, "threads": RUNS,
              "provider": RUNS},
    "demo": {"output": WRITES, "quick": GOAL},
}  # fmt: skip

GRAPH = ("--weights base.safetensors", "--dynamic x:0", "--static x:0", "--no-repeat")
INSERT = "insert model.py:build -o out"
TRAIN = "train model.py:build data.npz -o out"
MERGE = "merge base.safetensors start -o out.safetensors"
IN_ONNX = "merge m.onnx start -o out.onnx"
EXPORT = "export model.py:build start -o out.onnx"
PROGRAM = "export model.py:build start -o out.pt2 --mode switch"
FROM_ONNX = "export m.onnx start -o out.onnx"
PLAN = "plan model.py:build -o out.json"
PROBE = "probe start --server http://127.0.0.1:9"
FITS = "verify base.safetensors start"
TENSORS = "verify base.safetensors tuned.safetensors"
NO_SAY: list[tuple[str, str, str]] = [
    # a command line, the option, what decides instead
    *(
        ("targets m.onnx", o, "for m.onnx, which is already a graph")
        for o in (*GRAPH, "--train", "--trust")
    ),
    *(("targets base.safetensors", o, "only names and shapes") for o in (*GRAPH, "--train")),
    ("targets base.safetensors", "--inputs inputs.npz", "only names and shapes"),
    ("targets out.pt2", "--no-repeat", "which is traced already"),
    (f"{INSERT} --plan plan.json", "--rank 8", "with --plan plan.json"),
    (f"{INSERT} --plan plan.json", "--alpha 8", "with --plan plan.json"),
    (f"{INSERT} --plan plan.json", "--include fc1", "with --plan plan.json"),
    (INSERT, "--data data.npz", "--data has no effect with --init kaiming"),
    (INSERT, "--label labels", "for --init kaiming, which reads no data"),
    (INSERT, "--loss ce", "for --init kaiming, which reads no data"),
    (f"{INSERT} --init pissa", "--loss mse", "for --init pissa, which reads no data"),
    (f"{INSERT} --init eva --data data.npz", "--loss ce", "which reads no gradient"),
    *(
        ("insert m.onnx -o out.onnx", o, "for m.onnx, which is already a graph")
        for o in (*GRAPH, "--trust", "--also-train fc1", "--dropout 0.0", "--quantise nf4",
                  "--invocation 5")
    ),
    ("insert out.pt2 -o out", "--no-repeat", "which is traced already"),
    (f"{TRAIN} --plan plan.json", "--rank 8", "with --plan plan.json"),
    (f"{TRAIN} --plan plan.json", "--alpha 8", "with --plan plan.json"),
    (f"{TRAIN} --plan plan.json", "--include fc1", "with --plan plan.json"),
    (f"{TRAIN} --schedule constant", "--warmup 0.05", "for --schedule constant"),
    (TRAIN, "--together 2", "without --sweep or --seeds"),
    (TRAIN, "--save-runs runs", "without --sweep or --seeds"),
    (f"{TRAIN} --validation 0", "--split-seed 1", "when no share of DATA is held out"),
    (f"{TRAIN} --eval-data data.npz", "--validation 0.1", "with --eval-data data.npz"),
    (f"{TRAIN} --steps 2", "--epochs 3", "with --steps 2"),
    (f"{TRAIN} --steps 2 --validation 0", "--checks 10", "when no example is held out"),
    (f"{TRAIN} --steps 2 --validation 0 --save-state s --save-every 1", "--checks 10", "held out"),
    (f"{TRAIN} --steps 2 --validation 0", "--patience 2", "needs held-out examples"),
    (f"{TRAIN} --steps 2", "--save-every 2", "needs a folder for states"),
    (f"{TRAIN} --steps 2", "--save-total-limit 2", "needs a folder for states"),
    (f"{TRAIN} --steps 2", "--max-length 16", "for a model without a tokenizer"),
    *(
        ("train held.pt2 data.npz -o out --steps 2", o, "so --")
        for o in ("--rank 8", "--alpha 8", "--include fc1", "--exclude fc1",
                  "--also-train fc1.bias", "--variant lora", "--init kaiming", "--dropout 0.0",
                  "--quantise nf4", "--dead drop", "--plan plan.json", "--invocation 5")
    ),
    ("train held.pt2 data.npz -o out --steps 2", "--weights base.safetensors", "its weights"),
    ("train held.pt2 data.npz -o out --steps 2", "--no-repeat", "which is traced already"),
    (MERGE, "--rank 4", "for a sum mix"),
    (f"{MERGE} --how linear", "--rank 4", "for a linear mix"),
    (MERGE, "--max-shard-size 5GB", "works only with --dequantise"),
    (MERGE, "--lossy", "works only with --requantise"),
    (f"{MERGE} --requantise", "--dtype fp32", "does not work with --requantise"),
    (f"{MERGE} --requantise", "--dequantise", "exclude each other"),
    (MERGE, "--names m.json", "--names is for .onnx bases only"),
    (MERGE, "--map m.json", "--names is for .onnx bases only"),
    (MERGE, "--delta", "for .onnx bases only"),
    (MERGE, "--run", "for .onnx bases only"),
    (MERGE, "--link", "for base.safetensors, a single file"),
    (IN_ONNX, "--link", "for m.onnx, a graph"),
    (IN_ONNX, "--threads 1", "for m.onnx, a graph"),
    (IN_ONNX, "--rank 4", "for a sum mix"),
    *(
        (IN_ONNX, o, "for checkpoints, not for .onnx files")
        for o in ("--dtype fp32", "--allow-unused", "--allow-missing", "--any-base", "--untie",
                  "--other-readers", "--add", "--dequantise", "--requantise", "--lossy",
                  "--max-shard-size 5GB")
    ),
    *(
        (f"{verb} base.safetensors start{out}", o, "works only with --")
        for verb, out in (("merge-all", " -o all"), ("doctor", ""))
        for o in ("--max-shard-size 5GB", "--lossy")
    ),
    *(
        (EXPORT, o, "ignore an option of mode")
        for o in ("--include fc1", "--exclude fc1", "--rank 4", "--loss ce", "--optimizer sgd",
                  "--weight-decay 0.1", "--clip 1", "--scales")
    ),
    *(
        (f"{EXPORT} --mode switch", o, "ignore an option of mode")
        for o in ("--rank 4", "--loss ce", "--precision float16", "--scales")
    ),
    *(
        (f"{EXPORT} --mode batch", o, "ignore an option of mode")
        for o in ("--include fc1", "--exclude fc1", "--rank 4", "--optimise", "--clip 1")
    ),
    (f"{EXPORT} --mode batch", "--variant dora", "no slots for adapters of a variant"),
    (f"{EXPORT} --mode switch", "--largest batch=4", "largest sizes are for .pt2 files"),
    (f"{PROGRAM} --rank 4", "--largest rank=8", "the rank is fixed"),
    *(
        (PROGRAM, o, "for .onnx files")
        for o in ("--opset 20", "--accuracy-level 4", "--target cuda", "--triton out")
    ),
    *((PROGRAM, o, "ignore an option of mode") for o in ("--optimise", "--precision float16")),
    (PROGRAM, "--within", "for a .pt2 file"),
    (f"{PROGRAM} --provider cpu", "--opset 20", "for .onnx files"),
    (PROGRAM, "--quantise nf4", "codes of 4 or 8 bits"),
    (f"{EXPORT} --mode train", "--quantise nf4", "float32 only"),
    (f"{EXPORT} --mode train", "--accuracy-level 4", "accuracy level 4 is not available"),
    (EXPORT, "--tol 0.1", "this export rounds nothing"),
    (EXPORT, "--genai out", "without a cache"),
    (EXPORT, "--max-batch 4", "for a Triton repository"),
    (EXPORT, "--names m.json", "--names is for .onnx models only"),
    (EXPORT, "--map m.json", "--names is for .onnx models only"),
    *(
        (FROM_ONNX, o, "m.onnx")
        for o in (*GRAPH, "--opset 20", "--trust", "--quantise nf4", "--accuracy-level 0",
                  "--cache")
    ),
    *(
        (FROM_ONNX, o, "when an adapter is merged into an .onnx file")
        for o in ("--inputs inputs.npz", "--within")
    ),
    ("export held.pt2 -o out.onnx", "--no-repeat", "which is traced already"),
    ("extract base.safetensors tuned.safetensors -o out", "--max-rank 8", "only with energy"),
    ("extract base.safetensors tuned.safetensors -o out --energy 0.9", "--rank 8", "exclude each"),
    *(
        ("truncate start -o out --rank 1", o, "without --table DATA")
        for o in ("--model model.py:build", "--label labels", "--loss ce",
                  "--weights base.safetensors")
    ),
    *(
        ("truncate start --table data.npz --model model.py:build", o, "with --table")
        for o in ("-o out", "--rank 1", "--params 9", "--energy 0.9", "--max-error 0.1",
                  "--max-abs-error 0.1")
    ),
    ("truncate start -o out --rank 1", "--energy 0.9", "rank and energy are given together"),
    *(
        (PLAN, o, "for --method uniform, which reads no data")
        for o in ("--label labels", "--loss ce", "--examples 8", "--max-length 8", "--seed 0")
    ),
    ("plan model.py:build data.npz -o out.json --method eva", "--loss ce", "reads no gradient"),
    ("plan model.py:build data.npz -o out.json --method kfac", "--max-length 9", "tokenizer"),
    ("plan out.pt2 -o out.json", "--no-repeat", "which is traced already"),
    ("convert start -o x", "--rank 4", "need --as lora"),
    ("convert start -o x", "--energy 0.9", "need --as lora"),
    ("convert start -o x", "--model-type llama", "without a --format that has a layout"),
    ("convert start -o x", "--map m.json", "either --fuse or --split"),
    ("convert start -o x --format peft", "--for m.onnx", "works with onnx_adapter"),
    *(
        (FITS, o, "for base.safetensors" if o.startswith("--in") else "")
        for o in ("--adapter start", "--tol 0.1", "--all", "--provider cpu", "--inputs inputs.npz",
                  *GRAPH)
    ),
    *(
        (TENSORS, o, "tensors are compared")
        for o in ("--provider cpu", "--inputs inputs.npz", *GRAPH)
    ),
    (TENSORS, "--all", "except for tensor files with an --adapter"),
    *(("verify m.onnx m.onnx", o, "which are already graphs") for o in GRAPH),
    ("verify m.onnx m.onnx", "--all", "except for tensor files with an --adapter"),
    ("verify model.py:build model.py:build", "--provider cpu", "when no .onnx file is run"),
    *(
        ("probe start --base model.py:build -o out.json", o, "without --server URL")
        for o in ("--model x", "--base-model x", "--other start", "--timeout 5")
    ),
    (f"{PROBE} --model x", "--trust", "without --base MODEL"),
    (f"{PROBE} --model x", "-o out.json", "without --base MODEL"),
    ("bench m.onnx --inputs inputs.npz", "--size 1,8", "which has one size"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as code, as tensors and as a graph, adapters of it, data and a plan."""
    here = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    (here / "model.py").write_text(MODEL)
    base = {k: rng.standard_normal(s).astype("f") for k, s in SHAPES.items()}
    save_file(base, here / "base.safetensors")
    save_file({k: v + 1 for k, v in base.items()}, here / "tuned.safetensors")
    save_adapter(updates(rng, SHAPES), here / "start")
    onnx_file(here / "m.onnx", base)
    x = rng.standard_normal((40, 8)).astype("f")
    np.savez(here / "data.npz", x=x, labels=np.arange(40) % 5)
    np.savez(here / "inputs.npz", x=x)
    (here / "m.json").write_text("{}")
    model = lora_fx.load_model(f"{here}/model.py:build").module
    args = (torch.randn(3, 8),)
    lora_fx.plan(model, args, budget="uniform:2").save(here / "plan.json")
    save_program(lora_fx.insert(model, args, rank=2), here / "held.pt2")
    return here


def commands() -> dict[str, click.Command]:
    found = {}
    for name in COMMANDS:
        module: Any = import_module(f"lora_fx.cli.{name.replace('-', '_')}")
        found[name] = module.command
    return found


def named(command: click.Command, option: str) -> str:
    """The parameter that a text of a command line is for."""
    word = option.split()[0]
    if not word.startswith("-"):
        return "data"
    return next(p.name or "" for p in command.params if word in (*p.opts, *p.secondary_opts))


def test_every_option_of_every_command_is_in_a_table() -> None:
    found = commands()
    seen: dict[str, set[str]] = {name: set(ALWAYS[name]) for name in found}
    for line, option, _ in NO_SAY:
        name = line.split()[0]
        seen[name].add(named(found[name], option))
    missing = set[tuple[str, str]]()
    for name, command in found.items():
        every = {p.name for p in command.params} - set(EVERYWHERE)
        missing |= {(name, option) for option in every - seen[name]}
        assert set(ALWAYS[name]) <= every, f"{name}: {sorted(set(ALWAYS[name]) - every)} are gone"
    assert not missing


@pytest.mark.parametrize(("line", "option", "decides"), NO_SAY)
def test_an_option_without_a_say_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    option: str,
    decides: str,
) -> None:
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    code, _, error = run(capsys, *shlex.split(f"{line} {option}"))
    written = set(folder.iterdir()) - before - {folder / "__pycache__"}
    for left in written:  # so that one row that fails does not fail others
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert code == 2 and not written, error
    word = option.split()[0].lstrip("-") if option.startswith("-") else "DATA"
    assert word in error or "has no effect" not in error
    assert decides in error
    assert "mistake of lora-fx" not in error
