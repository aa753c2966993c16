"""Valid files of every kind, changed at random, and every command that reads them.

    python -m tests.hostile.mutate [--seed S] [--n N] [--kind KIND ...]

Each round changes one file (bits, bytes, cuts, fields of JSON, fields of protobuf, members of a
zip), runs one command on it in a child with limits, and looks: no exception may reach the user,
nothing may hang or take the machine, and an output that is written has to be what the format's own
reader and plain fp64 arithmetic make of the changed file. A line for each failure, then one JSON
object of counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from tests.hostile import child

Random = random.Random
OUT = "out"
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, "", "x", "../x", "\u202ex",
    "\x00",
    "(a+)+$", "[", [], [1], ["q"], [[]], {}, {"a": 1}, "a" * 3000, "/etc/passwd", [None],
    {"": None},
)  # fmt: skip


# Valid files. W is [6, 4] and its update has rank 2, so that no two sizes are equal.


def make(folder: Path) -> None:
    """One valid file of every kind."""
    import lora_fx

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4)).astype("f4")
    bias = rng.standard_normal(6).astype("f4")
    a, b = rng.standard_normal((2, 4)).astype("f4"), rng.standard_normal((6, 2)).astype("f4")
    tensors = {"fc.weight": weight, "fc.bias": bias}
    (folder / "base.safetensors").write_bytes(save_tensors(tensors, {"format": "pt"}))
    sharded = folder / "sharded"
    sharded.mkdir()
    index = {"weight_map": {}, "metadata": {"total_size": 120}}
    for i, name in enumerate(tensors, 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        (sharded / shard).write_bytes(save_tensors({name: tensors[name]}))
        index["weight_map"][name] = shard
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "config.json").write_text(json.dumps({"model_type": "x", "dtype": "float32"}))
    adapter = lora_fx.Adapter({"fc.weight": lora_fx.LowRank(a, b, 3.0)})
    pipeline = lora_fx.Adapter({"unet.fc.weight": lora_fx.LowRank(a, b, 3.0)})
    lora_fx.save_adapter(adapter, folder / "peft")
    lora_fx.save_adapter(adapter, folder / "kohya.safetensors", "kohya")
    lora_fx.save_adapter(pipeline, folder / "diffusers.safetensors", "diffusers")
    lora_fx.save_adapter(adapter, folder / "x.onnx_adapter", "onnx_adapter")
    _onnx(folder, weight, bias)
    arrays = {"x": rng.standard_normal((3, 4)).astype("f4"), "labels": np.arange(3)}
    np.savez(folder / "inputs.npz", **{"x": arrays["x"]})
    np.savez(folder / "data.npz", **arrays)
    (folder / "data.csv").write_text("a,b,c,d,labels\n1,2,3,4,0\n5,6,7,8,1\n1,3,5,7,2\n0,1,0,1,3\n")
    rows = [{"x": [1.0, 2.0, 3.0, float(i)], "labels": i % 4} for i in range(6)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.fc = torch.nn.Linear(4, 6)\n\n"
        "    def forward(self, x):\n        return self.fc(x)\n\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Net(), (torch.zeros(3, 4),), {}\n"
    )
    sys.path.insert(0, str(folder))
    import net  # type: ignore[import-not-found]

    module, args, _ = net.build()
    inserted = lora_fx.insert(module, args, rank=2)
    from lora_fx.passes.verbs.program import save_program

    save_program(inserted, folder / "net.pt2")
    plan = {"format": "lora-fx plan", "version": 1, "method": "uniform", "unit": "params",
            "limit": 20, "used": 20, "examples": 0,
            "targets": {"fc.weight": {"rank": 2, "alpha": 4.0, "cost": 10}}}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    old = folder / "old"
    outcome = child.command(
        ["merge", "base.safetensors", "peft", "-o", "merged.safetensors"], folder
    )
    assert outcome.code == 0, outcome.err
    outcome = child.command(["merge", "sharded", "peft", "-o", "old"], folder)
    assert outcome.code == 0 and old.is_dir(), outcome.err
    for mode in ("switch", "load"):
        argv = ["export", "graph.onnx", "peft", "-o", f"{mode}.onnx", "--mode", mode, "--force"]
        outcome = child.command(argv, folder, seconds=60)
        assert outcome.code == 0, outcome.err
    (folder / "peft.onnx_adapter").unlink()


def _onnx(folder: Path, weight: Any, bias: Any) -> None:
    """y = x @ W^T + b: whole, and with its data beside it."""

    def save(name: str, *, data: bool) -> None:
        tensors = [onnx.numpy_helper.from_array(weight.T.copy(), "fc.weight"),
                   onnx.numpy_helper.from_array(bias, "fc.bias")]  # fmt: skip
        nodes = [helper.make_node("MatMul", ["x", "fc.weight"], ["h"], name="m"),
                 helper.make_node("Add", ["h", "fc.bias"], ["y"], name="a")]  # fmt: skip
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6])
        graph = helper.make_graph(nodes, "g", [x], [y], tensors)
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        onnx.save(model, folder / name, save_as_external_data=data, location="graph.data",
                  size_threshold=0)  # fmt: skip

    save("graph.onnx", data=False)
    save("apart.onnx", data=True)


# What reads them: kind → (file that is changed, commands, with {} for it).


READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("base.safetensors", (
        "merge base.safetensors peft -o out.safetensors", "targets base.safetensors",
        "verify base.safetensors peft", "doctor base.safetensors peft",
        "extract merged.safetensors base.safetensors -o out --rank 2",
        "verify merged.safetensors base.safetensors --adapter peft",
        "merge-all base.safetensors peft -o out",
    )),
    "index": ("sharded/model.safetensors.index.json", (
        "merge sharded peft -o out", "verify sharded peft", "doctor sharded peft",
    )),
    "shard": ("sharded/model-00001-of-00002.safetensors", ("merge sharded peft -o out",)),
    "config": ("sharded/config.json", (
        "merge sharded peft -o out", "targets sharded", "doctor sharded peft",
    )),
    "peft": ("peft/adapter_model.safetensors", (
        "merge base.safetensors peft -o out.safetensors", "verify base.safetensors peft",
        "doctor base.safetensors peft", "truncate peft -o out --rank 1",
        "convert peft -o out.safetensors --format kohya", "merge graph.onnx peft -o out.onnx",
    )),
    "adapter_config": ("peft/adapter_config.json", (
        "merge base.safetensors peft -o out.safetensors", "verify base.safetensors peft",
        "doctor base.safetensors peft", "truncate peft -o out --rank 1",
        "convert peft -o out.safetensors --format kohya",
    )),
    "kohya": ("kohya.safetensors", (
        "merge base.safetensors kohya.safetensors -o out.safetensors",
        "convert kohya.safetensors -o out --format peft --base base.safetensors",
        "doctor base.safetensors kohya.safetensors",
    )),
    "diffusers": ("diffusers.safetensors", (
        "merge base.safetensors diffusers.safetensors -o out.safetensors",
        "convert diffusers.safetensors -o out --format peft",
    )),
    "onnx_adapter": ("x.onnx_adapter", (
        "merge base.safetensors x.onnx_adapter -o out.safetensors",
        "convert x.onnx_adapter -o out --format peft", "verify switch.onnx x.onnx_adapter",
    )),
    "onnx": ("graph.onnx", (
        "merge graph.onnx peft -o out.onnx", "targets graph.onnx",
        "insert graph.onnx -o out.onnx -r 2", "verify graph.onnx apart.onnx",
        "export graph.onnx peft -o out.onnx --mode batch",
    )),
    "data": ("apart.onnx", ("merge apart.onnx peft -o out.onnx", "targets apart.onnx")),
    "manifest": ("switch.onnx", (
        "verify switch.onnx peft", "targets switch.onnx", "merge switch.onnx peft -o out.onnx",
        "convert switch.onnx -o out --format peft",
    )),
    "pt2": ("net.pt2", (
        "targets net.pt2", "export net.pt2 -o out.onnx", "verify net.pt2 graph.onnx",
    )),
    "npz": ("inputs.npz", (
        "verify graph.onnx apart.onnx --inputs inputs.npz",
        "merge graph.onnx peft -o out.onnx --run",
    )),
    "table": ("data.npz", ("plan net.py:build data.npz -o out.json --method eva --loss ce",)),
    "csv": ("data.csv", ("plan net.py:build data.csv -o out.json --method eva",)),
    "jsonl": ("data.jsonl", ("plan net.py:build data.jsonl -o out.json --method eva",)),
    "plan": ("plan.json", ("insert net.py:build -o out.pt2 --plan plan.json",)),
    "contents": ("old/lora_fx.json", ("merge sharded peft -o old --force",)),
    "provenance": ("merged.safetensors", (
        "merge merged.safetensors peft -o out.safetensors",
        "verify merged.safetensors base.safetensors --adapter peft",
        "doctor merged.safetensors peft",
    )),
}  # fmt: skip
SLOW = {"pt2", "table", "csv", "jsonl", "plan"}
"""Kinds whose commands capture a model: seconds each, so that fewer rounds are theirs."""


# Changes.


def bytes_changed(data: bytes, rng: Random) -> bytes:
    """Bits turned, bytes written over, cut, doubled or moved."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(made)) if made else 0
        length = rng.choice((1, 2, 4, 8, 40, 400))
        match rng.randrange(7):
            case 0 if made:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at : at + length] = rng.randbytes(length)
            case 2:
                del made[at:]
            case 3:
                del made[at : at + length]
            case 4:
                made[at:at] = made[at : at + length]
            case 5:
                made[at : at + length] = bytes(length)
            case 6:
                made[at:at] = rng.choice((b"\xff" * 8, b"\x00" * 64, b"9" * 30, b"{" * 99, b'"'))
    return bytes(made)


def json_changed(value: Any, rng: Random) -> Any:
    """One field of a JSON value is replaced, removed, doubled or nested."""
    spots: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            spots.append((part, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    if isinstance(value, (dict, list)):
        walk(value)
    if not spots or rng.random() < 0.03:
        return rng.choice(JUNK)
    part, key = rng.choice(spots)
    match rng.randrange(6):
        case 0:
            del part[key]
        case 1 if isinstance(part, dict):
            part[str(rng.choice(JUNK))] = part.pop(key)
        case 2:
            part[key] = [part[key]]
        case 3 if isinstance(part[key], (int, float)) and not isinstance(part[key], bool):
            part[key] = rng.choice((-part[key], part[key] + 1, part[key] * 10**9, float(part[key])))
        case _:
            part[key] = rng.choice(JUNK)
    return value


def json_text(data: bytes, rng: Random) -> bytes:
    """JSON with a field changed, or its bytes."""
    if rng.random() < 0.15:
        return bytes_changed(data, rng)
    if rng.random() < 0.03:
        return rng.choice((b"[" * 200_000, b'{"a":' * 50_000, b"9" * 6000, b"\xef\xbb\xbf" + data))
    return json.dumps(json_changed(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def header_changed(data: bytes, rng: Random) -> bytes:
    """A safetensors file: a field of its header, JSON in its metadata, or bytes."""
    n = int.from_bytes(data[:8], "little")
    if rng.random() < 0.25:
        return bytes_changed(data, rng)
    header = json.loads(data[8 : 8 + n])
    texts = [(k, v) for k, v in (header.get("__metadata__") or {}).items() if v[:1] in "{["]
    if texts and rng.random() < 0.5:
        key, text = rng.choice(texts)
        header["__metadata__"][key] = json.dumps(json_changed(json.loads(text), rng))
    else:
        header = json_changed(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def proto_changed(data: bytes, rng: Random) -> bytes:
    """An ONNX file: a field of any message in it, or bytes."""
    if rng.random() < 0.2:
        return bytes_changed(data, rng)
    model = onnx.ModelProto()
    model.ParseFromString(data)
    for _ in range(rng.choice((1, 1, 2))):
        _change_message(rng.choice(list(_messages(model))), rng)
    return model.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from _messages(part)


def _change_message(message: Any, rng: Random) -> None:
    fields = list(message.DESCRIPTOR.fields)
    field = rng.choice([f for f, _ in message.ListFields()] or fields)
    if rng.random() < 0.2:
        field = rng.choice(fields)
    name, value = field.name, getattr(message, field.name)
    try:
        if rng.random() < 0.2:
            message.ClearField(name)
        elif field.is_repeated:
            match rng.randrange(3):
                case 0 if len(value):
                    del value[rng.randrange(len(value))]
                case 1 if len(value):
                    value.append(value[rng.randrange(len(value))])
                case _ if field.message_type is None:
                    value.append(_scalar(field, rng))
                case _:
                    value.add()
        elif field.message_type is not None:
            getattr(message, name).SetInParent()
        elif name in ("value", "location") and rng.random() < 0.5 and str(value)[:1] == "{":
            setattr(message, name, json.dumps(json_changed(json.loads(value), rng)))
        else:
            setattr(message, name, _scalar(field, rng, value))
    except (TypeError, ValueError, OverflowError):
        message.ClearField(name)


def _scalar(field: Any, rng: Random, value: Any = None) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        text = rng.choice(
            ("", "x", "fc.weight", "../x", "/etc/passwd", "\u202e", "9" * 30, "MatMul")
        )
        return text.encode() if isinstance(value, bytes) else text
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan")))
    if kind == field.CPPTYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    return rng.choice((0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**62))


def zip_changed(data: bytes, rng: Random) -> bytes:
    """A zip: one member changed, dropped or doubled and the sums set right, or bytes."""
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(i.filename, old.read(i)) for i in old.infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(5):
        case 0:
            del members[at]
        case 1:
            members.append((rng.choice(("x", "../x", name)), content))
        case _ if content[:1] in (b"{", b"["):
            members[at] = (name, json_text(content, rng))
        case _:
            members[at] = (name, bytes_changed(content, rng))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as new:
        for name, content in members:
            new.writestr(name, content)
    return made.getvalue()


def text_changed(data: bytes, rng: Random) -> bytes:
    """CSV or JSONL: a field replaced, a line cut, or bytes."""
    if rng.random() < 0.4:
        return bytes_changed(data, rng)
    lines = data.decode().split("\n")
    at = rng.randrange(len(lines))
    if lines[at][:1] == "{":
        lines[at] = json.dumps(json_changed(json.loads(lines[at]), rng))
    else:
        parts = lines[at].split(",")
        parts[rng.randrange(len(parts))] = rng.choice(
            ("", "x", "1e999", "nan", '"', "9" * 400, "-")
        )
        lines[at] = ",".join(parts)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_of(file: str) -> Callable[[bytes, Random], bytes]:
    """What changes a file of this name."""
    for endings, change in (
        ((".safetensors",), header_changed),
        ((".onnx",), proto_changed),
        ((".json",), json_text),
        ((".npz", ".pt2"), zip_changed),
        ((".csv", ".jsonl"), text_changed),
    ):
        if file.endswith(endings):
            return change
    return bytes_changed


# The oracle: what an output that was written has to be.


def expected(folder: Path, kind: str) -> dict[str, Any] | None:
    """{tensor: fp64 value} of `merge base peft`, as safetensors' own reader reads the files."""
    base = load_tensors((folder / "base.safetensors").read_bytes())
    tensors = load_tensors((folder / "peft" / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "peft" / "adapter_config.json").read_bytes())
    a = next((t for n, t in tensors.items() if n.endswith("fc.lora_A.weight")), None)
    b = next((t for n, t in tensors.items() if n.endswith("fc.lora_B.weight")), None)
    if a is None or b is None or a.ndim != 2 or config.get("peft_type") != "LORA":
        return None
    plain = {"r", "lora_alpha", "target_modules", "peft_type", "task_type", "inference_mode",
             "bias", "base_model_name_or_path", "auto_mapping", "revision"}  # fmt: skip
    if any(config[k] for k in config.keys() - plain):
        return None  # rank patterns, variants: other tests have them
    scale = float(config.get("lora_alpha", 8)) / a.shape[0]
    made = {n: t.astype(np.float64) for n, t in base.items()}
    made["fc.weight"] = made["fc.weight"] + scale * (b.astype("f8") @ a.astype("f8"))
    return made


def wrong(folder: Path, kind: str, line: str) -> str:
    """What is wrong with what a command has written; empty where nothing is, or none is known."""
    if line.startswith("merge base.safetensors peft") and kind in (
        "base",
        "peft",
        "adapter_config",
    ):
        want = expected(folder, kind)
        got = load_tensors((folder / "out.safetensors").read_bytes())
        for name, value in (want or {}).items():
            there = got[name].astype(np.float64)
            size = float(np.abs(value).max(initial=0.0))
            gate = 2e-3 if got[name].dtype.itemsize == 2 else 1e-5
            if there.shape != value.shape or not np.allclose(
                there, value, rtol=0, atol=gate * size, equal_nan=True
            ):
                return f"{name} is not W + s·B·A"
    if line.startswith("merge graph.onnx peft") and kind in ("onnx", "peft"):
        tensors = {
            t.name: onnx.numpy_helper.to_array(t)
            for t in onnx.load(folder / "out.onnx").graph.initializer
        }
        old = {
            t.name: onnx.numpy_helper.to_array(t)
            for t in onnx.load(folder / "graph.onnx").graph.initializer
        }
        want = expected(folder, kind)
        if want is not None and "fc.weight" in tensors and "fc.weight" in old:
            base = load_tensors((folder / "base.safetensors").read_bytes())["fc.weight"]
            delta = (want["fc.weight"] - base).T
            value = old["fc.weight"].astype("f8") + delta
            size = float(np.abs(value).max(initial=0.0))
            if not np.allclose(tensors["fc.weight"], value, rtol=0, atol=1e-5 * size):
                return "fc.weight is not W + s·B·A"
    return ""


# Running.


def rounds(
    seed: int, numbers: Sequence[int], kinds: list[str], folder: Path, more: str = ""
) -> Iterator[tuple[str, ...]]:
    """(class, kind, round, command, what was said) of each that failed; counts at its end."""
    valid = folder / "valid"
    valid.mkdir()
    make(valid)
    before = digest(valid)
    codes: Counter[str] = Counter()
    for i in numbers:
        rng = Random(f"{seed}/{i}")
        kind = rng.choice(kinds)
        file, lines = READERS[kind]
        line = rng.choice(lines)
        data = (valid / file).read_bytes()
        (valid / file).write_bytes(change_of(file)(data, rng))
        try:
            here = digest(valid)
            limit = 60.0 if kind in SLOW or "export" in line else 20.0
            got = child.command([*more.split(), *line.split()], valid, seconds=limit)
            if more:
                print(i, line, got.code, got.out[-2000:], got.err[-4000:])
            codes[f"{got.code}"] += 1
            said = got.err.strip().splitlines()
            told = next((x for x in said if x.startswith("Error: ")), " ".join(said))[:300]
            left = {n: h for n, h in digest(valid).items() if not n.startswith("out")}
            if got.hung:
                yield "hung", kind, str(i), line, told
            elif got.raw and not (more and got.refused):  # -v prints tracebacks
                yield "raw", kind, str(i), line, told
            elif got.code == 2 and not got.refused:
                yield "no hint", kind, str(i), line, told
            elif got.megabytes > child.MEGABYTES:
                yield "memory", kind, str(i), line, f"{got.megabytes:.0f} MB"
            elif left != here and not line.endswith("--force"):
                yield (
                    "changed",
                    kind,
                    str(i),
                    line,
                    str(set(left.items()) ^ set(here.items()))[:200],
                )
            elif got.code and any(valid.glob("out*")) and not line.startswith("merge-all"):
                yield "left", kind, str(i), line, told
            elif got.code == 0 and (what := wrong(valid, kind, line)):
                yield "wrong", kind, str(i), line, what
        finally:
            (valid / file).write_bytes(data)
            for out in valid.glob(f"{OUT}*"):
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            if line.endswith("--force"):
                shutil.rmtree(valid / "old")
                child.command(["merge", "sharded", "peft", "-o", "old"], valid)
    assert digest(valid) == before, "a round changed a file"
    yield ("counts", json.dumps(codes))


def digest(folder: Path) -> dict[str, str]:
    """{name: hash of mode and bytes} of every file."""
    return {
        p.relative_to(folder).as_posix(): f"{p.stat().st_mode:o} "
        + hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def main() -> None:
    """Run rounds, print what failed and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--kind", nargs="*", default=[k for k in READERS if k not in SLOW])
    parser.add_argument("--only", nargs="*", type=int, help="these rounds, with -v")
    given = parser.parse_args()
    numbers = given.only or range(given.n)
    child.prepare()
    more = "-v" if given.only else ""
    with tempfile.TemporaryDirectory() as folder:
        child.tell(rounds(given.seed, numbers, given.kind, Path(folder), more), rounds=len(numbers))


if __name__ == "__main__":
    main()
