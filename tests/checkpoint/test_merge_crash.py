"""A merge that is killed, fails at any I/O call, meets a full disk or another run of itself.

The output is there whole, byte for byte what an undisturbed run writes, or it is not there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from lora_fx.checkpoint import merge, write
from lora_fx.errors import LoraFxError
from tests.checkpoint.made import Array, adapter, checkpoint, factors, tree
from tests.faults import CALLS, WRITES, Faults

ROOT = Path(__file__).resolve().parents[2]
Q, K, HEAD = "layers.0.q_proj", "layers.1.q_proj", "head"


WAYS = ("", "dequantise", "requantise")


def coded(weights: dict[str, Array]) -> dict[str, Array]:
    """The weights of the adapter in FP8, in blocks of 128."""
    made: dict[str, Array] = {}
    for name, w in weights.items():
        made[name] = w
        if name in (f"{Q}.weight", f"{K}.weight"):
            made[name] = np.clip(w * 100, -440, 440).astype(ml_dtypes.float8_e4m3fn)
            blocks = [-(-n // 128) for n in w.shape]
            made[f"{name}_scale_inv"] = np.full(blocks, 0.01, np.float32)
    return made


class Scene:
    """A base in three shards and an adapter in a folder, and what the output should be."""

    def __init__(self, folder: Path, side: int, way: str = "") -> None:
        self.folder, self.out = folder, folder / "out"
        self.options: dict[str, Any] = {way: True} if way else {}
        self.options |= {"lossy": True} if way == "requantise" else {}
        rng = np.random.default_rng(0)
        weights = {
            f"{n}.weight": rng.standard_normal((side, side + 8)).astype(np.float32)
            for n in (Q, "layers.0.norm", HEAD, K)
        }
        weights = coded(weights) if way else weights
        base = checkpoint(folder / "base", weights, 3, config={"model_type": "llama"})
        (base / "tokenizer.json").write_text("{}" * 1000)
        adapter(folder / "adapter", {n: factors(rng, side, side + 8, 4) for n in (Q, K)})
        self.inputs = tree(folder / "base", folder / "adapter")
        self.merge(folder / "want")
        self.want = self.relative(folder / "want")
        # Not beside the output: nothing else may be left there.
        self.remove(folder / "want")

    def merge(self, out: Path | None = None, workers: int = 1) -> None:
        out = out or self.out
        base, adapter = self.folder / "base", self.folder / "adapter"
        merge.merge(base, adapter, out, threads=workers, **self.options)

    @staticmethod
    def relative(path: Path) -> dict[str, str]:
        return {name.removeprefix(str(path)): what for name, what in tree(path).items()}

    @staticmethod
    def remove(path: Path) -> None:
        subprocess.run(["rm", "-rf", str(path)], check=True)

    def opened(self) -> list[Path]:
        """Files under their temporary name that open."""
        found = []
        for file in self.folder.glob(".out.*/**/*.safetensors"):
            with contextlib.suppress(SafetensorError), safe_open(file, framework="np"):
                found.append(file)
        return found

    def check(self, *, clean: bool = True) -> bool:
        """True where the output is there; raises where anything is wrong with it, or left over."""
        assert tree(self.folder / "base", self.folder / "adapter") == self.inputs
        names = {p.name for p in self.folder.iterdir()} - {"base", "adapter"}
        there = "out" in names
        if there:
            assert self.relative(self.out) == self.want
        assert not clean or names <= {"out"}, names
        # Even under its temporary name a file opens only when all of it is there.
        for file in self.opened():
            done = self.relative(file.parent)[f"/{file.name}"].split()[1]
            assert done == self.want[f"/{file.name}"].split()[1], f"{file} opens and is wrong"
        return there


@pytest.fixture
def memory() -> Iterator[Path]:
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="lora-fx-test-") as folder:
        yield Path(folder)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from tests.checkpoint.test_merge_crash import Scene

scene = Scene(Path(sys.argv[1]), 512, sys.argv[3])
random.seed(0)
whole = 0.0
for i in range(-1, int(sys.argv[2])):
    scene.remove(scene.out)
    start = time.perf_counter()
    child = os.fork()
    if not child:
        scene.merge(workers=2)
        os._exit(0)
    if i < 0:  # the first one lives, and shows how long that is
        os.waitpid(child, 0)
        whole = time.perf_counter() - start
        continue
    time.sleep(random.random() * 1.2 * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    complete = scene.check(clean=False)
    whole *= 0.75 if complete else 1.25  # the first one may have been slow, on a busy machine
    print("complete" if complete else "absent", flush=True)
scene.remove(scene.out)
scene.merge()  # removes what the killed ones left
assert scene.check()
"""


@pytest.mark.parametrize(
    ("kills", "way"), [(20, ""), *(pytest.param(200, w, marks=pytest.mark.slow) for w in WAYS)]
)
def test_killed_at_random_times(kills: int, way: str, memory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(memory), str(kills), way], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = Counter(done.stdout.split())
    print(dict(ends))
    assert ends.total() == kills and ends["absent"] >= kills // 4


def test_no_file_opens_before_its_data_is_there(memory: Path) -> None:
    scene, seen = Scene(memory, 24), []

    def look(done: int, total: int) -> None:
        seen.append((done < total, len(scene.opened())))

    merge.merge(memory / "base", memory / "adapter", scene.out, threads=1, progress=look)
    assert seen.pop() == (False, 3)
    assert len(seen) > 3 and set(seen) == {(True, 0)}


@pytest.mark.parametrize(
    ("error", "step", "way"),
    [
        (errno.EIO, 4, ""),
        (errno.ENOSPC, 2, ""),
        *(pytest.param(errno.EIO, 1, w, marks=pytest.mark.slow) for w in WAYS),
        *(pytest.param(errno.ENOSPC, 1, w, marks=pytest.mark.slow) for w in WAYS),
    ],
)
def test_a_fault_at_an_io_call(error: int, step: int, way: str, memory: Path) -> None:
    """At every call, or some: an error that says what happened, and nothing left."""
    scene, count = Scene(memory, 24, way), Counter[str]()
    only = WRITES if error == errno.ENOSPC else CALLS
    with Faults(only=only) as seen:
        scene.merge()
    for at in range(1, len(seen.calls) + 1, step):
        scene.remove(scene.out)
        raised: BaseException | None = None
        with Faults(at, error, only=only) as faults:
            try:
                scene.merge()
            except BaseException as e:
                raised = e
        call, there = faults.calls[at - 1], scene.check()
        where = f"fault at call {at} of {len(seen.calls)}, {call}: {raised!r}"
        assert raised is None or isinstance(raised, LoraFxError), where
        if raised is None:
            assert there, where
            count["went on"] += 1
            continue
        assert "\n" not in raised.message and raised.hint, where
        count["whole output" if there else "nothing written"] += 1
        # Only the last step, the fsync of the folder around it, may fail after the rename.
        assert not there or call in ("fsync", "open", "close"), where
        if error == errno.ENOSPC:
            assert "disk full" in raised.message or call == "open", where
    print(dict(count))
    assert count["nothing written"] > count["went on"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_of_the_disk_is_said_once(
    at: int, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data goes to the disk while more is folded, and only that call hears that it failed."""
    scene = Scene(memory, 64)
    monkeypatch.setattr(write, "FLUSH", 1)
    with (
        Faults(at, errno.EIO, only={"fdatasync"}) as seen,
        pytest.raises(LoraFxError, match="input/output error"),
    ):
        scene.merge(workers=2)
    assert len(seen.calls) >= at and not scene.check()
    scene.merge(workers=2)
    assert scene.check()


@pytest.mark.parametrize("without", ["", "the check", "the check and the reservation"])
def test_a_20_mb_disk(
    without: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, 1400)  # 31 MB
    scene.out = small_disk / "out"
    if without:
        monkeypatch.setattr(merge, "check_space", lambda folder, needed: None)
    if "reservation" in without:
        monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(
        LoraFxError, match="disk full" if without else r"free; expected at least 31"
    ):
        scene.merge()
    assert os.listdir(small_disk) == []
    assert not scene.check(clean=False)


RUNS = """
import sys
from pathlib import Path
from lora_fx.checkpoint.merge import merge
from lora_fx.errors import LoraFxError

folder = Path(sys.argv[1])
print("ready", flush=True)
for _ in sys.stdin:
    try:
        merge(folder / "base", folder / "adapter", folder / "out", threads=1)
        print("won", flush=True)
    except LoraFxError as e:
        print(e.exit_code, e.message, flush=True)
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_eight_runs_at_once_have_one_winner(rounds: int, memory: Path) -> None:
    scene = Scene(memory, 256)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUNS, str(memory)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(8)
    ]  # fmt: skip
    said: Counter[str] = Counter()
    try:
        for run in runs:
            assert run.stdout and run.stdout.readline() == "ready\n"
        for _ in range(rounds):
            scene.remove(scene.out)
            for run in runs:
                assert run.stdin
                run.stdin.write("go\n")
                run.stdin.flush()
            ends = [run.stdout.readline().strip() for run in runs if run.stdout]
            assert ends.count("won") == 1, ends
            for end in ends:
                assert end == "won" or end.startswith("2 "), end
                said["won" if end == "won" else end.split()[-1]] += 1
            assert scene.check()
    finally:
        for run in runs:
            run.communicate(timeout=60)
    print(dict(said))
