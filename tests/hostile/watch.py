"""Run every command over hostile files in one process that watches what Python does.

`python -m tests.hostile.watch FOLDER` makes the files in FOLDER, runs the commands, and prints one
JSON object: {"ran": {command: exit code}, "events": [[command, event, detail] …]}. An audit hook
cannot be taken off again, so this is a process of its own.

What counts as an event: code of a hostile file that runs (its code objects, and whatever has the
mark MARK in its names or constants), pickle.find_class, os.system, os.exec, os.posix_spawn,
subprocess.Popen, socket.connect, socket.getaddrinfo.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

MARK = "hostile_canary"
HUB = "hf:org/model"
"""The one argument for which a socket is opened; nothing listens where the Hub is here."""
SERVER = "http://localhost:9"
"""The one option for which a socket is opened; nobody listens there either."""
EVENTS = {
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo",
}  # fmt: skip


class Payload:
    """Unpickling it leaves a file."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / MARK}"

    def __reduce__(self) -> Any:
        return (os.system, (self.command,))


def _header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def _plain(rows: int = 24, columns: int = 16, name: str = "fc.weight") -> bytes:
    size = 4 * rows * columns
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}
    return _header({name: entry}, struct.pack("<f", 0.5) * (rows * columns))


def _adapter(folder: Path, **config: Any) -> None:
    from lora_fx import Adapter, LowRank, save_adapter

    rng = __import__("numpy").random.default_rng(0)
    a, b = rng.standard_normal((2, 16)), rng.standard_normal((24, 2))
    low = LowRank(a.astype("f4"), b.astype("f4"), 3.0)
    save_adapter(Adapter({"fc.weight": low}), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def _probe(folder: Path, **facts: Any) -> None:
    """A probe with a question for a server, which names other servers."""
    continuations = {"values": [-1.0], "greedy": [[1]], "texts": ["https://127.0.0.1:9/x"]}
    language = {
        "prompts": [{"text": "https://127.0.0.1:9/x", "tokens": [1]}],
        "points": [[0, 1, "https://127.0.0.1:9/x"]],
        "tolerance": 0.001,
        "base": continuations,
        "adapter": {**continuations, "values": [-2.0]},
    }
    whole = {
        "format": 1,
        "mode": "adapter",
        "inputs": {"x": {"dtype": "float32", "shape": [1], "fill": 1}},
        "outputs": {"y": {"shape": [1], "largest": 1.0, "tolerance": 0.1}},
        "points": [["y", 0]],
        "adapters": {"a": {"values": [1.0]}},
        "language": language,
        **facts,
    }
    (folder / "lora_fx_probe.json").write_text(json.dumps(whole))


def make(root: Path) -> tuple[list[str], list[str]]:
    """(models, adapters): hostile files, and a good one of each to pair them with."""
    evil = pickle.dumps(Payload(root))
    code = f"import os\n{MARK} = os.system('touch {root / MARK}')\n"
    (root / "good.safetensors").write_bytes(_plain())
    models = ["good.safetensors"]

    def model(name: str, **files: bytes | str) -> None:
        folder = root / name
        folder.mkdir()
        for file, data in files.items():
            path = folder / file.replace("__", ".").replace("SLASH", "/")
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        models.append(name)

    auto = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
    config = json.dumps({"model_type": "evil", "auto_map": auto, "architectures": [MARK]})
    model("pickled", config__json=config, pytorch_model__bin=evil, modeling__py=code)
    model("own_code", config__json=config, model__safetensors=_plain(), modeling__py=code)
    index = {"weight_map": {"fc.weight": "../good.safetensors"}}
    model("outside", config__json="{}", **{"model__safetensors__index__json": json.dumps(index)})
    model("url", config__json=json.dumps({"_name_or_path": "https://127.0.0.1:9/x"}))
    named = json.dumps({"_name_or_path": "hf:evil/model"})
    model("names", config__json=named, model__safetensors=_plain(name="../../etc/passwd"))
    (root / "pickle.safetensors").write_bytes(evil)
    (root / "bomb.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with zipfile.ZipFile(root / "evil.pt2", "w") as z:
        z.writestr("evil/archive_format", "pt2")
        z.writestr("evil/models/model.json", json.dumps({"graph_module": MARK}))
        z.writestr("evil/data/sample_inputs/model.pt", evil)
        z.writestr("evil/data/weights/weight_0", evil)
    (root / "evil.onnx").write_bytes(evil)
    models += ["pickle.safetensors", "bomb.safetensors", "evil.pt2", "evil.onnx"]

    _adapter(root / "good_adapter")
    _probe(root / "good_adapter", facts={"server": "https://127.0.0.1:9/x", "code": MARK})
    _adapter(root / "mapped", auto_mapping={"base_model_class": MARK, "parent_library": "os"})
    _adapter(root / "megatron", megatron_core="os", megatron_config={"x": MARK})
    _adapter(root / "remote", base_model_name_or_path="https://127.0.0.1:9/x", revision=MARK)
    _adapter(root / "regex", rank_pattern={"(a+)+$" * 3: 2}, base_model_name_or_path="hf:a/b")
    for name in ("pickled_adapter", "pickled_beside"):
        _adapter(root / name)
        (root / name / "adapter_model.bin").write_bytes(evil)
    (root / "pickled_adapter" / "adapter_model.safetensors").unlink()
    (root / "evil.onnx_adapter").write_bytes(b"\0\0\0\0TORT" + evil)
    (root / "lora.safetensors").write_bytes(evil)
    adapters = [
        "good_adapter", "mapped", "megatron", "remote", "regex", "pickled_adapter",
        "pickled_beside", "evil.onnx_adapter", "lora.safetensors",
    ]  # fmt: skip
    return models, adapters


def commands(models: list[str], adapters: list[str]) -> list[list[str]]:
    """Every command with every hostile file in every place that takes one."""
    good, fine = models[0], adapters[0]
    lines = []
    for m in models:
        lines += [
            ["targets", m],
            ["insert", m, "-o", "out.pt2"],
            ["plan", m, "-o", "out.json"],
            ["merge", m, fine, "-o", "out"],
            ["merge-all", m, fine, "-o", "outs"],
            ["export", m, fine, "-o", "out.onnx"],
            ["extract", m, good, "-o", "out"],
            ["extract", good, m, "-o", "out"],
            ["verify", m, good],
            ["verify", good, m, "--adapter", fine],
            ["probe", fine, "--base", m, "-o", "out.json"],
            ["doctor", m, fine],
        ]
    for a in adapters:
        lines += [
            ["merge", good, a, "-o", "out"],
            ["merge-all", good, a, "-o", "outs"],
            ["export", "own_code", a, "-o", "out.onnx"],
            ["truncate", a, "-o", "out", "--rank", "1"],
            ["convert", a, "-o", "out.safetensors", "--format", "kohya"],
            ["verify", good, a],
            ["verify", good, good, "--adapter", a],
            ["probe", a, "--base", "own_code", "-o", "out.json"],
            ["probe", a, "--server", SERVER, "--model", "x"],
            ["doctor", good, a],
        ]
    return [*lines, ["merge", HUB, fine, "-o", "out"], ["doctor", good, HUB]]


def main() -> None:
    """Make, watch, run, print."""
    root = Path(sys.argv[1])
    os.chdir(root)
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    models, adapters = make(root)
    # Whatever the libraries do when they are imported is no business of the files.
    import lora_fx.fx.load.models
    import lora_fx.onnx.session
    import lora_fx.passes.verbs.adapt  # noqa: F401
    from lora_fx.cli import main as cli
    from lora_fx.cli.group import COMMANDS

    with contextlib.suppress(ImportError):
        import transformers.models.auto.modeling_auto  # noqa: F401
    events: list[tuple[str, str, str]] = []
    now = [""]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not now[0]:
            return
        if event == "exec" and isinstance(args[0], types.CodeType):
            code = args[0]
            if MARK in (*code.co_names, *map(str, code.co_consts)) or str(root) in code.co_filename:
                events.append((now[0], event, code.co_filename))
        elif event == "subprocess.Popen" and _ours(args[1]):
            return
        elif event in EVENTS:
            events.append((now[0], event, repr(args)[:200]))

    sys.addaudithook(hook)
    ran: dict[str, int] = {}
    for line in commands(models, adapters):
        if line[0] not in COMMANDS:
            continue
        silent = io.StringIO()
        now[0] = " ".join(line)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            try:
                cli(line)
            except SystemExit as end:
                ran[now[0]] = end.code if isinstance(end.code, int) else 0
        now[0] = ""
        subprocess.run(
            ["rm", "-rf", "out", "outs", "out.pt2", "out.onnx", "out.safetensors", "out.json"]
        )
    left = sorted(p.name for p in root.rglob(MARK))
    print(json.dumps({"ran": ran, "events": events, "canary": left}))


def _ours(argv: Any) -> bool:
    """merge-all starts `python -P -m lora_fx.cli`, which is no code of a file."""
    return [str(x) for x in argv[1:4]] == ["-P", "-m", "lora_fx.cli"]


if __name__ == "__main__":
    main()
