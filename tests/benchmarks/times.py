"""How long the commands take, by the number of parameters: docs/times.md is made from it.

    python -m tests.benchmarks.times [--sizes 4M 135M 500M 1B] [--verbs merge …] [--keep quiet]

Random Llamas in bfloat16 with a tied head, as Hugging Face folders, and a random adapter of rank 8
for all linear layers. Every verb is a whole command in a process of its own. `train, start` and
`train, a step` come from two runs, of one step and of three; a step has 8 rows of 128 tokens, the
defaults. A row is stored as soon as it is measured, so that large sizes can be run one by one:
`--folder` keeps the folders between such runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.dtypes import Array
from tests.benchmarks.interleave import Run, run
from tests.benchmarks.kept import Row, add_keep, here, rounded, store

RANK = 8
LORA_FX = [sys.executable, "-m", "lora_fx.cli", "-q"]
ATTACH = """
import sys, torch, lora_fx
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
lora_fx.attach(model, (torch.ones(2, 16, dtype=torch.int64),))
"""


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    words: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of the linear layers of one block."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.words, self.hidden)}
        for i in range(self.layers):
            lead = f"model.layers.{i}"
            found |= {f"{lead}.{name}.weight": shape for name, shape in self.linears().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{lead}.{norm}.weight"] = (self.hidden,)
        return found | {"model.norm.weight": (self.hidden,)}

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(shape) for shape in self.tensors().values())


SHAPES: Mapping[str, Shape] = {
    "4M": Shape(192, 512, 7, 6, 2, 4096),
    "135M": Shape(576, 1536, 30, 9, 3, 49152),
    "500M": Shape(1024, 4096, 28, 16, 4, 65536),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256),
}
"""135M is the shape of SmolLM2-135M, and 1B that of Llama 3.2 1B."""


def write_base(folder: Path, shape: Shape) -> None:
    """Write a random model with a tokenizer."""
    from tests.fx.train.language_models import tokenizer

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def values(of: tuple[int, ...]) -> Array:
        if len(of) == 1:
            return np.ones(of, ml_dtypes.bfloat16)
        return np.resize(np.roll(noise, rng.integers(noise.size)), of)

    tensors = {name: values(of) for name, of in shape.tensors().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.words,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shape: Shape) -> None:
    """Write a random adapter of all linear layers."""
    rng = np.random.default_rng(1)
    updates = {}
    for i in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            a = rng.standard_normal((RANK, columns), np.float32) / math.sqrt(columns)
            b = rng.standard_normal((rows, RANK), np.float32) * np.float32(0.02)
            updates[f"model.layers.{i}.{name}.weight"] = LowRank(a, b, 2.0 * RANK)
    save_adapter(Adapter(updates, {"task_type": "CAUSAL_LM"}), folder)


def write_rows(path: Path) -> None:
    """Write texts of about 128 tokens."""
    rng = np.random.default_rng(2)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    texts = ["".join(rng.choice(letters, 160)) for _ in range(64)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


@dataclass(frozen=True)
class Inputs:
    """The folders of one size."""

    root: Path

    @classmethod
    def of(cls, root: Path, size: str) -> Inputs:
        """Have another process write what is not there yet.

        The peak of a command would count the memory of the process that starts it.
        """
        made = cls(root)
        if not made.base.exists():
            argv = [sys.executable, "-m", "tests.benchmarks.times", "--sizes", size]
            subprocess.run([*argv, "--write", str(root)], check=True)
        return made

    def write(self, shape: Shape) -> None:
        """Write model, adapter and data."""
        write_base(self.base, shape)
        write_adapter(self.adapter, shape)
        write_rows(self.rows)

    @property
    def base(self) -> Path:
        """The model."""
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.root / "adapter"

    @property
    def rows(self) -> Path:
        """The training data."""
        return self.root / "rows.jsonl"

    @property
    def merged(self) -> Path:
        """The merged model that verify reads."""
        return self.root / "merged"

    def out(self) -> str:
        """Where a command writes; what an earlier one wrote is removed."""
        path = self.root / "out"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return str(path / "written")

    def lora_fx(self, *arguments: object) -> Run:
        """Run a command of lora-fx that writes to a new place."""
        return run([*LORA_FX, *map(str, arguments), "-o", self.out()])

    def export(self, *options: str) -> Run:
        """Export the adapted model."""
        to = f"{self.out()}.onnx"
        return run([*LORA_FX, "export", str(self.base), str(self.adapter), "-o", to, *options])

    def train(self, steps: int) -> Run:
        """Train so many steps of 8 rows, without a validation."""
        options = ["--steps", steps, "--validation", 0, "--max-length", 128]
        return self.lora_fx("train", self.base, self.rows, *options)

    def verify(self) -> Run:
        """Compare the merged folder with base and adapter."""
        if not self.merged.exists():
            merge = [*LORA_FX, "merge", str(self.base), str(self.adapter)]
            run([*merge, "-o", str(self.merged)])
        return run(
            [*LORA_FX, "verify", str(self.merged), str(self.base), "--adapter", str(self.adapter)]
        )


def first_step(inputs: Inputs) -> dict[str, Run]:
    """What a run takes before its first step, and for a step."""
    one, three = inputs.train(1), inputs.train(3)
    step = Run((three.wall - one.wall) / 2, (three.cpu - one.cpu) / 2, three.rss)
    start = Run(one.wall - step.wall, one.cpu - step.cpu, one.rss)
    return {"train, start": start, "train, a step": step}


VERBS: Mapping[str, Callable[[Inputs], Run | dict[str, Run]]] = {
    "targets": lambda inputs: run([*LORA_FX, "targets", str(inputs.base)]),
    "insert": lambda inputs: inputs.lora_fx("insert", inputs.base),
    "attach": lambda inputs: run([sys.executable, "-c", ATTACH, str(inputs.base)]),
    "train": first_step,
    "export merged": lambda inputs: inputs.export(),
    "export --cache": lambda inputs: inputs.export("--cache"),
    "export int4": lambda inputs: inputs.export("--quantise", "int4", "--mode", "switch"),
    "merge": lambda inputs: inputs.lora_fx("merge", inputs.base, inputs.adapter),
    "verify": Inputs.verify,
}
"""Name → what is measured."""


def measured(verb: str, inputs: Inputs, rounds: int) -> dict[str, Run]:
    """The least seconds and the highest peak of each row of a verb."""
    found: dict[str, list[Run]] = {}
    for _ in range(rounds):
        result = VERBS[verb](inputs)
        for name, one in (result if isinstance(result, dict) else {verb: result}).items():
            found.setdefault(name, []).append(one)
    return {
        name: Run(min(r.wall for r in runs), min(r.cpu for r in runs), max(r.rss for r in runs))
        for name, runs in found.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for every size and verb."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.times")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=[*VERBS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="write the folders here, and keep them")
    add_keep(parser)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.write:
        Inputs(given.write).write(SHAPES[given.sizes[0]])
        return
    with tempfile.TemporaryDirectory() as scratch:
        for size in given.sizes:
            inputs = Inputs.of((given.folder or Path(scratch)) / size, size)
            for verb in given.verbs:
                for name, one in measured(verb, inputs, given.rounds).items():
                    row: Row = {
                        "what": name,
                        "parameters": SHAPES[size].parameters,
                        "CPU s": rounded(one.cpu, 3),
                        "wall s": rounded(one.wall, 3),
                        "peak MB": round(one.rss),
                    }
                    print(size, row, flush=True)
                    if given.keep:
                        command = (
                            f"python -m tests.benchmarks.times --sizes {size} --verbs '{verb}'"
                        )
                        table = replace(here("times"), command=command, what=size, note=name)
                        store("times", replace(table, rows=[row], load=given.keep))


if __name__ == "__main__":
    main()
