"""merge-all: every adapter of a fleet by itself."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.checkpoint.merge_all import Job, _Running, jobs_of
from lora_fx.cli import main
from lora_fx.errors import LoraFxError


def adapter(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 16)), rng.standard_normal((24, 2))
    return Adapter({"fc.weight": LowRank(a.astype("f4"), b.astype("f4"), alpha=3.0)})


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(9)
    weights = {"fc.weight": rng.standard_normal((24, 16)).astype("f4"), "n": np.ones(3, "f4")}
    save_file(weights, tmp_path / "base.safetensors")
    for i in range(4):
        save_adapter(adapter(i), tmp_path / f"run{i}" / "adapter")
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merges run in this process, one after the other; the test of each starts processes."""
    one = threading.Lock()

    def run_here(_: _Running, command: Sequence[str]) -> tuple[Any, str, str]:
        out, err = io.StringIO(), io.StringIO()
        said = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with one, said[0], said[1], pytest.raises(SystemExit) as end:
            main(list(command[command.index("merge") :]))  # behind python -P -m lora_fx.cli
        return end.value.code, out.getvalue(), err.getvalue()

    monkeypatch.setattr(_Running, "run", run_here)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[dict[str, Any]], str]:
    with pytest.raises(SystemExit) as end:
        main(["merge-all", "base.safetensors", *argv, "--json"])
    out, err = capsys.readouterr()
    code = end.value.code
    assert isinstance(code, int)
    return code, json.loads(out)["merges"], err


RUNS = [f"run{i}/adapter" for i in range(4)]


def test_each_is_the_merge_of_its_adapter(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = run(capsys, *RUNS, "-o", "out", "-j", "2")
    assert code == 0 and {r["adapter"] for r in rows} == set(RUNS)
    base = load_file(fleet / "base.safetensors")["fc.weight"].astype(np.float64)
    for i in range(4):
        u = adapter(i).lowrank["fc.weight"]
        want = base + 1.5 * u.b.astype(np.float64) @ u.a.astype(np.float64)
        got = load_file(fleet / "out" / f"run{i}__adapter.safetensors")["fc.weight"]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        (row,) = (r for r in rows if r["adapter"] == RUNS[i])
        assert row["tensors"] == 1 and row["gain"] == pytest.approx(1, abs=1e-3)
        size = np.linalg.norm(want - base) / np.linalg.norm(base)
        assert row["ratio"] == pytest.approx(size, rel=1e-4)


def test_a_row_has_the_largest_update_and_the_least_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [{"ratio": 0.1, "gain": 0.9}, {"ratio": 0.3, "gain": 0.99}, {"ratio": None}]
    said = json.dumps({"ok": True, "warnings": ["w"], "tensors": tensors})
    running = _Running("base", [], None)
    monkeypatch.setattr(running, "run", lambda command: (0, said, ""))
    row = running.result(Job("a", 1.0, tmp_path / "out"))
    assert (row["tensors"], row["ratio"], row["gain"]) == (3, 0.3, 0.9) and row["warnings"] == ["w"]


def test_the_report_has_the_order_of_the_adapters(
    fleet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(base: str, jobs: list[Job], **options: Any) -> Iterator[dict[str, Any]]:
        yield from ({"adapter": j.adapter, "out": str(j.out), "ok": True} for j in jobs[::-1])

    monkeypatch.setattr("lora_fx.checkpoint.merge_all.merge_all", backwards)
    with pytest.raises(SystemExit):
        main(["merge-all", "base.safetensors", *RUNS, "-o", "out", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert [r["adapter"] for r in said["merges"]] == RUNS


def test_people_get_a_table(
    fleet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the outputs' names, whichever came first; what failed says why as it ends."""

    def three(base: str, jobs: list[Job], **options: Any) -> Iterator[dict[str, Any]]:
        one, two, three, _ = ({"adapter": j.adapter, "out": str(j.out), "ok": True} for j in jobs)
        yield {**three, "kept": True}
        yield {**two, "ok": False, "error": "it is damaged", "hint": "write it again"}
        yield one

    monkeypatch.setattr("lora_fx.checkpoint.merge_all.merge_all", three)
    with pytest.raises(SystemExit) as end:
        main(["merge-all", "base.safetensors", *RUNS, "-o", "out"])
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert [line.split() for line in out.splitlines()] == [
        ["adapter", "result", "output"],
        ["-" * 12, "-" * 6, "-" * 29],
        ["run0/adapter", "merged", "out/run0__adapter.safetensors"],
        ["run1/adapter", "failed"],
        ["run2/adapter", "kept", "out/run2__adapter.safetensors"],
    ]
    assert "run1/adapter: failed: it is damaged (Hint: write it again)" in err


@pytest.mark.usefixtures("here")
def test_a_bad_one_fails_alone(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = fleet / "run2" / "adapter" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    code, rows, err = run(capsys, *RUNS, "-o", "out")
    bad = [r for r in rows if not r["ok"]]
    assert code == 1 and len(rows) == 4 and len(bad) == 1
    assert str(damaged.relative_to(fleet)) in bad[0]["error"] and bad[0]["hint"]
    assert "1 of 4 merges failed" in err
    assert sorted(p.name for p in (fleet / "out").iterdir()) == [
        f"run{i}__adapter.safetensors" for i in (0, 1, 3)
    ]


@pytest.mark.usefixtures("here")
def test_an_interrupted_fleet_goes_on(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *RUNS[:2], "-o", "out")
    before = (fleet / "out" / "run0__adapter.safetensors").stat().st_mtime_ns
    code, rows, _ = run(capsys, *RUNS, "-o", "out")
    assert code == 0 and sum(r.get("kept", False) for r in rows) == 2
    assert (fleet / "out" / "run0__adapter.safetensors").stat().st_mtime_ns == before
    # Another dtype, and another base of the same shapes, are other merges.
    assert run(capsys, *RUNS[:2], "-o", "out", "--dtype", "bfloat16")[0] == 1
    other = load_file(fleet / "base.safetensors")
    was = (fleet / "base.safetensors").read_bytes()
    save_file({k: v + 1 for k, v in other.items()}, fleet / "base.safetensors")
    assert run(capsys, *RUNS[:2], "-o", "out")[0] == 1
    (fleet / "base.safetensors").write_bytes(was)
    # Another adapter under the same name is no such merge.
    save_adapter(adapter(7), fleet / "run0" / "adapter", force=True)
    code, rows, _ = run(capsys, *RUNS, "-o", "out")
    assert code == 1 and [r["adapter"] for r in rows if not r["ok"]] == ["run0/adapter"]
    code, rows, _ = run(capsys, *RUNS, "-o", "out", "--force")
    assert code == 0 and not any(r.get("kept") for r in rows)
    code, rows, err = run(capsys, *RUNS, "-o", "out", "--shard", "5/5")
    assert code == 0 and not rows and "--shard 5/5 is empty: there are 4 adapters" in err


def test_shards_are_a_partition() -> None:
    given = [(f"r{i}/a", 1.0) for i in range(7)]
    whole = jobs_of(given, Path("o"))
    parts = [jobs_of(given, Path("o"), (i, 3)) for i in (1, 2, 3)]
    assert sorted(j.adapter for p in parts for j in p) == [j.adapter for j in whole]
    assert {len(p) for p in parts} == {2, 3}
    assert jobs_of(given[::-1], Path("o"), (2, 3)) == parts[1]
    for i, n in ((0, 3), (4, 3)):
        with pytest.raises(LoraFxError, match="unknown shard"):
            jobs_of(given, Path("o"), (i, n))
    with pytest.raises(LoraFxError, match="is given twice"):
        jobs_of([("a", 1.0), ("./a", 1.0)], Path("o"))


@pytest.mark.parametrize(
    ("code", "err", "says", "hint"),
    [
        (0, "", "ended with code 0 and without a result", "lora-fx merge BASE ADAPTER"),
        (1, "x\nlast line\n", "code 1 and without a result: last line", "lora-fx merge BASE"),
        (-9, "", "was ended by SIGKILL", "if it ran out of memory, run fewer merges at a time"),
        (-11, "", "was ended by SIGSEGV", "try it again"),
        (-15, "terminated", "was ended by SIGTERM: terminated", "try it again"),
        (-99, "", "was ended by signal 99", "try it again"),
    ],
)
def test_a_merge_without_a_result_is_told_as_it_ended(
    code: int, err: str, says: str, hint: str, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Running, "run", lambda self, command: (code, "", err))
    (job,) = jobs_of([("run0/adapter", 1.0)], fleet / "out", (1, 1), ".safetensors")
    row = _Running("base.safetensors", [], None).result(job)
    assert says in row["error"] and hint in row["hint"] and not row["ok"]
