"""Commands on folders that name other models ask nobody and open nothing of theirs, by strace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fx.cli.group import COMMANDS
from tests.hostile import traced

STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[traced.Tracer]:
    made = traced.Tracer(sys.executable, tmp_path_factory.mktemp("tracer"))
    yield made
    made.end()


def test_every_command_has_a_line() -> None:
    assert {line.split()[0] for line in traced.LINES.values()} == set(COMMANDS) - {"demo"}


@STRACE
@pytest.mark.slow
@pytest.mark.parametrize("name", traced.FOLDERS)
def test_a_folder_that_names_another_model_opens_nothing_of_it(
    name: str, tracer: traced.Tracer, tmp_path: Path
) -> None:
    for row in traced.rows(tracer, list(traced.LINES), [name], tmp_path):
        assert row["exit"] in (0, 1, 2) and not row["ran"], row
        assert not row["asked"] and not row["beyond"], row


@STRACE
@pytest.mark.slow
def test_the_trace_sees_what_is_opened_and_asked(tracer: traced.Tracer, tmp_path: Path) -> None:
    """A factory of the user's may do what it likes."""
    folder = traced.scene(traced.Folder("llama"), tmp_path / "x")
    (folder / "net.py").write_text(
        "import socket, torch\n\n\ndef build():\n"
        "    open('../elsewhere/evil.bin').close()\n"
        "    socket.socket().connect_ex(('127.0.0.1', 9))\n"
        "    return torch.nn.Linear(3, 2), (torch.ones(4, 3),), {}\n"
    )
    got = tracer.run("targets net.py:build", folder)
    assert got.code == 0 and len(got.asked) == 1
    assert str(tmp_path / "x/elsewhere/evil.bin") in got.opened


# What ONNX Runtime does on its own account.


def files_of_home(code: str, home: Path, **environment: str) -> set[str]:
    """What a program leaves in the home of its user."""
    home.mkdir()
    dropped = ("ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME")  # with CI, nothing is sent either
    plain = {k: v for k, v in os.environ.items() if k not in dropped}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=traced.ROOT,
        env={**plain, **environment, "HOME": str(home)},
    )  # fmt: skip
    return {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}


PLACES = {
    "sessions": "from lora_fx.onnx.session import providers; providers()",
    "validity": "import lora_fx.onnx.validity, onnxruntime",
    "the version": "from lora_fx.cli import main; main(['--version'])",
}


@pytest.mark.parametrize("name", PLACES)
def test_the_runtime_tells_nobody_what_it_opens(name: str, tmp_path: Path) -> None:
    """It would keep what it has to tell in a database of the user's."""
    assert files_of_home(PLACES[name], tmp_path / "home") == set()


def test_a_user_may_let_the_runtime_tell(tmp_path: Path) -> None:
    """And a runtime that is left alone does tell, or there is nothing to see here."""
    alone = files_of_home("import onnxruntime", tmp_path / "alone")
    if not alone:
        pytest.skip("this build of ONNX Runtime has no telemetry")
    code = PLACES["sessions"]
    assert files_of_home(code, tmp_path / "let", ORT_DISABLE_TELEMETRY="0") == alone
