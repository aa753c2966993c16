"""``python -m tests.zoo.lot --seed S --n 60 --out FILE``: draws a lot and puts it to the columns.

Each model has a process of its own with limits of time and memory; one that hangs counts as that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .draw import Drawn, draws, preload

MEMORY = 10 * 2**30
"""Bytes of data of one child."""
TRIES = 12
"""Draws for one slot before it is left empty."""
Row = dict[str, Any]


def work(drawn: Drawn, cpu: int, to: Connection) -> None:
    """Builds one architecture and runs its columns; a process of its own."""
    warnings.simplefilter("ignore")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    from .build import Unbuilt, build
    from .columns import Lot

    try:
        built, how = build(drawn)
    except Unbuilt as e:
        to.send({"unbuilt": str(e)})
        return
    count = sum(p.numel() for p in built[0].parameters())
    to.send({"how": how, "parameters": count, "class": type(built[0]).__name__})
    started = time.process_time()
    for cell in Lot(str(drawn), built).cells():
        to.send({**asdict(cell), "seconds": round(time.process_time() - started, 1)})
        started = time.process_time()
    to.send({"done": True})


def measure(seed: int, slots: list[int], jobs: int, cpu: int) -> Iterator[Row]:
    """One row a slot, as they end."""
    from .columns import COLUMNS

    context = multiprocessing.get_context("fork")
    todo = list(slots)
    turns = {slot: draws(seed, slot) for slot in slots}
    rows: dict[int, Row] = {slot: {"slot": slot, "replaced": {}} for slot in slots}
    running: dict[Connection, tuple[int, Any, float]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            slot = todo.pop(0)
            drawn = next(turns[slot])
            rows[slot].update(name=str(drawn), family=drawn.family, cells={})
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(drawn, cpu, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = slot, process, time.monotonic()
        ready = wait(list(running), timeout=1.0)
        for end in list(running):
            slot, process, start = running[end]
            row = rows[slot]
            if end in ready:
                try:
                    got = end.recv()
                except EOFError:
                    process.join()
                else:
                    if "column" in got:
                        row["cells"][got.pop("column")] = got
                    else:
                        row.update(got)
                    continue
            elif time.monotonic() - start < 5 * cpu:
                continue
            else:
                process.kill()
                process.join()
            del running[end]
            code = process.exitcode
            if not row.get("done") and "unbuilt" not in row:
                hung = -code in (signal.SIGXCPU, signal.SIGKILL)
                why = f"more than {cpu} s of CPU" if hung else f"the process ended with {code}"
                left = [c for c in COLUMNS if c not in row["cells"]]
                if "how" not in row:
                    row["unbuilt"] = why
                else:
                    for column in left:
                        state = ("hung" if hung else "crash") if column == left[0] else "not run"
                        row["cells"][column] = {"state": state, "why": why}
            if "unbuilt" in row:
                row["replaced"][row["name"]] = row.pop("unbuilt")
                if len(row["replaced"]) < TRIES:
                    todo.insert(0, slot)
                    continue
            row["wall"] = round(time.monotonic() - start, 1)
            yield row


def passes(row: Row, *columns: str) -> bool:
    """True where every one of these columns passes."""
    return all(row["cells"].get(c, {}).get("state") == "ok" for c in columns)


def totals(rows: list[Row]) -> dict[str, Any]:
    """What the lot shows."""
    from .columns import OURS, TORCH

    ran = [r for r in rows if "how" in r]
    exported = [r for r in ran if passes(r, "export")]
    capturable = [r for r in ran if any(passes(r, column) for column in TORCH)]
    trained = [r for r in ran if passes(r, "insert") or passes(r, "attach")]
    cells = [(r, c, v) for r in ran for c, v in r["cells"].items() if c not in TORCH]
    return {
        "run eagerly": len(ran),
        "trained by insert or attach": len(trained),
        "captured by torch.export": len(exported),
        "of those, every column": sum(passes(r, *OURS) for r in exported),
        "captured by torch.export or make_fx": len(capturable),
        "of these, every column": sum(passes(r, *OURS) for r in capturable),
        "every column of all": sum(passes(r, *OURS) for r in ran),
        **{
            state: [f"{r['name']}: {c}" for r, c, v in cells if v["state"] == state]
            for state in ("alarm", "wrong", "raw", "hung", "crash")
        },
    }


def line(row: Row) -> str:
    """One row of the table."""
    from .columns import COLUMNS

    short = {"ok": "ok", "refused": "REF", "not run": "–"}
    states = [row["cells"].get(c, {}).get("state", "–") for c in COLUMNS]
    shown = " ".join(f"{short.get(s, s.upper()):5}" for s in states)
    return f"{row['slot']:2} {shown} {row.get('wall', 0):5.0f} s  {row['name']} ({row.get('how')})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.lot", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--n", type=int, default=60, help="how many models")
    parser.add_argument("--only", type=int, nargs="+", help="these slots of the lot alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cpu", type=int, default=120, help="seconds for one model")
    parser.add_argument("--out", type=Path, help="a JSON file of all results")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    preload()
    from .columns import COLUMNS

    print("   " + " ".join(f"{c[:5]:5}" for c in COLUMNS))
    rows: list[Row] = []
    for row in measure(
        options.seed, options.only or list(range(options.n)), options.jobs, options.cpu
    ):
        rows.append(row)
        print(line(row), flush=True)
        for name, why in row["replaced"].items():
            print(f"     instead of {name}: {why[:100]}")
        for column, cell in row["cells"].items():
            if cell["state"] not in ("ok", "not run"):
                print(f"     {column}: {cell['state']}: {cell['why'][:220]}", flush=True)
        if options.out:
            rows.sort(key=lambda r: int(r["slot"]))
            found = {"seed": options.seed, "totals": totals(rows), "rows": rows}
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for what, value in totals(rows).items():
        text = f"{len(value)}: {', '.join(value)}" if isinstance(value, list) else str(value)
        print(f"{what}: {text}")


if __name__ == "__main__":
    main()
