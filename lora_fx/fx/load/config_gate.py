"""Whether a config.json may reach the constructors of a library.

A config is another's word, and constructors do as it says: they look names up on the Hub, open
files, import classes, and build as many layers as it asks for. Its values are numbers, texts,
truth values, lists and objects of these. A text that names a path, an address, a class or another
model is refused, unless nothing that builds the model reads its field. Sizes are compared with the
weights before anything of them is built.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import Tensors
from lora_fx.files.strict_json import read_json
from lora_fx.text import JsonView

ORIGINS = {
    "_name_or_path", "name_or_path", "base_model", "_commit_hash", "architectures", "auto_map",
    "custom_pipelines", "transformers_version", "dtype", "torch_dtype", "tokenizer_class",
    "processor_class", "id2label", "label2id", "label_names", "task_specific_params",
    "finetuning_task", "quantization_config", "compression_config", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
}  # fmt: skip
"""Fields that say where a model comes from or what its outputs mean. lora-fx reads those that it
uses itself, and takes from the config what a constructor would follow."""
TIMM = {"architecture", "backbone"}
"""Fields that may hold a name of timm with its tag after a dot."""
PLACES = re.compile(
    r"(?:^|_)(?:paths?|files?|filename|dir|folder|urls?|uri|checkpoints?|repo|repo_id|hub_id)$"
)
"""Fields that always name a place, whatever their value."""
DEEPEST = 32
"""Objects and lists in each other. Real configs have up to 6."""
LARGEST = 2**53
"""The largest whole number that every reader of JSON has as it is."""
LAYERS = re.compile(
    r"(?:^|_)(?:layers?|(?<!max_)(?<!min_)depths?|(?:n|num)_\w*blocks|stages|levels|repeats|flows"
    r"|codebooks|quantizers|hidden_groups|attention_types)$|(?:^|_)num_blocks$"
)
"""Fields that say how often something is built."""
MOST_LAYERS = 1024
"""The limit for a folder without weights. The deepest models of transformers have about 200."""
SHARED_LAYERS = 64
"""The limit of layers that may share tensors, as in ALBERT, if there are fewer tensors."""
LABELS = re.compile(r"(?:^|_)num_(?:labels|classes)$")
MOST_LABELS = 1 << 17
SIDES = re.compile(r"(?:^|_)(?:image|img|input)_size$")
LONGEST_SIDE = 16384

_ENDS = (
    "bin|pt|pth|ckpt|pkl|pickle|safetensors|npz|npy|h5|msgpack|onnx|gguf|tar|gz|zip|json|py|so|txt"
)
_NAMES = {
    "an address": re.compile(r"[A-Za-z][\w+.-]*://.*", re.S),
    "the name of another model": re.compile(
        r"(?:hf|hf[-_]hub|timm|torchvision|local[-_]dir|file)\s*:.*|[\w.-]+/[\w.-]+(?:@.*)?", re.S
    ),
    "a path": re.compile(rf"\.\.?|~.*|(?=.*\w).*[/\\].*|.*\.(?:{_ENDS})", re.S | re.I),
    "a class": re.compile(
        r"(?!torch\.[a-z]*(?:float|int|bool|complex))"
        r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?::\w+)?|[A-Za-z_]\w*:[A-Za-z_]\w*)"
    ),
}
"""The kinds of things outside the config that a text can name."""


def named_by(text: str, *, timm: bool = False) -> str:
    """The kind of thing outside the config that a text names; empty if it names nothing.

    >>> named_by("hf-hub:org/model"), named_by("gelu")
    ('another model', '')
    """
    for kind, form in _NAMES.items():
        if form.fullmatch(text):
            if timm and kind == "a class":  # a name of timm and its tag
                return ""
            return kind
    return ""


def check_config(raw: JsonView, file: Path, cls: type[object], tensors: Tensors | None) -> None:
    """Refuse a config that names something else, or sizes that its weights do not have.

    Args:
        raw: What stands in it.
        file: Its path, for messages.
        cls: The class of configs that takes it.
        tensors: Those of the weights; None where there are none.

    Raises:
        LoraFxError: Names the field.
    """
    limits = _limits(tensors)
    for place, key, value, is_read in _values(raw, cls):
        if not is_read or isinstance(value, bool):
            continue
        if isinstance(value, str):
            kind = named_by(value, timm=key in TIMM)
            if value and not kind and PLACES.search(key):
                kind = "a path"
            if kind:
                raise LoraFxError(
                    f"{file}: {place} is {one_line(repr(value), 80)}, {kind}; a config may only "
                    "describe its own model",
                    _hint(key),
                )
        if isinstance(value, (int, float)):
            _check_number(value, key, f"{file}: {place}", limits)


def _limits(tensors: Tensors | None) -> dict[re.Pattern[str], int]:
    """Fields of sizes → the largest value of each, given the tensors of the weights."""
    if not tensors:
        return {LAYERS: MOST_LAYERS, LABELS: MOST_LABELS, SIDES: LONGEST_SIDE}
    longest_dimension = max(max(tensor.shape, default=0) for tensor in tensors.values())
    return {
        LAYERS: max(SHARED_LAYERS, len(tensors)),
        LABELS: max(MOST_LABELS, longest_dimension),
        SIDES: LONGEST_SIDE,
    }


def backbones(raw: JsonView) -> str:
    """The names of timm that a config has, for messages: a library may look them up on the Hub."""
    texts = []
    for place, key, leaf in _leaves(raw, "", "", 1):
        if key in TIMM and isinstance(leaf, str):
            texts.append(f"{place.removeprefix('.')} {one_line(repr(leaf), 80)}")
    return ", ".join(texts)


def _hint(key: str) -> str:
    if key in TIMM:
        return "write its backbone_config in its place, or give file.py:FACTORY"
    return "remove this field, or give file.py:FACTORY, which may load anything"


def _check_number(
    value: float, key: str, where: str, limits: Mapping[re.Pattern[str], int]
) -> None:
    shown = one_line(repr(value), 60)
    # A whole number of more than 64 bits is read as a float; the largest floats are masks.
    is_long = isinstance(value, float) and value.is_integer() and 2.0**64 <= value < 1e38
    if is_long or (isinstance(value, int) and abs(value) > LARGEST):
        raise LoraFxError(f"{where} is {shown}; expected at most 2^53", "is the file damaged?")
    for form, most in limits.items():
        if form.search(key) and value > most:
            raise LoraFxError(
                f"{where} is {shown}; expected at most {most}",
                "is config.json the config of these weights?",
            )


def _values(raw: JsonView, cls: type[object]) -> Iterator[tuple[str, str, object, bool]]:
    """Each value of a config, with its place, the name of its field, and whether that is read."""
    for key, value in raw.items():
        if key in ORIGINS or (key == "pretrained_cfg" and cls.__name__.startswith("Timm")):
            continue
        inner = _inner_class(key, value, cls)
        if inner is not None and isinstance(value, Mapping):
            for place, field, leaf, is_read in _values(value, inner):
                yield f"{key}.{place}", field, leaf, is_read
            continue
        is_read = _mentions(cls, key)
        for place, field, leaf in _leaves(value, key, key, 1):
            yield place, field, leaf, is_read


def _inner_class(key: str, value: object, cls: type[object]) -> type[object] | None:
    """The class of a config within a config."""
    if not isinstance(value, Mapping):
        return None
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = value.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        named: type[object] = CONFIG_MAPPING[kind]
        return named
    inner = (getattr(cls, "sub_configs", None) or {}).get(key)
    if isinstance(inner, type) and inner is not AutoConfig:
        return inner
    return None


def _leaves(value: object, place: str, key: str, depth: int) -> Iterator[tuple[str, str, object]]:
    """The values in objects and lists, each with its place and the name of its field."""
    if depth > DEEPEST:
        raise LoraFxError(f"{place[:80]}: nested deeper than {DEEPEST}", "is the file damaged?")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}", name, depth + 1)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{position}]", key, depth + 1)
    else:
        yield place, key, value


def _mentions(cls: type[object], key: str) -> bool:
    """Whether the source code that builds models from these configs reads a field.

    A field of a config is a name in its class, or a text there; a model has it from something
    called a config. Comments and variables have common words such as `source` or `language`, too.
    """
    configs, models = _sources(Path(inspect.getfile(cls)).parent)
    name = re.escape(key)
    in_configs = rf"""(?mx) \bself\.{name}\b | ^\ +{name}\ *[:=] | [(,]\ *{name}\ *[:=,)]
        | ["']{name}["']"""
    in_models = rf"""(?x) (?:config|cfg|args)\w*\.{name}\b
        | (?: \[ | get\( | pop\( | attr\([^()\n]*, ) \s*["']{name}["']"""
    if re.search(in_configs, configs) is not None:
        return True
    return re.search(in_models, models) is not None


@functools.cache
def _sources(folder: Path) -> tuple[str, str]:
    """The sources of a family and of the shared code: of the configs, and of the models."""
    configs = _source(folder, "configuration", "configuration_utils")
    models = _source(folder, "modeling", "backbone_utils", "modeling_utils", "modeling_rope_utils")
    return configs, models


def _source(folder: Path, kind: str, *shared: str) -> str:
    """The files of one kind in a family's folder and in the shared folder, as one text."""
    import transformers

    root = Path(transformers.__file__).parent
    files = [*folder.glob(f"{kind}_*.py"), *(root / f"{name}.py" for name in shared)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


FILES = re.compile(r"(?:^|_)(?:files?|paths?|dir|spm|vocab|merges|model)$")
"""Fields of a tokenizer_config.json that can name a file to read."""


def check_tokenizer_config(folder: Path) -> None:
    """Refuse a tokenizer whose config names a file beyond its folder.

    Configs that were saved elsewhere name files of that machine, which are not there and not read.

    Raises:
        LoraFxError: Names the field.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    for key, value in read_json(file, constants=True).items():
        for place, field, leaf in _leaves(value, key, key, 1):
            if not isinstance(leaf, str) or not FILES.search(field) or len(leaf) >= 4096:
                continue
            if "\0" in leaf or not os.path.exists(leaf):
                continue
            if folder.resolve() not in Path(leaf).resolve().parents:
                raise LoraFxError(
                    f"{file}: {place} is {one_line(repr(leaf), 80)}, a file outside the folder",
                    "copy the file into the folder and write only its name, or remove the line",
                )
