"""Run every check on every model of the zoo and write RESULTS.md: `python -m tests.zoo.results`.

Each model runs in a separate process with a time limit. results.json holds the rows of all models.
With `--only NAME ...`, only these models run, and the other rows are kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .columns import OURS, PEFT, PEFT_TOL, Cell, ours, peft
from .models import ZOO, Entry

HERE = Path(__file__).parent
ROWS = HERE / "results.json"
TABLE = HERE / "RESULTS.md"
PACKAGES = "torch transformers timm torchvision peft onnx onnxscript onnxruntime-gpu numpy"
COLUMNS = {**OURS, **PEFT}
RUN = "run"
"""The key in a row for the time when its run began, and how long that run took."""
Row = dict[str, list[Any]]  # column: [shown, passes, why]


def work(name: str, to: Connection) -> None:
    """Send the cells of all columns of one model; this runs in a separate process."""
    warnings.simplefilter("ignore")
    for stream in (1, 2):  # ONNX Runtime writes there by itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for part in (ours, peft) if ZOO[name].captures else (ours,):
        for cell in part(name):
            to.send(cell)
            if cell.column == "eval" and not cell.ok:
                break
    to.close()


def measure(names: Sequence[str], jobs: int, limit: float, rows: dict[str, Row]) -> None:
    """Run models, `jobs` at a time, and fill their rows when results arrive."""
    context = multiprocessing.get_context("fork")  # the packages are imported once
    todo, began = list(names), time.monotonic()
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    running: dict[Connection, tuple[str, Any, float, Row]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            name = todo.pop(0)
            ours_end, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours_end] = (name, process, time.monotonic(), {RUN: [stamp, True, ""]})
        ready = wait(list(running), timeout=1.0)
        for end in list(running):
            name, process, start, row = running[end]
            ended = ""
            if end in ready:
                try:
                    cell: Cell = end.recv()
                    row[cell.column] = [cell.shown, cell.ok, cell.why]
                    continue
                except EOFError:
                    process.join()
                    ended = f"the process ended with {process.exitcode}" * bool(process.exitcode)
            elif time.monotonic() - start < limit:
                continue
            else:
                process.kill()
                process.join()
                ended = f"stopped after {limit:.0f} s"
            if ended:
                lost = next(c for c in COLUMNS if c not in row)
                row[lost] = ["stopped" if "stopped" in ended else "crash", False, ended]
            rows[name] = row
            write(rows)
            del running[end]
            good = passes(row, list(OURS))
            text = "ok" if good else ", ".join(c for c in OURS if not passes(row, [c]))
            print(f"{time.monotonic() - start:6.1f} s  {name}: {text}", flush=True)
    wall = f"{(time.monotonic() - began) / 60:.0f} minutes, {jobs} models at once"
    for name in names:
        rows[name][RUN][2] = wall
    write(rows)
    print(wall, flush=True)


def write(rows: dict[str, Row]) -> None:
    """Write results.json, one row a line, and the table."""
    known = {name: rows[name] for name in ZOO if name in rows}
    lines = [f"{json.dumps(n)}: {json.dumps(r, ensure_ascii=False)}" for n, r in known.items()]
    ROWS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    TABLE.write_text(table(known))


def passes(row: Row, columns: Sequence[str]) -> bool:
    """True if all of these columns pass."""
    return all(row.get(c, ["", False, ""])[1] for c in columns)


def table(rows: dict[str, Row]) -> str:
    """The text of RESULTS.md."""
    notes: dict[str, int] = {}
    body = []
    for name, row in rows.items():
        cells = [f"`{name}`"]
        for column in COLUMNS:
            shown, ok, why = row.get(column, ["", True, ""])
            cells.append(_cell(shown, ok, why, notes))
        body.append(f"| {' | '.join(cells)} |")
    head = ["model", *OURS.values(), *PEFT.values()]
    return "\n".join(
        [
            *_top(rows),
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *body,
            "",
            "## Reasons",
            "",
            *(f"{i}. {why}" for why, i in notes.items()),
            "",
        ]
    )


def _cell(shown: str, ok: bool, why: str, notes: dict[str, int]) -> str:
    if not why:
        return shown
    text = why.replace("|", "\\|").replace("<", "&lt;")
    mark = f"<sup>{notes.setdefault(text, len(notes) + 1)}</sup>"
    return f"{shown}{mark}" if ok else f"**{shown}**{mark}"


def _runs(rows: dict[str, Row]) -> list[str]:
    """Which rows are of which run: the largest first, and the others by name."""
    runs: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        stamp, _, wall = row.get(RUN, ["a time not recorded", True, ""])
        runs.setdefault((stamp, wall), []).append(name)
    (stamp, wall), *more = sorted(runs, key=lambda r: -len(runs[r]))
    took = f" ({wall})" if wall else ""
    lines = [f"- {len(runs[stamp, wall])} rows come from one run, which began {stamp}{took}."]
    for other in more:
        names = ", ".join(f"`{n}`" for n in runs[other])
        lines.append(f"- These rows come from a run that began {other[0]}: {names}.")
    return lines


def _top(rows: dict[str, Row]) -> list[str]:
    entries: dict[str, Entry] = {n: ZOO[n] for n in rows}
    able = {n: r for n, r in rows.items() if entries[n].captures}
    refused = len(rows) - len(able)
    whole = sum(passes(r, list(OURS)) for r in able.values())
    theirs = sum(passes(r, list(PEFT)) for r in able.values())
    single = ", ".join(
        f"{label} {sum(passes(r, [c]) for r in able.values())}" for c, label in OURS.items()
    )
    peft_single = ", ".join(
        f"{label} {sum(passes(r, [c]) for r in able.values())}" for c, label in PEFT.items()
    )
    packages = ", ".join(f"{p} {version(p)}" for p in PACKAGES.split())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [
        "# The zoo, model by model",
        "",
        "Written by `python -m tests.zoo.results`; do not edit it by hand. The models have random",
        "weights; every parameter is redrawn. Rank 2, on the CPU.",
        "",
        f"- {len(rows)} models. torch.export can capture {len(able)} of them; {refused} are there"
        " because it refuses them.",
        f"- **{whole} of {len(able)}** pass every column of lora-fx. Column by column: {single}.",
        f"- {theirs} of {len(able)} pass every column of PEFT. Column by column: {peft_single}.",
        *_runs(rows),
        f"- {today}, Python {platform.python_version()}, {packages}.",
        "",
        "Columns of lora-fx:",
        "",
        "- eval, train: capture in this mode.",
        "- targets: the number of targets.",
        "- share: the share of the weight matmuls' FLOPs that targets reach.",
        "- FLOPs: the FLOPs of the targets, of the refused weights (depthwise only) and of the",
        "  matmuls between activations, together, equal torch's own count within .1 %.",
        "- effect: how much a random adapter changes the output (.05 to 5). Three models leave",
        "  out, by name, targets that change no output; the original model must stay within 1e-12",
        "  in fp64 when such a weight changes by half.",
        "- gradient: every lora_B gets a gradient.",
        "- W+s·BA: insert against the original's code on W + s·BA in fp64.",
        "- fold: fold against insert (gate 1e-6).",
        "- ONNX: the ONNX file is written.",
        "- ORT ×3: ONNX Runtime against insert at three sizes (gate 2e-6). Here and for fold,",
        "  a model above the gate may differ by 4 × its own fp32 error.",
        "",
        "Columns of PEFT, `all-linear` with a random adapter: the number of adapted modules; the",
        "effect; how many modules get a gradient; `merge_and_unload` against the unmerged model;",
        "the ONNX file of the merged model; ONNX Runtime against the merged model (gate"
        f" {PEFT_TOL:g},",
        "one static size).",
        "",
        "Bold cells fail; the number is that of the reason below the table.",
        "",
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.results", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(ZOO), help="Run only these models."
    )
    parser.add_argument("--jobs", type=int, default=2, help="Models at a time.  [default: 2]")
    parser.add_argument(
        "--limit", type=float, default=150.0, help="Seconds for one model.  [default: 150]"
    )
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    for module in ("onnxscript", "onnxruntime", "peft", "timm", "torchvision", "transformers"):
        importlib.import_module(module)
    importlib.import_module("torch.onnx._internal.exporter._core")
    rows = json.loads(ROWS.read_text()) if options.only and ROWS.exists() else {}
    measure(options.only or list(ZOO), options.jobs, options.limit, rows)


if __name__ == "__main__":
    main()
