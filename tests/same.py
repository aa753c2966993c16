"""Compare this checkout with an older one: commands, their JSON, and the files that they write.

    python -m tests.same OLD_CHECKOUT [--python OLD_PYTHON] [--groups net llama …]

Both checkouts run the commands of GROUPS on the same small models, each in a separate process and
folder. Output is compared field by field, and --help byte for byte. In files, tensors are compared
byte for byte, and metadata, JSON and graphs field by field. Then both checkouts read the files of
the older one. For each command and file, one line says "equal" or "differs: …". The exit code is 1
if anything differs.

Paths of the folders, clock times, and fields that depend on them (MASKED) are not compared. A field
that only the new code writes is listed, but is no difference, if NEW matches its name. The command
`demo` is left out: no checkout contains its model, and it takes minutes to run the same verbs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GROUPS = {
    "net": """
        targets model.py:net
        text: targets model.py:net
        targets model.py:net --train --static x
        insert model.py:net -o start -r 2 --report start.html
        text: insert model.py:net -o start-2 -r 4 --alpha 3 --include fc1,head --seed 3
        insert model.py:net -o dora -r 2 --variant dora --also-train head.bias
        insert model.py:net -o pissa -r 2 --init pissa --exclude head
        insert model.py:net -o eva -r 2 --init eva --data data.npz
        insert model.py:net -o net.pt2 -r 2 --variant rslora --dropout 0.1
        targets net.pt2
        plan model.py:net -o even.json --budget flops:20%
        plan model.py:net data.npz -o kfac.json --method kfac --budget uniform:2
        text: plan model.py:net data.npz -o eva.json --method eva --budget params:100
        insert model.py:net -o planned -r 2 --plan kfac.json
        insert model.py:net -o planned --plan kfac.json
        train model.py:net data.npz -o a -r 2 --steps 6 --save-state state --report train.html
        text: train model.py:net data.npz -o b -r 3 --steps 4 --variant dora --also-train head
        train model.py:net data.npz -o c -r 2 --epochs 1 --mixed-precision bf16 --accumulate 2
        train model.py:net data.npz -o a-more -r 2 --steps 6 --resume state
        train net.pt2 data.npz -o from-pt2 --steps 3
        merge base.safetensors a -o a.safetensors --report merge.html
        text: merge base.safetensors a:0.5 c:2 -o a-c.safetensors
        merge base.safetensors a:0.5 c:2 -o svd.safetensors --how svd --rank 2 --any-base
        merge base.safetensors b -o b.safetensors --dtype bfloat16
        merge base.safetensors a c -o none.safetensors --dry-run
        merge a.safetensors a -o again.safetensors
        merge-all base.safetensors a b c -o fleet -j 2
        text: merge-all base.safetensors a b -o fleet
        extract base.safetensors a.safetensors -o extracted -r 2
        text: extract base.safetensors b.safetensors -o x.safetensors --energy 0.9 --also-full
        truncate a -o a-1 -r 1
        text: truncate c -o c-small --max-error 0.2
        truncate b -o b-small --params 40
        truncate a --table data.npz --model model.py:net
        convert a -o a.onnx_adapter
        text: convert a -o a-kohya.safetensors --format kohya
        convert a-kohya.safetensors -o a-again --base model
        verify model.py:net a
        text: verify model.py:net start
        verify a.safetensors base.safetensors --adapter a --all
        text: verify a.safetensors base.safetensors
        doctor base.safetensors a
        text: doctor base.safetensors wide
        """,
    "onnx": """
        export model.py:net -o base.onnx --provider cpu
        text: insert model.py:net -o one -r 2 --init gaussian
        train model.py:net data.npz -o a -r 2 --steps 4
        train model.py:net data.npz -o b -r 2 --steps 8
        export model.py:net a -o merged.onnx --provider cpu --report export.html
        text: export model.py:net a:0.5 -o half.onnx --provider cpu --static x --opset 21
        export model.py:net a b -o switch.onnx --mode switch --provider cpu
        export model.py:net a b -o load.onnx --mode load --provider cpu --force
        export model.py:net a b -o batch.onnx --mode batch --scales --provider cpu
        export model.py:net a -o fast.onnx --optimise --provider cpu
        export model.py:net a -o half16.onnx --precision float16 --provider cpu
        export model.py:net a -o served.onnx --triton models --max-batch 4 --provider cpu
        export base.onnx a b -o switch-2.onnx --mode switch --provider cpu
        export base.onnx a b -o batch-2.onnx --mode batch --provider cpu
        export merged.onnx -o fast-2.onnx --optimise --provider cpu
        targets base.onnx
        insert base.onnx -o branches.onnx -r 2
        convert branches.onnx -o from-onnx
        merge base.onnx a -o a.onnx --run
        text: merge base.onnx a b:0.5 -o a-b.onnx --delta
        merge base.onnx a -o none.onnx --dry-run
        convert b -o b-2.onnx_adapter --for switch.onnx
        verify merged.onnx model.py:net --adapter a --provider cpu
        text: verify a.onnx base.onnx --adapter a --provider cpu
        verify merged.onnx base.onnx --provider cpu
        verify switch.onnx b-2.onnx_adapter
        bench base.onnx switch.onnx --rounds 1 --size 2,2
        """,
    **{
        name: f"""
        targets {name}
        train {name} {name}.npz -o a -r 2 --steps 3 --batch-size 4 --lr 0.001 {loss}
        merge {name} a -o merged
        verify merged {name} --adapter a
        doctor {name} a
        extract {name} merged -o extracted -r 2
        export {name} a -o merged.onnx --provider cpu
        """
        for name, loss in (
            ("llama", "--loss model.py:words"), ("gpt2", "--exclude wte --loss model.py:words"),
            ("resnet", "--include op:conv2d --also-train classifier"),
        )
    },
    "refusals": """
        targets nowhere.py:net
        targets model.py:gone
        targets model.py:plain
        targets model.py:net --dynamic y:0
        insert model.py:net -o model
        insert model.py:net -o x -r 0
        insert model.py:net -o x -r 99
        insert model.py:net -o x --include fc_1
        insert model.py:net -o x --init eva
        insert model.py:net -o x --variant lora --init pissa --dropout 2
        train model.py:net gone.npz -o x
        train model.py:net data.npz -o x --label other
        merge base.safetensors wide -o x.safetensors
        merge base.safetensors gone -o x.safetensors
        merge model.py base.safetensors -o x.safetensors
        merge-all base.safetensors wide -o x
        export model.py:net wide -o x.onnx
        export model.py:net -o x.bin
        export model.py:net -o x.onnx --mode odd
        extract base.safetensors wide -o x
        truncate wide -o x
        truncate wide -o x --energy 2
        convert wide -o x.bin
        verify base.safetensors model.py
        plan model.py:net -o x.json --method kfac
        bench gone.onnx
        tragets model.py:net
        targets model.py:net --jsn
        text: targets model.py:gone
        """,
}  # fmt: skip
READ = {
    "net": """
        targets net.pt2
        verify net.pt2 net.pt2
        export net.pt2 -o net-pt2.onnx --provider cpu
        export model.py:net planned -o planned.onnx --provider cpu
        insert model.py:net -o planned-2 --plan kfac.json
        train model.py:net data.npz -o a-yet-more -r 2 --steps 6 --resume state
        merge a.safetensors a -o twice.safetensors
        merge a.safetensors b -o both.safetensors
        merge-all base.safetensors a b c -o fleet
        verify b.safetensors base.safetensors --adapter b
        convert a-kohya.safetensors -o a-3 --base model
        """,
    "onnx": """
        merge a.onnx b -o both.onnx
        merge a.onnx a -o twice.onnx
        verify switch.onnx switch.onnx
        verify batch.onnx batch.onnx
        verify load.onnx a.onnx_adapter
        export a.onnx -o a-fast.onnx --optimise --provider cpu
        export model.py:net b -o served.onnx --triton models --max-batch 4 --provider cpu --force
        convert branches.onnx -o from-onnx-2
        """,
}
"""Commands that both checkouts run on the files of the older one, by group."""

MASKED = re.compile(
    r"(^|\.)(seconds|cpu|wall|repeats|date|time|elapsed|stack_trace)(\.|\[|$)"
    r"|stages\[\d+\]\.(ratio|seconds)"
)
"""Fields that hold clock times, or lines of the source of lora-fx."""
CLOCK = re.compile(r"\b\d+(\.\d+)? ?(s|ms|µs|seconds|minutes)\b|\b\d{4}-\d\d-\d\d[T ][\d:.]+Z?")
NEW = re.compile(r"(^|\.)format(_version)?$")
"""Fields that the new code may add."""

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.head(h + torch.tanh(self.fc2(h)))


def net():
    return Net().eval(), (torch.linspace(-1, 1, 24).view(3, 8),), {}


def plain():
    return nn.ReLU(), (torch.zeros(3, 8),), {}


def words(output, labels):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
"""


def prepare(home: Path) -> None:
    """Write the models, data and a misfit adapter that all lines read; without our own code."""
    import numpy as np
    import torch
    import transformers as tf
    from safetensors.torch import save_file

    home.mkdir(parents=True)
    (home / "model.py").write_text(MODEL)
    space: dict[str, Any] = {}
    exec(MODEL, space)
    weights = space["Net"]().state_dict()
    save_file(weights, home / "base.safetensors")
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text("{}")
    save_file(weights, home / "model" / "model.safetensors")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 8), dtype=np.float32)
    np.savez(home / "data.npz", x=x, labels=x[:, :3].argmax(1))
    (home / "wide").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc1"]}
    (home / "wide" / "adapter_config.json").write_text(json.dumps(config))
    wide = {"lora_A": torch.ones(2, 9), "lora_B": torch.ones(12, 2)}
    wide = {f"base_model.model.fc1.{k}.weight": v for k, v in wide.items()}
    save_file(wide, home / "wide" / "adapter_model.safetensors")
    torch.manual_seed(0)
    tf.utils.logging.disable_progress_bar()
    models = {
        "llama": tf.LlamaForCausalLM(tf.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )),
        "gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32,
            bos_token_id=0, eos_token_id=0,
        )),
        "resnet": tf.ResNetForImageClassification(tf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3,
        )),
    }  # fmt: skip
    for name, model in models.items():
        model.eval().save_pretrained(home / name)
        if name == "resnet":
            images = rng.standard_normal((12, 3, 32, 32), dtype=np.float32)
            np.savez(home / f"{name}.npz", pixel_values=images, labels=np.arange(12) % 3)
        else:
            ids = rng.integers(0, 32, (12, 8))
            np.savez(home / f"{name}.npz", input_ids=ids, labels=(ids * 5 + 1) % 32)


# One code's side: a process that runs lines in a folder and prints what each of them gave.


def work(home: str) -> None:
    """Run the lines of stdin; a JSON line each, with what was printed."""
    import torch

    from lora_fx.cli import main

    torch.set_num_threads(1)
    os.chdir(home)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print there by themselves
    for line in sys.stdin.read().splitlines():
        if line == "api":
            answer: dict[str, Any] = {"code": 0, "out": json.dumps(api()), "err": ""}
        else:
            argv = shlex.split(line.removeprefix("text: "))
            if not line.startswith("text: ") and "--help" not in argv:
                argv.append("--json")
            out, err, code = io.StringIO(), io.StringIO(), None
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main(argv)
                except SystemExit as e:
                    code = e.code
            answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        print(json.dumps(answer), file=answers, flush=True)


def api() -> dict[str, str]:
    """Every public name of the library, its arguments and defaults, and its public members'."""
    import lora_fx

    found: dict[str, str] = {}
    for name in lora_fx.__all__:
        thing = getattr(lora_fx, name)
        found[name] = arguments(thing)
        if inspect.isclass(thing):
            for member in dir(thing):
                owner = next((c for c in thing.__mro__ if member in vars(c)), object)
                if not member.startswith("_") and owner.__module__.startswith("lora_fx"):
                    found[f"{name}.{member}"] = arguments(getattr(thing, member))
    return found


def arguments(thing: Any) -> str:
    """Names, kinds and defaults of what can be called; annotations are not compared."""
    if not callable(thing):
        return type(thing).__name__
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return "no signature"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return re.sub(r" at 0x\w+", "", str(inspect.Signature(plain)))


def started(python: str, checkout: Path, home: Path) -> subprocess.Popen[str]:
    """The process of one code, which must be what it imports."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    check = "import lora_fx, sys; print(lora_fx.__file__)"
    at = subprocess.check_output([python, "-P", "-c", check], env=env, text=True).strip()
    if not Path(at).is_relative_to(checkout):
        raise SystemExit(f"{python} imports {at}, which is not in {checkout}")
    command = [python, "-P", "-W", "ignore", str(Path(__file__).resolve()), "--work", str(home)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=home
    )


# What was printed or written, as fields.


def fields(value: Any, home: Path, at: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a JSON value, by its path; JSON in a text is opened too."""
    if MASKED.search(at):
        yield at, "masked"
    elif isinstance(value, Mapping):
        yield from ((f"{at}{{}}", "") for _ in [0] if not value)
        for k, v in value.items():
            yield from fields(v, home, f"{at}.{k}".lstrip("."))
    elif isinstance(value, list):
        yield f"{at}.length".lstrip("."), str(len(value))
        for i, v in enumerate(value):
            yield from fields(v, home, f"{at}[{i}]")
    elif isinstance(value, str) and value[:1] in ("{", "["):
        try:
            yield from fields(json.loads(value), home, at)
        except ValueError:
            yield at, masked(value, home)
    else:
        yield at, masked(value, home) if isinstance(value, str) else repr(value)


def masked(text: str, home: Path) -> str:
    """A text in which the path of the folder and clock times are replaced."""
    return CLOCK.sub("TIME", text.replace(str(home), "HOME"))


def printed(answer: Mapping[str, Any], home: Path) -> dict[str, str]:
    """The exit code and the output of a command, as fields."""
    found = {"exit code": str(answer["code"])}
    for i, line in enumerate(str(answer["err"]).splitlines()):
        found[f"stderr {i}"] = masked(line, home)
    return {**found, **dict(fields(answer["out"], home, "stdout"))}


def digest(data: bytes) -> str:
    """The number of bytes and the start of their hash."""
    return f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()[:12]}"


def content(path: Path, home: Path) -> dict[str, str]:
    """The content of a file, as fields."""
    data, kind = path.read_bytes(), path.suffix
    if kind == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        found = dict(fields(header.pop("__metadata__", {}), home, "metadata"))
        for name, row in header.items():
            begin, end = row["data_offsets"]
            found[f"tensor {name}"] = f"{row['dtype']} {row['shape']} {digest(rest[begin:end])}"
        return found
    if kind == ".onnx":
        return of_onnx(data, home)
    if kind == ".pt2":
        with zipfile.ZipFile(path) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
        found = {}
        for name, inner in members.items():
            if name.endswith(".json"):
                found |= dict(fields(json.loads(inner), home, name))
            else:
                found[name] = digest(inner)
        return found
    if kind == ".json":
        return dict(fields(json.loads(data), home))
    if kind == ".html":
        text = html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", data.decode()))
        return {"words": masked(" ".join(text.split()), home)}
    with contextlib.suppress(UnicodeDecodeError):
        return {f"line {i}": masked(x, home) for i, x in enumerate(data.decode().splitlines())}
    return {"bytes": digest(data)}


def of_onnx(data: bytes, home: Path) -> dict[str, str]:
    """Fields of an ONNX model: its weights, its nodes, its metadata and everything else."""
    import onnx

    model = onnx.load_model_from_string(data)
    found: dict[str, str] = {}
    for row in model.metadata_props:
        found |= dict(fields(row.value, home, f"metadata.{row.key}"))
    for weight in model.graph.initializer:
        found[f"weight {weight.name}"] = digest(weight.SerializeToString())
    for i, node in enumerate(model.graph.node):
        found[f"node {i}"] = f"{node.op_type} {digest(node.SerializeToString())}"
    del model.metadata_props[:], model.graph.initializer[:], model.graph.node[:]
    found["rest"] = str(model)
    return found


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The differences, and the new fields that are allowed."""
    added = [k for k in new if k not in old and NEW.search(k)]
    rows = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, "(none)"), new.get(key, "(none)")
        if a != b and key not in added:
            rows.append(f"{key}: {apart(a, b)}")
    return rows, [f"{k} = {new[k]}" for k in added]


def apart(a: str, b: str) -> str:
    """Two texts, from shortly before their first difference."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    start = max(0, same - 30)
    return f"{a[start : start + 90]!r} → {b[start : start + 90]!r}"


def tell(what: str, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Print whether one command or file is equal; True if it is."""
    rows, added = difference(old, new)
    more = f", and {len(rows) - 6} fields more" if len(rows) > 6 else ""
    said = "differs: " + "; ".join(rows[:6]) + more if rows else "equal"
    print(f"{said:7} {what}" if not rows else f"{what}\n  {said}", flush=True)
    if added:
        print(f"  new fields: {'; '.join(added)}", flush=True)
    return not rows


def compare(sides: Sequence[tuple[str, Path]], homes: Sequence[Path], lines: list[str]) -> int:
    """Run commands with both checkouts; the number of commands and files that differ."""
    before = {p.relative_to(homes[0]) for p in homes[0].rglob("*")}
    works = [started(*side, home) for side, home in zip(sides, homes, strict=True)]
    for process in works:
        assert process.stdin is not None
        process.stdin.write("\n".join(lines))
        process.stdin.close()
    wrong = 0
    for line in lines:
        texts = [process.stdout.readline() for process in works if process.stdout]
        if not all(texts):
            raise SystemExit(f"{line}: a process ended, {[p.wait() for p in works]}")
        shown = [printed(json.loads(t), h) for t, h in zip(texts, homes, strict=True)]
        wrong += not tell(f"{line}  [{shown[1]['exit code']}]", *shown)
    for process in works:
        process.wait()
    found: list[dict[Path, Path]] = [
        {p.relative_to(h): p for p in sorted(h.rglob("*")) if p.is_file()} for h in homes
    ]
    for name in dict.fromkeys([*found[0], *found[1]]):
        if name not in before and "__pycache__" not in name.parts:
            old, new = (
                content(f[name], h) if name in f else {"file": "missing"}
                for f, h in zip(found, homes, strict=True)
            )
            wrong += not tell(f"file {name}", old, new)
    return wrong


def lines_of(text: str) -> list[str]:
    """The commands of one group."""
    return [x.strip() for x in text.splitlines() if x.strip()]


def main() -> int:
    """Compare the checkouts; 1 if anything differs."""
    from lora_fx.cli.group import COMMANDS

    groups = ["help", *GROUPS, "read"]
    parser = argparse.ArgumentParser(
        prog="python -m tests.same",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="The older checkout.")
    parser.add_argument(
        "--python", default=sys.executable, help="The interpreter for the older checkout."
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=groups,
        help=f"Groups of commands to run, by default all: {', '.join(groups)}.",
    )
    given = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    sides = [(given.python, given.old.resolve()), (sys.executable, here)]
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        prepare(root / "first")

        def copies(source: Path, name: str) -> list[Path]:
            made = [root / name / side for side in ("old", "new")]
            for folder in made:
                shutil.copytree(source, folder)
            return made

        for group in given.groups:
            print(f"\n# {group}", flush=True)
            if group == "help":
                lines = ["api", "--help", *(f"{c} --help" for c in COMMANDS)]
            elif group in GROUPS:
                lines = lines_of(GROUPS[group])
            else:
                for one, text in READ.items():
                    if (root / one).exists():
                        homes = copies(root / one / "old", f"read-{one}")
                        wrong += compare(sides, homes, lines_of(text))
                continue
            wrong += compare(sides, copies(root / "first", group), lines)
    print(f"\n{wrong} commands and files differ" if wrong else "\neverything is equal")
    return bool(wrong)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        sys.exit(main())
