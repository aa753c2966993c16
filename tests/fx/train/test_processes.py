"""A run of two processes is that of one; a process that fails ends all, and says so alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lora_fx.errors import LoraFxError
from lora_fx.fx.train.processes import ALONE, Processes, found_processes, refuse_sharded_launch
from tests.fx.train.two_processes import RUNS

ROOT = Path(__file__).resolve().parents[3]


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in held:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in held]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw of each run."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.fx.train.two_processes", str(folder / "out")]
    command += free_ports(len(RUNS))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env["STATE"] = str(folder / "state")
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank)}) for rank in range(2)
    ]
    try:
        codes = [p.wait(900) for p in started]
    finally:
        for p in started:
            p.kill()
    assert codes == [0, 9]  # the second one dies in the last run
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["plain", "parts", "labels", "chunks"])
def test_two_are_as_one(both: list[dict[str, Any]], name: str) -> None:
    one, two = RUNS[name](ALONE), both[0][name]
    assert two == both[1][name]  # to the bit, and what they decide
    assert one["best"] == two["best"] and one["warnings"] == two["warnings"] == []
    assert min(one["losses"]) < 0.95 * one["losses"][0]  # it learns
    for what in ("losses", "validation"):
        worst = max(abs(a - b) for a, b in zip(one[what], two[what], strict=True))
        print(f"{name}: {what} of two processes: at most {worst:.1e} from those of one")
        assert worst < 1e-6, what
    assert one["before"] == pytest.approx(two["before"], abs=1e-6)
    assert one["sums"] == pytest.approx(two["sums"], abs=1e-4)


def test_sums(both: list[dict[str, Any]]) -> None:
    three = [[[3.0] * 3] * 2, "torch.float32"]
    assert both[0]["sums"]["sums"] == [three, None, [[1.0], "torch.bfloat16"]]
    assert both[1]["sums"] == both[0]["sums"]


def test_it_goes_on_to_the_bit(both: list[dict[str, Any]]) -> None:
    for seen in both:
        run = seen["resumed"]
        assert run["again"] == run["whole"] and run["from"] == 7
    seeds = [seen["resumed"]["seed"] for seen in both]
    assert seeds[0] != seeds[1]  # their dropout differs


def test_the_one_that_fails_says_so_alone(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["second fails"] == {"elsewhere": "process 1 failed", "code": 2}
    assert second["second fails"] == {"error": "ZeroDivisionError: odd", "code": None}
    assert first["second refuses"] == {"elsewhere": "process 1 failed", "code": 1}
    assert second["second refuses"]["error"].startswith("LoraFxError: no such thing")
    assert "step 3: the loss is nan" in first["all nan"]["error"]
    assert second["all nan"] == {"elsewhere": "process 0 failed", "code": 1}
    assert "process 1 and process 0 have different data" in first["other data"]["error"]
    assert second["other data"] == {"elsewhere": "process 0 failed", "code": 2}
    assert "process 1 and process 0 have different initial values" in first["other start"]["error"]
    assert first["first fails at the end"]["error"] == "OSError: disk full"
    assert second["first fails at the end"] == {"elsewhere": "process 0 failed", "code": 2}


def test_the_one_that_is_killed_is_missed(both: list[dict[str, Any]]) -> None:
    assert (
        "another process of this run ended without an error message"
        in both[0]["second dies"]["error"]
    )
    assert both[0]["second dies"]["code"] == 2 and "second dies" not in both[1]


def test_what_launchers_set() -> None:
    where = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert found_processes({}) == found_processes({"RANK": "0", "WORLD_SIZE": "1"}) == ALONE
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **where}
    assert found_processes(given) == Processes(3, 4, 1)
    assert found_processes({"PMI_RANK": "1", "PMI_SIZE": "2", **where}) == Processes(1, 2, 1)
    for odd, said in (
        ({"WORLD_SIZE": "2", **where}, "rank of this process is not in 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", **where}, "rank of this process is not in 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ):
        with pytest.raises(LoraFxError, match=said):
            found_processes(odd)


def test_a_launch_that_splits_the_model_is_refused() -> None:
    refuse_sharded_launch({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2"})
    with pytest.raises(LoraFxError, match="--use_fsdp asks for a model that is split") as refused:
        refuse_sharded_launch({"ACCELERATE_USE_FSDP": "true"})
    assert "call fully_shard on the module of lora_fx.insert" in str(refused.value.hint)
