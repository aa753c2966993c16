"""lora-fx merge against `cp -r` and PEFT, whole commands.

    python -m tests.benchmarks.merge [--rounds 7] [--layers 12] [--folder /dev/shm] [--synced]
        [--no-peft] [--large]

A bf16 checkpoint shaped as a Llama (12 layers, 1.5 GB, 3 shards), rank 16 on all seven linears of a
layer. PEFT holds the checkpoint in memory; `--no-peft` leaves it out. `--folder` in tmpfs measures
the page cache; with `--synced` on a disk `cp` is followed by an fsync of what it wrote, as our
merge always is. The gate is 2.5 × `cp -r` by the clock. `--large` merges a sparse 10 GB checkpoint
too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.onnx.timing import interleave
from tests.benchmarks.interleave import processor, rows, run
from tests.benchmarks.kept import add_keep, gated, report

HIDDEN, FFN, VOCABULARY = 2048, 5632, 32000
SHAPES = {
    "mlp.down_proj": (HIDDEN, FFN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in order."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        lead = f"model.layers.{i}."
        found |= {f"{lead}{n}.weight": s for n, s in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{lead}{norm}.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def checkpoint(folder: Path, layers: int, shards: int, *, sparse: bool = False) -> None:
    """Write a checkpoint; a sparse one holds zeros that take no disk."""
    folder.mkdir()
    rows = list(tensors(layers).items())
    each = math.ceil(len(rows) / shards)
    home, total = {}, 0
    pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    noise = pool.astype(ml_dtypes.bfloat16).tobytes()
    for s in range(shards):
        name = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part, at, header = rows[s * each : (s + 1) * each], 0, {}
        for n, shape in part:
            size = 2 * math.prod(shape)
            header[n] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            home[n], at = name, at + size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, 0 if sparse else at, len(noise)):
                f.write(noise[: at - start])
            f.truncate(8 + len(text) + at)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 16,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def adapter(folder: Path, layers: int, names: tuple[str, ...], rank: int = 16) -> None:
    """A random adapter; alpha = 1.5 · rank, so the scale is no power of two."""
    rng, entries = np.random.default_rng(1), {}
    for i in range(layers):
        for n in names:
            out, in_ = SHAPES[n]
            a = rng.standard_normal((rank, in_), np.float32) / math.sqrt(in_)
            b = rng.standard_normal((out, rank), np.float32) * np.float32(0.02)
            entries[f"model.layers.{i}.{n}.weight"] = LowRank(a, b, 1.5 * rank)
    save_adapter(Adapter(entries, {"task_type": "CAUSAL_LM"}), folder)


def main() -> None:
    """Make the inputs, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--synced", action="store_true")
    parser.add_argument("--large", action="store_true")
    add_keep(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        base, all_, two, out = (str(root / n) for n in ("base", "all", "qv", "out"))
        checkpoint(root / "base", options.layers, 3)
        adapter(root / "all", options.layers, tuple(SHAPES))
        adapter(root / "qv", options.layers, ("self_attn.q_proj", "self_attn.v_proj"))
        copy = ["cp", "-r", base, out]
        if options.synced:
            copy = ["sh", "-c", f"cp -r {base} {out} && sync {out}/* {out}"]
        merge = [sys.executable, "-m", "lora_fx.cli", "-q", "merge", base]
        commands = {
            "cp -r": copy,
            "cp -r, again": copy,
            "lora-fx merge, all": [*merge, all_, "-o", out],
            "lora-fx merge, q and v": [*merge, two, "-o", out],
            "PEFT, all": [sys.executable, "-c", PEFT, base, all_, out],
        }
        if options.no_peft:
            del commands["PEFT, all"]
        print(f"{processor()}; {options.folder}{', synced' if options.synced else ''}")
        print(f"{sum(f.stat().st_size for f in (root / 'base').iterdir()) / 1e9:.2f} GB, bf16")
        runs = {name: partial(run, argv) for name, argv in commands.items()}
        found = interleave(
            runs, options.rounds, before=lambda: shutil.rmtree(out, ignore_errors=True)
        )
        table = rows(found)
        table[2] = gated(table[2], "2.50 × cp -r", 2.5)
        where = f"in {options.folder}{', synced' if options.synced else ''}"
        report("merge", f"{where}: whole commands, seconds", table, options.keep)
        if options.large:
            shutil.rmtree(out, ignore_errors=True)
            checkpoint(root / "large", 108, 12, sparse=True)
            adapter(root / "largea", 108, ("self_attn.q_proj",))
            size = sum(f.stat().st_size for f in (root / "large").iterdir())
            argv = [sys.executable, "-m", "lora_fx.cli", "-q", "merge", str(root / "large")]
            one = run([*argv, str(root / "largea"), "-o", out])
            held = os.path.getsize(root / "largea" / "adapter_model.safetensors") / 1e6
            print(
                f"{size / 1e9:.1f} GB sparse: {one.wall:.1f} s, peak {one.rss:.0f} MB with an "
                f"adapter of {held:.0f} MB"
            )


if __name__ == "__main__":
    main()
