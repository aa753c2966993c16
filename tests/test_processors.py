"""The runs of `tests.processors`: what each gets, and what is read from its end."""

from __future__ import annotations

import pytest

from tests.processors import SETTINGS, closing_line, environment, failures, main


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_alone(setting: str) -> None:
    inherited = {"HOME": "/root", "ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "7"}
    assert environment(setting, inherited) == {"HOME": "/root", **SETTINGS[setting]}


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("....  [100%]\n38 passed in 15.87s\n", "38 passed in 15.87s"),
        ("=== 2 failed, 6 passed in 8.85s (0:00:08) ===", "2 failed, 6 passed in 8.85s (0:00:08)"),
        ("no tests ran in 2.11s\n\n", "no tests ran in 2.11s"),
        ("1 passed, 1 error in 3.00s\nsys:1: a warning at the end", "1 passed, 1 error in 3.00s"),
        ("ImportError: no module", "ImportError: no module"),
        ("", "nothing was printed"),
    ],
)  # fmt: skip
def test_how_a_run_ended(output: str, line: str) -> None:
    assert closing_line(output) == line


def test_what_failed_is_named() -> None:
    output = "FAILED tests/a.py::b - AssertionError\nERROR tests/c.py\n1 failed, 1 error in 1.00s"
    assert failures(output) == ["FAILED tests/a.py::b - AssertionError", "ERROR tests/c.py"]


def test_one_failed_run_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "MKL-AVX2", "--", "--co", "tests/test_gone.py"]) == 1
    printed = capfd.readouterr().out
    assert printed.startswith("MKL-AVX2 (MKL_ENABLE_INSTRUCTIONS=AVX2): ERROR: file or directory")
