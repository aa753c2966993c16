"""An estimate beside what is free: told, warned of, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.peak_memory import MemoryPart, PeakMemory, check_memory, refusing
from lora_fx.progress import telling

GB = 10**9
PEAK = PeakMemory(
    "the job",
    (MemoryPart("kept", 4 * GB, 3 * GB), MemoryPart("scores", 2 * GB)),
    loaded=GB,
    detail="it is so",
)
LINE = "memory: the job takes about 6 GB (kept 4 GB, scores 2 GB), beside weights of 1 GB; it is so"


def lines(peak: PeakMemory, free: FreeMemory | None, *, refuse: bool = True) -> list[str]:
    told: list[str] = []
    with telling(told.append), refusing(refuse):
        check_memory(peak, free, ways_out)
    return told


def ways_out(free: int) -> Iterator[str]:
    yield f"--batch-size 2 needs {free / GB:g} GB"


def test_sums() -> None:
    assert (PEAK.expected, PEAK.least, PEAK.largest.name) == (6 * GB, 3 * GB, "kept")


def test_it_is_told_beside_what_is_free() -> None:
    assert lines(PEAK, FreeMemory(6 * GB)) == [f"{LINE}; 6 GB are free"]
    assert lines(PEAK, None) == [f"{LINE}; the free memory is not known"]


def test_a_small_job_has_no_line() -> None:
    small = PeakMemory("the job", (MemoryPart("kept", 499_999_999),))
    assert lines(small, FreeMemory(GB)) == lines(small, None) == []
    assert len(lines(small, FreeMemory(GB // 4))) == 2


def test_between_the_bounds_it_warns() -> None:
    told = lines(PEAK, FreeMemory(3 * GB))
    warning = "warning: the job may run out of memory: --batch-size 2 needs 3 GB"
    assert told == [f"{LINE}; 3 GB are free", warning]
    assert lines(PEAK, FreeMemory(2 * GB, GB))[1].startswith("warning: the job may run out")


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(LoraFxError) as refused:
        lines(PEAK, FreeMemory(2 * GB, GB // 2))
    assert refused.value.exit_code == 2
    assert refused.value.message == (
        "the job needs at least 3 GB of memory, and 2 GB are free, with 500 MB of swap; its "
        "largest part: kept 4 GB"
    )
    assert refused.value.hint == (
        "--batch-size 2 needs 2 GB; or --no-memory-check starts it all the same"
    )


def test_nothing_is_refused_in_python_or_by_the_option() -> None:
    told = lines(PEAK, FreeMemory(2 * GB), refuse=False)
    assert told[1] == "warning: the job will run out of memory, and starts all the same"
    with telling(told.append):
        check_memory(PEAK, FreeMemory(2 * GB), ways_out)
    assert told[1] == told[3]
