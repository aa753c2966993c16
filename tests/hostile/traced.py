"""What commands open and whom they ask, by strace, on folders that name other models.

    python -m tests.hostile.traced [--python PATH] [--only COMMAND ...]

A row for each command and folder: its exit code, the connections to AF_INET or AF_INET6, and the
files that it opens beyond the folder, the output, and what the same command opens for the plain
folder of that family. `--python` is another interpreter with lora-fx, such as one with an older
timm. Exit code 1 where a row has a connection or a file.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.families import save
from tests.hostile.watch import MARK, Payload

START = "from lora_fx.cli import main; main()"
LINES = {
    "targets": "targets m",
    "insert": "insert m -o out.pt2 -r 2",
    "train": "train m data.npz -o out -r 2 --steps 1 --validation 0",
    "merge": "merge m adapter -o out",
    "merge-all": "merge-all m adapter -o outs",
    "export": "export m -o out.onnx",
    "extract": "extract m m -o out --rank 1",
    "plan": "plan m -o out.json",
    "verify": "verify m m",
    "doctor": "doctor m adapter",
}
"""Every command that takes the folder of a model."""
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm: a checkpoint": (
        "timm_wrapper", {"model_args": {"checkpoint_path": "../elsewhere/evil.bin"}}
    ),
    "timm: a folder": ("timm_wrapper", {"architecture": "local-dir:../elsewhere"}),
    "timm: the Hub": ("timm_wrapper", {"architecture": "hf-hub:timm/resnet18.a1_in1k"}),
    "dpt: the Hub": ("dpt", {"backbone_config": None, "backbone": "microsoft/resnet-50"}),
    "dpt: a bare name": ("dpt", {"backbone_config": None, "backbone": "gpt2"}),
    "clip: a vision model": (
        "clip", {"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}}
    ),
    "llama: its origin": ("llama", {"_name_or_path": "org/llama", "name_or_path": "/etc"}),
    "llama: code and kernels": (
        "llama", {"auto_map": {"AutoModel": "org/x--m.M"}, "_attn_implementation": "org/kernel"}
    ),
}  # fmt: skip
"""What a folder names beyond itself."""
NOISE = re.compile(
    r"^/(proc|sys|dev|etc/ssl|tmp/(?!.*/(scene|elsewhere)/))|\.pyc(\.\d+)?$|/__pycache__"
)
"""Files of the machine, compiled modules, and the certificates that a client of the Hub reads as it
is made: where a bare name of a backbone is looked up, it is refused just after."""


@dataclass(frozen=True)
class Traced:
    """What a command did: its exit code, files that it opened, and connections."""

    code: int
    opened: frozenset[str]
    asked: tuple[str, ...]


def trace(python: str, line: str, folder: Path) -> Traced:
    """Run a command in a folder under strace; its outputs are taken away."""
    log = folder.parent / "strace.log"
    plain = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    done = subprocess.run(
        ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=network,openat,open", "-o", str(log),
         python, "-P", "-W", "ignore", "-c", START, *line.split()],
        cwd=folder, capture_output=True, text=True, timeout=900,
        env={**plain, "HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    opened, asked = set(), []
    for row in log.read_text(errors="replace").splitlines():
        found = re.search(r'open(?:at)?\((?:AT_FDCWD, )?"([^"]+)".* = \d+', row)
        if found:
            opened.add(os.path.abspath(folder / found[1]))
        elif re.search(r"(connect|sendto|sendmsg)\(.*AF_INET6?\b", row):
            asked.append(row[:200])
    for out in folder.glob("out*"):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    return Traced(done.returncode, frozenset(opened), tuple(asked))


def scene(family: str, fields: dict[str, Any], root: Path) -> Path:
    """A folder with the model `m`, an adapter and data; beside it what must not be opened."""
    import numpy as np

    from tests.checkpoint.made import adapter, factors

    folder, elsewhere = root / "scene", root / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    config = save(family, folder / "m")
    (folder / "m" / "config.json").write_text(json.dumps({**config, **fields}))
    (elsewhere / "evil.bin").write_bytes(pickle.dumps(Payload(root)))
    (elsewhere / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    adapter(folder / "adapter", {"q": factors(np.random.default_rng(0), 6, 4, 2)})
    np.savez(folder / "data.npz", x=np.ones((2, 3), "f4"), labels=np.zeros(2, "i8"))
    return folder


def rows(
    python: str, commands: Sequence[str], folders: Sequence[str], root: Path
) -> Iterator[dict[str, Any]]:
    """What each command did in each folder, beyond what it does in the plain one."""
    plain: dict[tuple[str, str], frozenset[str]] = {}
    for i, name in enumerate(folders):
        family, fields = FOLDERS[name]
        folder = scene(family, fields, root / str(i))
        for command in commands:
            if (family, command) not in plain:
                good = scene(family, {}, root / f"{i} {command}")
                done = trace(python, LINES[command], good)
                plain[family, command] = frozenset(
                    p for p in done.opened if not p.startswith(f"{good}/")
                )
            got = trace(python, LINES[command], folder)
            beyond = sorted(
                p for p in got.opened - plain[family, command]
                if not p.startswith(f"{folder}/") and not NOISE.search(p)
            )  # fmt: skip
            yield {
                "folder": name, "command": command, "exit": got.code, "asked": list(got.asked),
                "beyond": beyond, "ran": (root / str(i) / MARK).exists(),
            }  # fmt: skip


def main() -> None:
    """The command line: a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", nargs="*", choices=LINES, default=list(LINES))
    parser.add_argument("--folders", nargs="*", choices=FOLDERS, default=list(FOLDERS))
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as root:
        for row in rows(given.python, given.only, given.folders, Path(root)):
            bad += bool(row["asked"] or row["beyond"] or row["ran"])
            counts = f"{len(row['asked'])} asked, {len(row['beyond'])} beyond"
            print(f"{row['folder']:26}{row['command']:10} exit {row['exit']}  {counts}", flush=True)
            for detail in (*row["asked"], *row["beyond"]):
                print(f"    {detail}", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
