"""ExecuTorch with XNNPACK: one lowering, base and two adapters, equal to torch; the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_fx
from tests.runtimes import models
from tests.runtimes.consumers import agree
from tests.runtimes.programs import LARGEST, Runtime, exported

pytestmark = pytest.mark.slow
RUNTIME = Runtime("ExecuTorch, XNNPACK", "executorch", "executorch", ".pte")


@pytest.mark.parametrize("name", models.SUBJECTS)
def test_the_row(name: str, tmp_path: Path) -> None:
    program = exported(name, tmp_path, RUNTIME, lora_fx.Switch(largest=LARGEST[name]))
    program.run_sample()
    lowered = program.compiled.read_bytes()
    result = program.measured()
    assert program.compiled.read_bytes() == lowered
    all_equal = max(result["errors"].values()) <= models.GATE
    sizes = "to the largest" if all_equal else False
    agree(program.row(result, "0 lowerings", dynamic_sizes=sizes))


def test_adapters_padded_to_one_rank(tmp_path: Path) -> None:
    mode = lora_fx.Switch(rank=max(models.RANKS.values()), largest={"batch": 4, "length": 40})
    exported("text", tmp_path, RUNTIME, mode).run_sample()
