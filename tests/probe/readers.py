"""The readers of samples/probe: each is run as its user runs it, and on many cases in a process.

A case of `judge` is a probe's text and what a run gave: `{"text": …, "runs": {"base": numbers or
null, "adapters": [[name, numbers] …], "beyond_ids": numbers or null}}`, where null stands for a
number that is not finite. The answer is `{"result": verdicts}` or `{"error": message}`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.runtimes import web
from tests.runtimes.environments import ROOT

SAMPLES = ROOT / "samples" / "probe"
HERE = Path(__file__).parent
HEADERS = Path("/usr/include/onnxruntime")
JSON_HEADER = Path("/usr/include/nlohmann/json.hpp")
CXX = shutil.which("g++")
STRICT = ("-Wall", "-Wextra", "-Werror")

needs_cxx = pytest.mark.skipif(
    CXX is None or not HEADERS.is_dir() or not JSON_HEADER.exists(),
    reason="apt install g++ libonnxruntime-dev nlohmann-json3-dev",
)

Case = dict[str, Any]


class Answer(NamedTuple):
    """What a reader answers on a file.

    Attributes:
        code: The exit code.
        result: The object that it prints; None where there is none.
        error: What it writes to stderr.
        text: What it prints.
    """

    code: int
    result: dict[str, Any] | None
    error: str
    text: str


class Reader(ABC):
    """A reader in one language; `folder` is for what is compiled or written."""

    modes: Sequence[str] = ("merged", "switch", "portable", "load", "batch")
    """The kinds of files that it can run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """The command before the arguments of the reader."""

    @abstractmethod
    def judge(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The answers on many cases, in one process."""

    def check(self, path: Path, *options: str) -> Answer:
        """What the reader answers on a file."""
        done = subprocess.run(
            [*self.command, *options, str(path)], capture_output=True, text=True, check=False
        )
        result = json.loads(done.stdout) if done.stdout else None
        return Answer(done.returncode, result, done.stderr, done.stdout)

    def _judged_by(self, command: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
        path = self._folder / "cases.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers


class Python(Reader):
    """samples/probe/check_probe.py; files are checked in this process."""

    @cached_property
    def module(self) -> ModuleType:
        """The program as a module."""
        spec = importlib.util.spec_from_file_location("check_probe", SAMPLES / "check_probe.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["check_probe"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-W", "error", str(SAMPLES / "check_probe.py")]

    def check(self, path: Path, *options: str) -> Answer:
        printed, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(error):
            code = self.module.main([*options, str(path)])
        text = printed.getvalue()
        return Answer(code, json.loads(text) if text else None, error.getvalue(), text)

    def judge(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        return [self._judged(case) for case in cases]

    def _judged(self, case: Case) -> dict[str, Any]:
        try:
            probe = self.module.read_probe(case["text"])
        except self.module.ProbeError as error:
            return {"error": str(error)}
        given = case["runs"]
        runs = self.module.Runs(
            self._outputs(given["base"]),
            {name: self._outputs(outputs) for name, outputs in given["adapters"]},
            self._outputs(given["beyond_ids"]),
        )
        return {"result": self.module.verdicts(probe, runs)}

    def _outputs(self, outputs: list[float | None] | None) -> Any:
        if outputs is None:
            return None
        return self.module.floats([float("nan") if x is None else x for x in outputs])


class JavaScript(Reader):
    """samples/probe/check_probe.mjs in node."""

    modes = ("merged", "portable", "batch")

    @property
    def command(self) -> list[str]:
        return [str(web.NODE), str(SAMPLES / "check_probe.mjs")]

    def judge(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        return self._judged_by([str(web.NODE), str(HERE / "judge.mjs")], cases)


class Cxx(Reader):
    """samples/probe/check_probe.cpp, compiled with all warnings as errors."""

    @cached_property
    def command(self) -> list[str]:
        """The program, compiled by the line at its top."""
        text = (SAMPLES / "check_probe.cpp").read_text(encoding="utf-8")
        [line] = re.findall(r"^// +(g\+\+ .*)$", text, re.MULTILINE)
        return [self._compiled(line.split(), "check_probe")]

    @cached_property
    def _judge(self) -> str:
        command = ["g++", "-std=c++17", f"-I{SAMPLES}", str(HERE / "judge.cpp")]
        return self._compiled(command, "judge")

    def judge(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        return self._judged_by([self._judge], cases)

    def _compiled(self, command: Sequence[str], name: str) -> str:
        program = str(self._folder / name)
        done = subprocess.run(
            [*command, *STRICT, "-o", program],
            cwd=SAMPLES,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return program


READERS: dict[str, type[Reader]] = {"python": Python, "javascript": JavaScript, "c++": Cxx}
EVERY = [
    pytest.param("python"),
    pytest.param("javascript", marks=[web.needs_package, web.needs_node]),
    pytest.param("c++", marks=needs_cxx),
]
"""The names of all readers, as parameters; one whose runtime is missing is skipped."""
