"""A small language model whole, from the command line: CPU time and memory of every command.

    python -m tests.benchmarks.language_model [--beside SCRIPT] [--genai PYTHON]
        [--keep quiet]

A random model of SmolLM2-135M's shape is trained for 15 steps on chats, merged, and exported with
its key-value cache: merged, in codes of four bits, and with two adapters that a run chooses and
that the rows of a batch choose. Then each file generates tokens in ONNX Runtime, and where
`--genai` names a python with onnxruntime-genai, the folders for it do so too; the merged model and
the adapters' tokens must be those of transformers. `--beside` names the script `lora-fx` of another
version, which runs the same commands in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from tests.benchmarks.interleave import Run, processor, run
from tests.benchmarks.kept import Row, add_keep, report, rounded

Ids = npt.NDArray[np.int64]
TRAINING = ("--steps", "15", "--batch-size", "4", "--gradient-accumulation-steps", "2")
STEPS = 20
"""Tokens that are generated."""
SHARE = 40.0
"""The second adapter is the first, times this: large enough to change every token."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "model", "chat.jsonl", "-o", "en", *TRAINING, "--lr", "2e-4"),
    "merge": ("merge", "model", "de", "-o", "merged"),
    "merged": (
        "export", "model", "de", "-o", "merged.onnx", "--cache", "--genai", "genai-merged",
    ),
    "switch": ("export", "model", "en", "de", "-o", "switch.onnx", "--cache", "--mode", "switch"),
    "int4": (
        "export", "merged", "-o", "int4.onnx", "--cache", "--quantise", "int4",
        "--genai", "genai-int4",
    ),
    "batch": ("export", "model", "en", "de", "-o", "batch.onnx", "--cache", "--mode", "batch"),
}  # fmt: skip
"""Name → arguments of lora-fx, in a folder of its own."""
GENAI = """
import json, sys
import onnxruntime_genai as og

folder, prompts, steps = json.loads(sys.argv[1])
model = og.Model(folder)
made = []
for prompt in prompts:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    made.append([int(token) for token in generator.get_sequence(0)])
print(json.dumps(made))
"""


def write_model(folder: Path) -> None:
    """A random Llama of SmolLM2-135M's shape, with a tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.fx.train.language_models import tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100000,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.04,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(size=1000).save_pretrained(folder)


def write_chats(path: Path, chats: int = 1000) -> None:
    """Short chats of random words."""
    from tests.fx.train.language_models import WORDS

    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, most)))

    with path.open("w") as file:
        for _ in range(chats):
            asked = {"role": "user", "content": words(5, 20)}
            answered = {"role": "assistant", "content": words(10, 40)}
            file.write(json.dumps({"messages": [asked, answered]}) + "\n")


def write_second_adapter(folder: Path) -> None:
    """The folder `de` beside `en`: its B times SHARE."""
    (folder / "de").mkdir()
    for file in (folder / "en").iterdir():
        if file.suffix == ".json":
            (folder / "de" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "en" / "adapter_model.safetensors")
    grown = {
        name: value * np.float32(SHARE if "lora_B" in name else 1)
        for name, value in tensors.items()
    }
    save_file(grown, folder / "de" / "adapter_model.safetensors")


def commands_run(script: Path, folder: Path) -> dict[str, Run]:
    """Run every command by this script of lora-fx, in a new folder beside model and chats."""
    folder.mkdir()
    for given in ("model", "chat.jsonl"):
        (folder / given).symlink_to(folder.parent / given)
    found = {}
    with contextlib.chdir(folder):
        for name, arguments in COMMANDS.items():
            found[name] = run([str(script), *arguments])
            print(f"{name:8} {found[name].cpu:8.1f} CPU-s {found[name].rss:8.0f} MB", flush=True)
            if name == "train":
                write_second_adapter(folder)
    return found


def rows_of(mine: Mapping[str, Run], other: Mapping[str, Run] | None) -> list[Row]:
    """A row for each command, and one for all of them."""
    made: list[Row] = []
    for name in (*COMMANDS, "all"):
        chosen = [name] if name in COMMANDS else list(COMMANDS)
        row: Row = {"what": f"`{name}`" if name in COMMANDS else name, **_cost(mine, chosen)}
        if other is not None:
            theirs = _cost(other, chosen)
            row |= {f"{figure} beside it": value for figure, value in theirs.items()}
            row["ratio of CPU"] = rounded(row["CPU s"] / theirs["CPU s"], 3)
        made.append(row)
    return made


def _cost(found: Mapping[str, Run], names: Sequence[str]) -> Row:
    seconds = sum(found[name].cpu for name in names)
    peak = max(found[name].rss for name in names)
    return {"CPU s": rounded(seconds, 3), "peak MB": round(peak)}


def greedy(
    file: Path,
    prompts: Ids,
    chosen: Mapping[str, Any] | None = None,
    adapter: Path | None = None,
) -> Ids:
    """Tokens by plain ONNX Runtime and the cache in the file.

    Args:
        file: A decoder with its cache.
        prompts: Of equal lengths, [rows, length].
        chosen: Further inputs, such as the adapter of each row.
        adapter: The adapter of every row, of a file that was written with mode switch.
    """
    import onnxruntime as ort

    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3  # a switch file has a warning for each of its defaults
    session = ort.InferenceSession(file, quiet, providers=["CPUExecutionProvider"])
    options = ort.RunOptions()
    if adapter is not None:
        options.add_active_adapter(loaded := ort.LoraAdapter())
        loaded.Load(str(adapter))
    past = {
        i.name: np.zeros((len(prompts), i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    names = [output.name for output in session.get_outputs()]
    tokens, new = prompts, prompts
    for _ in range(STEPS):
        given = {"input_ids": new, "attention_mask": np.ones_like(tokens), **past, **(chosen or {})}
        out = dict(zip(names, session.run(None, given, options), strict=True))
        new = out["logits"][:, -1].argmax(-1)[:, None]
        tokens = np.concatenate([tokens, new], 1)
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
    return tokens


def transformers_tokens(folder: Path, prompts: Ids) -> Ids:
    """Greedy tokens of transformers' generate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    made: Ids = out.numpy()
    return made


def genai_tokens(python: str, folder: Path, prompts: Ids) -> Ids:
    """Greedy tokens of onnxruntime-genai."""
    given = json.dumps([str(folder), prompts.tolist(), STEPS])
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", GENAI, given], stdout=subprocess.PIPE, env=hidden, check=True
    )
    return np.array(json.loads(done.stdout))


def tokens_compared(folder: Path, genai: str | None) -> None:
    """Print which files generate the tokens that they should."""
    prompts = np.random.default_rng(0).integers(300, 900, (2, 7))
    base = transformers_tokens(folder / "model", prompts)
    merged = transformers_tokens(folder / "merged", prompts)
    say("the adapter changes the tokens", not np.array_equal(base, merged))
    mixed = np.concatenate([base[:1], merged[1:]])
    ids = {"adapter_ids": np.array([0, 2])}
    adapter = folder / "de.onnx_adapter"
    found = {
        "merged.onnx": greedy(folder / "merged.onnx", prompts),
        "switch.onnx": greedy(folder / "switch.onnx", prompts),
        "switch.onnx with de": greedy(folder / "switch.onnx", prompts, adapter=adapter),
        "batch.onnx, base and de": greedy(folder / "batch.onnx", prompts, ids),
    }
    for (name, tokens), wanted in zip(found.items(), (merged, base, merged, mixed), strict=True):
        say(f"{name} generates the tokens of transformers", np.array_equal(tokens, wanted))
    if genai is None:
        return
    for kind in ("merged", "int4"):
        theirs = genai_tokens(genai, folder / f"genai-{kind}", prompts)
        mine = greedy(folder / f"{kind}.onnx", prompts)
        say(f"onnxruntime-genai generates those of {kind}.onnx", np.array_equal(mine, theirs))


def say(what: str, holds: bool) -> None:
    """Print a line that says whether this holds."""
    print(f"{'yes' if holds else 'NO':4} {what}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the commands of one or two versions, and compare tokens and costs."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.language_model")
    parser.add_argument("--beside", type=Path, help="the lora-fx script of another version")
    parser.add_argument("--genai", help="a python with onnxruntime-genai")
    add_keep(parser)
    given = parser.parse_args(argv)
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_model(top / "model")
        write_chats(top / "chat.jsonl")
        mine = commands_run(Path(sys.executable).parent / "lora-fx", top / "mine")
        tokens_compared(top / "mine", given.genai)
        other = None
        if given.beside is not None:
            print(f"\n{given.beside}")
            other = commands_run(given.beside, top / "other")
        report(
            "language_model", "SmolLM2-135M's shape: a command", rows_of(mine, other), given.keep
        )


if __name__ == "__main__":
    main()
