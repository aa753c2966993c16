"""What the shell completes, by the shell itself and the lines of docs/json.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "json.md").read_text()
SETUP = re.findall(r"```sh\n(.*?)```", PAGE[PAGE.index("## Completion") :], re.S)
BEGUN = {
    # what is typed → what it can become
    "lora-fx ext": ["extract"],
    "lora-fx merge --dry": ["--dry-run"],
    "lora-fx merge --how l": ["linear"],
    "lora-fx verify one two --everything": [],
}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has this tree's lora-fx."""
    program = tmp_path / "bin" / "lora-fx"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_fx.cli "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def said(shell: str, script: str, env: dict[str, str], cwd: Path) -> list[str]:
    done = subprocess.run(
        [shell, "-c", script], env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_values(env: dict[str, str], tmp_path: Path) -> None:
    """Its own table says which function completes; that is called as readline would."""
    lines = [SETUP[0], 'f=$(complete -p lora-fx | sed "s/.*-F \\([a-z_]*\\).*/\\1/")']
    for line in BEGUN:
        words = line.split()
        lines += [
            f"COMP_WORDS=({line}) COMP_CWORD={len(words) - 1} COMPREPLY=()",
            f'$f lora-fx "{words[-1]}" "{words[-2]}"',
            'echo "[${COMPREPLY[*]}]"',
        ]
    lines.append("complete -p lora-fx | grep -c -- '-o default'")  # which completes paths
    got = said("bash", "\n".join(lines), env, tmp_path)
    assert got == [*(f"[{' '.join(words)}]" for words in BEGUN.values()), "1"]


def test_zsh_is_answered_in_its_own_form(env: dict[str, str], tmp_path: Path) -> None:
    """Type, value and help, a line each, as the script for zsh reads them."""
    script = SETUP[1].removeprefix('eval "$(').removesuffix(')"\n')
    assert "#compdef lora-fx" in " ".join(said("sh", script, env, tmp_path))
    for line, words in BEGUN.items():
        env |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        got = said("sh", script.replace("zsh_source", "zsh_complete"), env, tmp_path)
        at = [i for i, word in enumerate(got) if word == "plain"]
        assert [got[i + 1] for i in at] == words
