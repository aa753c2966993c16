"""Folders for onnxruntime-genai: a decoder with its cache, its configs and its tokenizer.

    DIR/model.onnx          and its data under its own name, so that the reference stays true
    DIR/genai_config.json   names and sizes as the file has them; ids and search of the model's own
    DIR/tokenizer.json …    as they lie in the model's folder, chat template included
    DIR/NAME.onnx_adapter   those of mode switch

Facts: models/builders/base.py of the onnxruntime-genai 0.18.0 wheel, and its runtime. That ends at
a `type` that it does not know, and `decoder` is its type for any decoder. A cache that grows, as
ours, is past_present_share_buffer = false, with which it captures no CUDA graph. Of `position_ids`
it gives what the config names. A device is named as its model builder names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
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
from lora_fx.onnx.made_for import CPU
from lora_fx.onnx.place import MODEL, copy_model
from lora_fx.onnx.session import open_session
from lora_fx.text import Json, is_whole, some

GENAI = "genai_config.json"
NEEDED = ("tokenizer.json", "tokenizer_config.json")
"""The files from which the runtime builds a tokenizer."""
TOKENIZER = "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt chat_template*"
TYPES = (
    "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo",
    "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Model types of both libraries, except gpt2, for which the runtime needs other inputs."""
INPUTS = ("input_ids", "attention_mask", "position_ids")
LENGTH = "max_position_embeddings"
SIZES = (LENGTH, "hidden_size", "num_attention_heads")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH: Json = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False,
    "min_length": 0, "num_return_sequences": 1,
}  # fmt: skip
"""The fields of generation_config.json that the runtime supports, with their defaults."""
PROVIDER_OPTIONS: Mapping[str, list[Json]] = {
    "cpu": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
    "webgpu": [{"webgpu": {}}],
    "portable": [],
}
"""The entries that name the provider by the target of the file; none is the CPU. A package of the
runtime that has no such provider refuses the folder."""


@dataclass(frozen=True)
class GenaiFolder:
    """A folder for a copy in onnxruntime-genai's form, with facts from the model's folder.

    Attributes:
        folder: DIR.
        tokenizer: Files of the model's folder that are copied.
        model: Fields of genai_config.json's model, and `decoder`'s, that the file does not tell.
        search: The search of genai_config.json.
        notes: Lines on fields of generation_config.json that have no place there.
        force: Replace a folder that lora-fx made.
        made_for: The target that the file is made for.
    """

    folder: Path
    tokenizer: Sequence[Path]
    model: Json
    search: Json
    notes: Sequence[str]
    force: bool
    made_for: str = CPU

    def config(self, model: Path) -> Json:
        """Return the genai_config.json for an .onnx file.

        Raises:
            LoraFxError: Its layers have caches of different shapes.
        """
        session = open_session(model, "cpu").session
        values = (*session.get_inputs(), *session.get_outputs())
        shapes = {value.name: value.shape for value in values}
        caches = [name for name in shapes if name.startswith("past_key_values.")]
        heads, width = _one_cache_shape(caches, shapes)

        inputs = {name: name for name in INPUTS if name in shapes}
        decoder: Json = {
            **self.model["decoder"],
            "filename": MODEL,
            "session_options": {"provider_options": PROVIDER_OPTIONS[self.made_for]},
            "head_size": width,
            "num_key_value_heads": heads,
            "num_hidden_layers": len(caches) // 2,
            "inputs": {**inputs, **_pair("past", "past_key_values")},
            "outputs": {"logits": "logits", **_pair("present", "present")},
        }
        vocab_size = shapes["logits"][2]
        fields = {**self.model, "vocab_size": vocab_size, "decoder": decoder}
        return {"model": fields, "search": self.search}

    def place(self, model: Path, beside: Beside, adapters: Sequence[Path] = ()) -> list[Path]:
        """Create the folder next to a main output; return its files.

        Raises:
            LoraFxError: It exists and `force` is not given, or the copy does not load.
        """
        with replacing(self.folder, force=self.force, beside=beside) as temporary:
            temporary.mkdir()
            names = copy_model(model, temporary)
            for path in self.tokenizer:
                copy_file(path, temporary / path.name)
                names.append(path.name)
            for path in adapters:
                shutil.copyfile(path, temporary / path.name)
                names.append(path.name)
            config = self.config(temporary / MODEL)  # of the copy, which has to load
            (temporary / GENAI).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        return [self.folder / name for name in (GENAI, *names)]


def _one_cache_shape(
    caches: Sequence[str], shapes: Mapping[str, Sequence[Any]]
) -> tuple[object, object]:
    """Return the number of heads and the head width that the caches of all layers have.

    Args:
        caches: The names of the inputs that are caches [batch, heads, length, width].
        shapes: Shapes by name.

    Raises:
        LoraFxError: Two of them differ.
    """
    first = caches[0]
    heads = shapes[first][1]
    width = shapes[first][3]
    for name in caches:
        layer_heads = shapes[name][1]
        layer_width = shapes[name][3]
        if (layer_heads, layer_width) != (heads, width):
            raise LoraFxError(
                f"{name} has {layer_heads} heads of {layer_width} and {first} {heads} of {width}, "
                "but onnxruntime-genai takes one shape for all",
                "leave --genai out",
            )
    return heads, width


def genai_folder(
    folder: str | PathLike[str], target: Path, config: Any, *, force: bool, made_for: str = CPU
) -> GenaiFolder:
    """Prepare the folder for a copy of `target`, before the model is exported.

    Args:
        folder: DIR.
        target: The .onnx file.
        config: The model's own of transformers; it knows the folder that it was read from.
        force: Replace a folder that lora-fx made.
        made_for: The target that the file is made for: cpu, cuda or webgpu.

    Raises:
        LoraFxError: No folder, no tokenizer in it, no end of sequence, or a size that is not known.
    """
    if Path(folder) == target:
        raise LoraFxError(
            f"{target}: the file and the folder have the same name", "pass --genai DIR"
        )

    source = _source(config)
    tokenizer = _tokenizer_files(source)
    check_output(folder, force=force, names={GENAI, MODEL, *(path.name for path in tokenizer)})
    text_config = config.get_text_config()
    decoder = _sizes(text_config, source)
    context_length = decoder.pop(LENGTH)

    generation_file = companion(source, "generation_config.json")
    generation = read_json(generation_file) if generation_file.exists() else {}
    model: Json = {
        **_token_ids(generation, text_config, source),
        "context_length": context_length,
        "decoder": decoder,
        "type": text_config.model_type if text_config.model_type in TYPES else "decoder",
    }
    search = _search(generation)
    search["max_length"] = context_length
    search["past_present_share_buffer"] = False
    notes = _notes(generation, search, generation_file)
    return GenaiFolder(Path(folder), tokenizer, model, search, notes, force, made_for)


def _source(config: Any) -> Path:
    """Return the folder that a model was read from; raise if it lacks tokenizer files."""
    folder = getattr(config, "_name_or_path", "")
    for name in NEEDED:
        if not folder or not (Path(folder) / name).is_file():
            raise LoraFxError(
                f"{folder or 'the model comes from no folder'}: it has no {name}, which "
                "onnxruntime-genai reads",
                "export the model's own folder, with the files that transformers writes: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
    return Path(folder)


def _tokenizer_files(source: Path) -> list[Path]:
    """Return the files of a model's folder that belong to its tokenizer."""
    files: list[Path] = []
    for pattern in TOKENIZER.split():
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                files.append(companion(source, path.name))
    return files


def _sizes(text_config: Any, source: Path) -> Json:
    """Return the sizes that genai_config.json needs from a model's config."""
    sizes = {name: getattr(text_config, name, None) for name in SIZES}
    for name, size in sizes.items():
        if not is_whole(size):
            raise LoraFxError(
                f"{source}: the config of a {text_config.model_type} has no {name}, which {GENAI} "
                "needs",
                "leave --genai out",
            )
    return sizes


def _search(generation: Json) -> Json:
    """Return the search fields from generation_config.json, or their defaults."""
    search: Json = {}
    for name, default in SEARCH.items():
        value = generation.get(name)
        search[name] = value if _is_like(value, default) else default
    return search


def _pair(role: str, prefix: str) -> Json:
    """Return the name patterns of a layer's keys and values; %d is the layer's number."""
    return {f"{role}_{kind}_names": f"{prefix}.%d.{kind}" for kind in ("key", "value")}


def _is_like(value: object, default: object) -> bool:
    """Whether a field's value has the type of its default: a bool or a number."""
    return isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(default, bool)


def _token_ids(generation: Json, text_config: Any, source: Path) -> Json:
    """Return the special tokens; the end token is the default for the padding token.

    generation_config.json goes before the model's config.
    """
    ids: Json = {}
    for name in IDS:
        ids[name] = generation.get(name)
        if ids[name] is None:
            ids[name] = getattr(text_config, name, None)
        if not _are_ids(name, ids[name]):
            raise LoraFxError(
                f"{source}: {name} is {ids[name]!r}; expected a whole number",
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
    return {name: value for name, value in ids.items() if value is not None}


def _are_ids(name: str, value: object) -> bool:
    """Whether a value is None or a token id; several ids are allowed for the end token."""
    if isinstance(value, list) and name == "eos_token_id":
        return all(number is None or is_whole(number) for number in value)
    return value is None or is_whole(value)


def _notes(generation: Json, search: Json, file: Path) -> list[str]:
    """Return a note on fields that would change generated text but are left out."""
    harmless = ("_", "transformers_version", "use_cache", "output_", "return_dict", *IDS)
    left_out: list[str] = []
    for name, value in generation.items():
        if not name.startswith(harmless) and value not in (None, False, search.get(name)):
            left_out.append(name)
    if not left_out:
        return []
    return [
        f"{file}: these fields are left out, since {GENAI} does not have them: {some(left_out)}"
    ]
