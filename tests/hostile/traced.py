"""What commands open and whom they ask, by strace, on folders that name other models.

    python -m tests.hostile.traced [--python PATH] [--only COMMAND ...] [--folders FOLDER ...]

A row for each command and folder: its exit code, the connections to AF_INET or AF_INET6, and the
files that it opens beyond the folder, the output, and what the same command opens for the plain
folder of that family, which is run where anything is left without it. `--python` is another
interpreter with lora-fx, such as one with an older timm. Exit code 1 where a row has a connection
or a file.

Commands run in forks of a process that has imported the libraries, so that a row takes seconds.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile import child
from tests.hostile.configs import prepared
from tests.hostile.families import save
from tests.hostile.watch import MARK, Payload

ROOT = Path(__file__).resolve().parent.parent.parent
LINES = {
    "targets": "targets m",
    "targets --trust": "targets m --trust",
    "targets --inputs": "targets m --inputs inputs.npz",
    "insert": "insert m -o out.pt2 -r 2",
    "train": "train m data.npz -o out -r 2 --steps 1 --validation 0",
    "train on texts": "train m texts.jsonl -o out -r 2 --steps 1 --validation 0 --max-length 16",
    "plan": "plan m -o out.json",
    "plan from data": "plan m data.npz -o out.json --method eva",
    "merge": "merge m adapter -o out",
    "merge-all": "merge-all m adapter -o outs",
    "export": "export m -o out.onnx",
    "export merged": "export m adapter -o out.onnx",
    "export switch": "export m adapter -o out.onnx --mode switch",
    "export --genai": "export m -o out.onnx --cache --genai out_genai",
    "extract": "extract m m -o out --rank 1",
    "verify": "verify m m",
    "verify --run": "verify m m --run",
    "verify --adapter": "verify m m --adapter adapter",
    "verify an adapter": "verify m adapter",
    "probe": "probe adapter --base m -o out.json",
    "doctor": "doctor m adapter",
    "truncate --table": "truncate adapter --table data.npz --model m",
    "convert --base": "convert adapter -o out.safetensors --format kohya --base m",
    "bench": "bench m",
}
"""Every command that takes the folder of a model, in each place that takes one."""


@dataclass(frozen=True)
class Folder:
    """A folder that names something beyond itself.

    Attributes:
        family: Of FAMILIES.
        config: Fields of its config.json.
        files: Path in the scene → what stands in the file; None takes it away.
    """

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


def _backbone(name: str, **fields: Any) -> dict[str, Any]:
    return {"backbone_config": None, "backbone": name, **fields}


def _of_timm(name: str) -> dict[str, Any]:
    return {"backbone_config": {"model_type": "timm_backbone", "backbone": name}}


HUB, ELSEWHERE = "microsoft/resnet-50", "../elsewhere/evil.bin"
FOLDERS = {
    "timm: a checkpoint": Folder("timm_wrapper", {"model_args": {"checkpoint_path": ELSEWHERE}}),
    "timm: a folder": Folder("timm_wrapper", {"architecture": "local-dir:../elsewhere"}),
    "timm: the Hub": Folder("timm_wrapper", {"architecture": "hf-hub:timm/resnet18.a1_in1k"}),
    "timm: its own record": Folder(
        "timm_wrapper", {"pretrained_cfg": {"file": ELSEWHERE, "url": "https://x.y/z.pth"}}
    ),
    "dpt: the Hub": Folder("dpt", _backbone(HUB)),
    "dpt: a bare name": Folder("dpt", _backbone("gpt2")),
    "detr: the Hub": Folder("detr", _backbone(HUB, use_timm_backbone=False)),
    "conditional_detr: pretrained": Folder(
        "conditional_detr", _backbone("test_resnet", use_pretrained_backbone=True)
    ),
    "conditional_detr: the Hub": Folder("conditional_detr", _of_timm("hf-hub:org/model")),
    "conditional_detr: a folder": Folder("conditional_detr", _of_timm("local-dir:../elsewhere")),
    "upernet: the Hub": Folder("upernet", _backbone(HUB)),
    "mask2former: the Hub": Folder("mask2former", _backbone(HUB)),
    "mask2former: a bare name": Folder("mask2former", _backbone("gpt2")),
    "vitpose: the Hub": Folder("vitpose", _backbone("usyd-community/vitpose-base")),
    "vitpose: timm on the Hub": Folder("vitpose", _of_timm("hf-hub:org/model")),
    "depth_anything: the Hub": Folder("depth_anything", _backbone("facebook/dinov2-small")),
    "depth_anything: a folder": Folder("depth_anything", _of_timm("local-dir:../elsewhere")),
    "clip: a vision model": Folder(
        "clip", {"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}}
    ),
    "llama: its origin": Folder("llama", {"_name_or_path": "org/llama", "name_or_path": "/etc"}),
    "llama: code and kernels": Folder(
        "llama", {"auto_map": {"AutoModel": "org/x--m.M"}, "_attn_implementation": "org/kernel"}
    ),
    "llama: its tokenizer": Folder(
        "llama",
        files={
            "m/tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",
                "name_or_path": "org/llama", "vocab_file": "../elsewhere/vocab.txt",
                "auto_map": {"AutoTokenizer": ["org/x--t.T", None]},
            },
            "m/chat_template.jinja": "{% include '../elsewhere/vocab.txt' %}",
        },
    ),
    "llama: an adapter's base": Folder(
        "llama",
        files={
            "m/adapter_config.json": {"base_model_name_or_path": "org/base", "peft_type": "LORA"},
            "m/generation_config.json": {"_from_model_config": True, "custom_generate": "org/x"},
            "m/pytorch_model.bin": ELSEWHERE,
        },
    ),
    "llama: weights elsewhere": Folder(
        "llama",
        files={
            "m/model.safetensors": None,
            "m/model.safetensors.index.json": {"weight_map": {"lm_head.weight": ELSEWHERE}},
        },
    ),
}  # fmt: skip
"""Folders that name a model, a file or code beyond themselves."""
NOISE = re.compile(
    r"^/(proc|sys|dev|tmp/(?!.*/(scene|elsewhere)/))|/(site-packages|python3\.\d+)/.*\.py$"
    r"|\.pyc(\.\d+)?$|/__pycache__"
)
"""Files of the machine, and modules that are installed: sources, and what Python made of them."""


@dataclass(frozen=True)
class Traced:
    """What a command did: its exit code, files that it opened, connections, its last words."""

    code: int
    opened: frozenset[str]
    asked: tuple[str, ...]
    last: str


class Tracer:
    """A process under strace that has imported the libraries and runs commands in forks of itself.

    Each of its processes and threads has a log of its own, so that those of a command are the ones
    that come with it.

    Args:
        python: An interpreter with lora-fx.
        root: A folder for logs and for a home, which holds a token of the Hub.
    """

    def __init__(self, python: str, root: Path) -> None:
        self.logs, home = root / "logs", root / "home"
        self.logs.mkdir(parents=True)
        token = home / ".cache" / "huggingface" / "token"
        token.parent.mkdir(parents=True)
        token.write_text("hf_secret")
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "PYTHONPATH")
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.process = subprocess.Popen(
            ["strace", "-ff", "-y", "-qq", "--seccomp-bpf", "-s", "4096",
             "-e", "trace=network,open,openat,openat2", "-o", str(self.logs / "log"),
             python, "-W", "ignore", "-m", "tests.hostile.traced", "--serve"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "HOME": str(home), "HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._answer() == {"ready": True}
        self.first = set(self.logs.iterdir())

    def run(self, line: str, folder: Path) -> Traced:
        """Run a command in a folder; its outputs are taken away."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": line.split(), "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        opened, asked = set(), []
        for log in sorted(set(self.logs.iterdir()) - self.first):
            for row in log.read_text(errors="replace").splitlines():
                if re.match(r"(connect|sendto|sendmsg|sendmmsg)\(.*AF_INET6?\b", row):
                    asked.append(row[:200])
                elif found := re.match(r'open\w*\((?:[^<"]*<([^>]*)>, )?"([^"]+)".* = \d+', row):
                    opened.add(os.path.normpath(os.path.join(found[1] or folder, found[2])))
            log.unlink()
        for out in folder.glob("out*"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        return Traced(answer["code"], frozenset(opened), tuple(asked), answer["last"])

    def end(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def serve() -> None:
    """Run the commands that stdin names, each in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), sorted({folder.family for folder in FOLDERS.values()}))
        _import_exporters(Path(folder))
    print(json.dumps({"ready": True}), flush=True)
    for job in map(json.loads, sys.stdin):
        got = child.command(job["argv"], Path(job["folder"]), seconds=120)
        lines = got.err.strip().splitlines()
        errors = [line for line in lines if line.startswith("Error: ")] or lines[-1:]
        print(json.dumps({"code": got.code, "last": " ".join(errors)[:300]}), flush=True)


def _import_exporters(folder: Path) -> None:
    """Import what a capture and an export import as they need it, by one of each."""
    import torch

    import lora_fx

    lora_fx.export(torch.nn.Linear(3, 2), folder / "m.onnx", (torch.ones(2, 3),))


def scene(folder: Folder, root: Path) -> Path:
    """The model `m`, an adapter of it and data; beside them what must not be opened."""
    at, elsewhere = root / "scene", root / "elsewhere"
    at.mkdir(parents=True)
    elsewhere.mkdir()
    config = save(folder.family, at / "m")
    if folder.family == "llama":
        _write_tokenizer(at / "m")
    _write_adapter(at)
    _write_data(at)
    (at / "m" / "config.json").write_text(json.dumps({**config, **folder.config}))
    for name, content in folder.files.items():
        file = at / name
        if content is None:
            file.unlink()
        elif name.endswith(".bin"):
            file.write_bytes(pickle.dumps(Payload(root)))
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    (elsewhere / "evil.bin").write_bytes(pickle.dumps(Payload(root)))
    (elsewhere / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (elsewhere / "vocab.txt").write_text("[PAD]\nsecret\n")
    return at


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "how": 2, "far": 3, "is": 4, "it": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[UNK]"
    ).save_pretrained(folder)


def _write_adapter(at: Path) -> None:
    """An adapter of the last matrix that is no table."""
    import numpy as np

    from tests.checkpoint.made import adapter, factors, read

    matrices = {
        name.removesuffix(".weight"): weight.shape
        for name, weight in read(at / "m").items()
        if weight.ndim == 2 and name.endswith(".weight") and "embed" not in name
    }
    if not matrices:  # convolutions alone
        matrices = {"fc": (6, 4)}
    name, (rows, columns) = sorted(matrices.items())[-1]
    adapter(at / "adapter", {name: factors(np.random.default_rng(0), rows, columns, 2)})


def _write_data(at: Path) -> None:
    import numpy as np

    from lora_fx.fx.load.huggingface import load_folder

    inputs = {name: tensor.numpy() for name, tensor in load_folder(at / "m").kwargs.items()}
    labels = inputs.get("input_ids", np.zeros(2, "i8"))
    np.savez(at / "inputs.npz", **inputs)
    np.savez(at / "data.npz", labels=labels, **inputs)
    (at / "texts.jsonl").write_text('{"text": "how far is it"}\n' * 4)


def rows(
    tracer: Tracer, commands: Sequence[str], folders: Sequence[str], root: Path
) -> Iterator[dict[str, Any]]:
    """What each command did in each folder, beyond what it does in the plain one."""
    plain: dict[tuple[str, str], Traced] = {}
    good: dict[str, Path] = {}
    for i, name in enumerate(folders):
        folder = FOLDERS[name]
        at = scene(folder, root / str(i))
        for command in commands:
            got = tracer.run(LINES[command], at)
            beyond = _beyond(got, at)
            before = None
            if beyond:
                if folder.family not in good:
                    good[folder.family] = scene(Folder(folder.family), root / f"{i} plain")
                ours, key = good[folder.family], (folder.family, command)
                if key not in plain:
                    plain[key] = tracer.run(LINES[command], ours)
                before = plain[key]
                beyond -= _beyond(before, ours)
            yield {
                "folder": name, "command": command, "exit": got.code,
                "plain": "" if before is None else before.code, "last": got.last,
                "asked": got.asked + (() if before is None else before.asked),
                "beyond": sorted(beyond), "ran": (root / str(i) / MARK).exists(),
            }  # fmt: skip


def _beyond(got: Traced, at: Path) -> set[str]:
    """The files that are neither of a scene nor of the machine."""
    return {p for p in got.opened if not p.startswith(f"{at}/") and not NOISE.search(p)}


def main() -> None:
    """The command line: a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", nargs="*", choices=LINES, default=list(LINES))
    parser.add_argument("--folders", nargs="*", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--words", action="store_true", help="print errors, too")
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        tracer = Tracer(given.python, Path(temporary))
        for row in rows(tracer, given.only, given.folders, Path(temporary)):
            bad += bool(row["asked"] or row["beyond"] or row["ran"])
            codes = f"exit {row['exit']} ({row['plain']})"
            counts = f"{len(row['asked'])} asked, {len(row['beyond'])} beyond"
            print(f"{row['folder']:30}{row['command']:20}{codes}  {counts}", flush=True)
            words = (row["last"],) if given.words else ()
            for detail in (*row["asked"], *row["beyond"], *words):
                print(f"    {detail}", flush=True)
        tracer.end()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
