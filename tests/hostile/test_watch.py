"""No file makes any command run code, start a program or open a socket."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

from lora_fx.cli.group import COMMANDS
from tests.hostile.watch import HUB, MARK, SERVER, Payload

ROOT = Path(__file__).resolve().parent.parent.parent
NO_FILES = {"demo", "train", "bench"}
"""Commands that take no file of somebody else's, or run code that the user names."""


def test_no_command_runs_what_is_in_a_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile.watch", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["canary"] == []
    ran, events = said["ran"], said["events"]
    asked = {command for command in ran if HUB in command}
    with_probe = f"probe good_adapter --server {SERVER} --model x"
    assert with_probe in ran
    assert len(asked) == 2 and {(c, e) for c, e, _ in events} == {
        (command, event)
        for command in {*asked, with_probe}
        for event in ("socket.connect", "socket.getaddrinfo")
    }, "sockets are opened for arguments of the Hub, for --server, and for nothing else"
    for command, event, detail in events:
        if command == with_probe and event == "socket.connect":
            assert "('127.0.0.1', 9)" in detail or "('::1', 9, 0, 0)" in detail
        elif command == with_probe:
            assert detail.startswith("('localhost', 9, ")
    assert {line.split()[0] for line in ran} == set(COMMANDS) - NO_FILES
    assert set(ran.values()) <= {0, 1, 2}
    assert ran["merge good.safetensors good_adapter -o out"] == 0, "the good pair is good"
    assert ran["merge pickled good_adapter -o out"] == 2


def test_the_payload_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / MARK).exists()
