"""Hostile configs: folders of many families whose config.json is changed at random.

    python -m tests.hostile.configs [--n N] [--seed S] [--only FAMILY ...] [--load]

A line for each config by which a command ends in anything but exit 0, 1 or 2, an error without its
hint, or takes more than 2 s of CPU time or 200 MB beyond the family's good folder; then one JSON
object of counts. Every command runs in a fork of a process that has imported the libraries.

With --load the folder is loaded without and with its weights, as commands begin, and not captured:
that takes a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hostile import child
from tests.hostile.families import FAMILIES, save

COMMANDS = {
    "targets bad": 0.75, "targets bad --json": 0.2, "verify bad bad": 0.03,
    "insert bad -o out.pt2 -r 2": 0.02,
}  # fmt: skip
"""Commands, and how often each is drawn: an insert that is not refused costs ten times the CPU."""
SECONDS, MEGABYTES = 2.0, 200.0
ELSEWHERE = (
    "https://evil.example/model.bin", "file:///etc/passwd", "s3://bucket/key", "org/model",
    "org/model@main", "hf-hub:org/model", "hf_hub:org/model", "local-dir:/etc", "hf:org/model",
    "timm:resnet18", "/etc/passwd", "../../../etc/passwd", "~/.cache/huggingface/token", "./x.bin",
    "evil.bin", "weights.safetensors", "..", "os.system", "torch.nn.Linear", "evil:main",
    "C:\\\\evil.bin", "\\\\\\\\host\\\\share", "model.pkl",
)  # fmt: skip
"""Texts that name a place, a class or another model."""
WORDS = ("", "gelu", "resnet18", "gpt2", "no_such_thing", "\u202egelu", "a" * 100_000, "{0}", "%s")
SIZES = (
    -1, 0, 1, 3, 7, 255, 10**4, 10**5, 10**6, 10**9, 10**12, 10**15, 2**31, 2**32, 2**53, 2**63,
    2**64, 10**30, 10**200, -(10**9),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0.5, -1.5, 1e300, [], {}, [[]], [1, "a", None], {"a": 1}, "1", "12", [10**9],
    [10**9] * 4, {"factor": 10**9, "rope_type": "linear"}, [1] * 3000,
)  # fmt: skip
NEW: tuple[dict[str, Any], ...] = (
    {"backbone": "gpt2"}, {"backbone": "resnet18", "use_timm_backbone": True},
    {"backbone": "resnet18", "use_pretrained_backbone": True, "backbone_config": None},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:org/model"}},
    {"vision_config": {"model_type": "timm_wrapper", "architecture": "local-dir:/etc"}},
    {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
    {"text_config": {"model_type": "no_such"}}, {"text_config": 5}, {"vision_config": []},
    {"model_args": {"checkpoint_path": "/etc/passwd"}}, {"model_args": {"depth": 10**9}},
    {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "org/repo--evil.Config"}},
    {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}}, {"adapter_path": "/etc/passwd"},
    {"attn_implementation": "org/kernel"}, {"_attn_implementation": "org/kernel"},
    {"experts_implementation": "org/kernel"}, {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": {"quant_method": "/etc/passwd", "bits": 10**30}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10**30, 0]}},
    {"rope_scaling": {"type": "linear", "factor": 10**30}}, {"rope_parameters": {"rope_theta": 0}},
    {"dtype": "os.system"}, {"torch_dtype": "../x"}, {"architectures": ["os.system"]},
    {"architectures": ["AutoModel"]}, {"architectures": ["PreTrainedModel"]},
    {"architectures": ["BertModel"]}, {"architectures": []}, {"architectures": "LlamaModel"},
    {"model_type": "bert"}, {"model_type": "timm_wrapper", "architecture": "hf-hub:org/x"},
    {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}, "decoder": {}},
    {"num_labels": 10**9}, {"id2label": {"0": "a/b", "x": "c"}}, {"pruned_heads": {"0": [10**9]}},
    {"layer_types": ["full_attention"] * 3}, {"use_bfloat16": "x"}, {"is_decoder": True},
    {"add_cross_attention": True}, {"chunk_size_feed_forward": 10**9}, {"problem_type": "evil"},
    {"tie_word_embeddings": True}, {"transformers_version": "99.0"}, {"gradient_checkpointing": 1},
    {"output_hidden_states": True, "output_attentions": True}, {"return_dict": False},
    {"_name_or_path": "org/model"}, {"_name_or_path": "/etc"}, {"torchscript": True},
)  # fmt: skip


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values that are no objects or lists, and of these."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*at, i))


def put(value: Any, at: Sequence[Any], new: Any) -> None:
    """Give a place another value."""
    for key in at[:-1]:
        value = value[key]
    value[at[-1]] = new


def get(value: Any, at: Sequence[Any]) -> Any:
    """What stands at a place."""
    for key in at:
        value = value[key]
    return value


def changed(config: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A config with one to three changes, and what they are."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.25:
            new = rng.choice(NEW)
            found |= json.loads(json.dumps(new))
            told.append(f"+{json.dumps(new)[:80]}")
            continue
        places = [p for p in leaves(found) if p[0] not in ("architectures", "model_type")]
        numbers = [p for p in places if type(get(found, p)) in (int, float)]
        texts = [p for p in places if isinstance(get(found, p), str)]
        if kind < 0.6 and numbers:
            place, value = rng.choice(numbers), rng.choice(SIZES)
        elif kind < 0.8 and texts:
            place, value = rng.choice(texts), rng.choice((*ELSEWHERE, *WORDS))
        else:
            place, value = rng.choice(places), rng.choice((*ODD, *ELSEWHERE, *SIZES))
        put(found, place, value)
        told.append(f"{'.'.join(map(str, place))}={json.dumps(value)[:60]}")
    return found, "; ".join(told)


def deep(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose text_config lies in itself."""
    inner: dict[str, Any] = {}
    for _ in range(200):
        inner = {"text_config": inner}
    return {**config, **inner}


def prepared(root: Path, families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Good folders, loaded once so that every fork has their modules; their configs."""
    from lora_fx.fx.load.huggingface import load_folder

    child.prepare()
    configs = {}
    for family in families:
        configs[family] = save(family, root / family)
        load_folder(root / family, meta=True)
        load_folder(root / family)
    return configs


def run(line: str, folder: Path) -> child.Outcome:
    """A command, its outputs taken away."""
    got = child.command(line.split(), folder, seconds=60.0)
    for out in folder.glob("out*"):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    return got


def load(argv: Sequence[str]) -> None:
    """Load the folder `bad` twice, in the place of the command line."""
    from lora_fx.errors import LoraFxError
    from lora_fx.fx.load.models import load_model

    try:
        for meta in (True, False):
            load_model("bad", meta=meta)
    except LoraFxError as e:
        print(f"Error: {e.message}\nHint: {e.hint}", file=sys.stderr)
        sys.exit(e.exit_code)
    except Exception as e:
        print(
            f"Error: {type(e).__name__}: {e}\nHint: report this with the output of -v",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(0)


def rounds(
    n: int, seed: int, families: Sequence[str], root: Path, commands: Mapping[str, float] = COMMANDS
) -> Iterator[tuple[str, ...]]:
    """Rows of what failed, and ("counts", JSON of how often each end came)."""
    configs = prepared(root, families)
    ended: Counter[str] = Counter()
    good: dict[tuple[str, str], child.Outcome] = {}
    work = root / "work"
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        family = rng.choice(list(families))
        (line,) = rng.choices(list(commands), list(commands.values()))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root / family, work / "bad")
        if (family, line) not in good:
            good[family, line] = run(line, work)
        plain = good[family, line]
        config, told = changed(configs[family], rng)
        if rng.random() < 0.01:
            config, told = deep(config), "deep"
        (work / "bad" / "config.json").write_text(json.dumps(config))
        got = run(line, work)
        last = " | ".join(got.err.strip().splitlines()[-2:])[:300]
        about = (family, str(i), line, told, last)
        ended[f"exit {got.code}"] += 1
        if got.raw:
            yield ("raw", *about)
        elif got.code == 2 and not got.refused:
            yield ("no hint", *about)
        elif got.cpu > plain.cpu + SECONDS:
            yield ("slow", f"{got.cpu:.1f} s for {plain.cpu:.1f}", *about)
        elif got.megabytes > plain.megabytes + MEGABYTES:
            yield ("large", f"{got.megabytes:.0f} MB for {plain.megabytes:.0f}", *about)
    yield ("counts", json.dumps(ended))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--load", action="store_true")
    given = parser.parse_args()
    commands: Mapping[str, float] = COMMANDS
    if given.load:
        import lora_fx.cli

        commands = {"load": 1.0}
        lora_fx.cli.main = load
    with tempfile.TemporaryDirectory() as root:
        rows = rounds(given.n, given.seed, given.only, Path(root), commands)
        child.tell(rows, configs=given.n)


if __name__ == "__main__":
    main()
