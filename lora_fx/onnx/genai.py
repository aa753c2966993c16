"""Folders for onnxruntime-genai: a decoder with its cache, what the runtime reads, its tokenizer.

    DIR/model.onnx          and its data under its own name, so that the reference stays true
    DIR/genai_config.json   names and sizes as the file has them; ids and search of the model's own
    DIR/tokenizer.json …    as they lie in the model's folder, chat template included
    DIR/NAME.onnx_adapter   those of mode switch

Facts: models/builders/base.py of the onnxruntime-genai 0.18.0 wheel, and its runtime. That ends at
a `type` that it does not know, and `decoder` is its type for any decoder. A cache that grows, as
ours, is past_present_share_buffer = false. Of `position_ids` it gives what the config names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.links import companion
from lora_fx.files.permissions import copy_file
from lora_fx.files.side_outputs import Beside
from lora_fx.files.strict_json import read_json
from lora_fx.onnx.session import open_session
from lora_fx.onnx.triton import MODEL, copy_model
from lora_fx.text import Json, is_whole, some

GENAI = "genai_config.json"
NEEDED = ("tokenizer.json", "tokenizer_config.json")
"""What the runtime makes a tokenizer of."""
TOKENIZER = "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt chat_template*"
TYPES = (
    "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo",
    "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Types that both libraries have, but for gpt2: with that the runtime wants further inputs."""
SIZES = ("max_position_embeddings", "hidden_size", "num_attention_heads")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH: Json = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False,
    "min_length": 0, "num_return_sequences": 1,
}  # fmt: skip
"""What generation_config.json may say that the runtime has too, and transformers' defaults."""


@dataclass(frozen=True)
class GenaiFolder:
    """Where a copy for onnxruntime-genai goes, and what the model's folder says of it.

    Attributes:
        folder: DIR.
        tokenizer: Files of the model's folder that are copied.
        model: Fields of genai_config.json's model, and `decoder`'s, that the file does not tell.
        search: Its search.
        notes: What of generation_config.json has no place in it.
        force: Replace a folder that lora-fx made.
    """

    folder: Path
    tokenizer: Sequence[Path]
    model: Json
    search: Json
    notes: Sequence[str]
    force: bool

    def config(self, model: Path) -> Json:
        """The genai_config.json of an .onnx file.

        Raises:
            LoraFxError: Its layers have caches of different shapes.
        """
        session = open_session(model, "cpu").session
        shapes = {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
        caches = {n: (s[1], s[3]) for n, s in shapes.items() if n.startswith("past_key_values.")}
        first, (heads, width) = next(iter(caches.items()))
        for name, found in caches.items():
            if found != (heads, width):
                raise LoraFxError(
                    f"{name} has {found[0]} heads of {found[1]}, and {first} {heads} of {width}: "
                    "onnxruntime-genai takes one shape for all",
                    "leave --genai out",
                )
        given = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in shapes}
        decoder = {
            **self.model["decoder"], "filename": MODEL, "session_options": {"provider_options": []},
            "head_size": width, "num_key_value_heads": heads, "num_hidden_layers": len(caches) // 2,
            "inputs": {**given, **_pair("past", "past_key_values")},
            "outputs": {"logits": "logits", **_pair("present", "present")},
        }  # fmt: skip
        told = {**self.model, "vocab_size": shapes["logits"][2], "decoder": decoder}
        return {"model": told, "search": self.search}

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Make the folder beside a main output; returns its files.

        Raises:
            LoraFxError: It exists and `force` is not given, or the copy does not load.
        """
        with replacing(self.folder, force=self.force, beside=beside) as new:
            new.mkdir()
            copied = copy_model(model, new)
            for path in self.tokenizer:
                copy_file(path, new / path.name)
            for path in adapters:
                shutil.copyfile(path, new / path.name)
            copied += [path.name for path in (*self.tokenizer, *adapters)]
            # of the copy, which has to load
            (new / GENAI).write_text(json.dumps(self.config(new / MODEL), indent=2) + "\n", "utf-8")
        return [self.folder / name for name in (GENAI, *copied)]


def genai_folder(
    folder: str | PathLike[str], target: Path, config: Any, *, force: bool
) -> GenaiFolder:
    """Where a copy of `target` goes, looked at before the model is translated.

    Args:
        folder: DIR.
        target: The .onnx file.
        config: The model's own of transformers; it knows the folder that it was read from.
        force: Replace a folder that lora-fx made.

    Raises:
        LoraFxError: No folder, no tokenizer in it, no end of sequence, or a size that is not known.
    """
    if Path(folder) == target:
        raise LoraFxError(f"{target}: the file and the folder have one name", "--genai DIR")
    said = getattr(config, "_name_or_path", "")
    source = Path(said)
    missing = [n for n in NEEDED if not said or not (source / n).is_file()]
    if missing:
        raise LoraFxError(
            f"{said or 'the model comes from no folder'}: it has no {missing[0]}, which "
            "onnxruntime-genai reads",
            "export the model's own folder; transformers writes its files into it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    found = (p for pattern in TOKENIZER.split() for p in sorted(source.glob(pattern)))
    tokenizer = [companion(source, path.name) for path in found if path.is_file()]
    check_output(folder, force=force, names={GENAI, MODEL, *(p.name for p in tokenizer)})
    text = config.get_text_config()
    sizes = {n: getattr(text, n, None) for n in SIZES}
    unknown = [n for n, size in sizes.items() if not is_whole(size)]
    if unknown:
        raise LoraFxError(
            f"{source}: the config of a {text.model_type} has no {unknown[0]}, which {GENAI} needs",
            "leave --genai out",
        )
    length = sizes.pop(SIZES[0])
    file = companion(source, "generation_config.json")
    own = read_json(file) if file.exists() else {}
    ids = {n: getattr(text, n, None) if own.get(n) is None else own[n] for n in IDS}
    search = {n: own[n] if _like(own.get(n), v) else v for n, v in SEARCH.items()}
    search |= {"max_length": length, "past_present_share_buffer": False}
    model = {**_checked(ids, source), "context_length": length, "decoder": sizes}
    model["type"] = text.model_type if text.model_type in TYPES else "decoder"
    return GenaiFolder(Path(folder), tokenizer, model, search, _notes(own, search, file), force)


def _pair(role: str, prefix: str) -> Json:
    """The names of a layer's keys and values, %d its number."""
    return {f"{role}_{kind}_names": f"{prefix}.%d.{kind}" for kind in ("key", "value")}


def _like(value: object, default: object) -> bool:
    """Whether a field has a value of its kind: a switch or a number."""
    return isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(default, bool)


def _checked(ids: Json, source: Path) -> Json:
    """Ids of tokens without those that are not there; what ends a text pads it, too."""
    for name, found in ids.items():
        every = found if isinstance(found, list) and name == "eos_token_id" else [found]
        if not all(i is None or is_whole(i) for i in every):
            raise LoraFxError(
                f"{source}: {name} is {found!r}; expected a whole number",
                f"correct {name} in generation_config.json",
            )
    end = ids["eos_token_id"]
    if end is None or end == []:
        raise LoraFxError(
            f"{source}: neither generation_config.json nor config.json has an eos_token_id",
            f'put "eos_token_id": N into {source / "generation_config.json"}, N its number in '
            "tokenizer.json",
        )
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {n: i for n, i in ids.items() if i is not None}


def _notes(own: Json, search: Json, file: Path) -> list[str]:
    """A line where fields that would change what is generated are left out."""
    about = ("_", "transformers_version", "use_cache", "output_", "return_dict", *IDS)
    same = {n: (None, False, search.get(n)) for n in own}
    left = [n for n, v in own.items() if not n.startswith(about) and v not in same[n]]
    return [f"{file}: left out, for {GENAI} has no such field: {some(left)}"] if left else []
