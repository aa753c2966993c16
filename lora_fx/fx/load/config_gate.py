"""Whether a config.json may reach the constructors of a library.

A config is another's word, and constructors do as it says: they look names up on the Hub, open
files, import classes, and build as many layers as it asks for. Its values are numbers, texts,
truth values, lists and objects of these. A text that names a path, an address, a class or another
model is refused, unless nothing that builds the model reads its field. Sizes are compared with the
weights before anything of them is built.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import Tensors
from lora_fx.files.sealed import HUB_CLIENT, TORCH_LOAD, sealed
from lora_fx.files.strict_json import read_json
from lora_fx.fx.tensors import has_values
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.patching import patched
from lora_fx.text import JsonView, human

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
"""Fields that may hold a name of timm, whose tag stands behind a dot."""
PLACES = re.compile(
    r"(?:^|_)(?:paths?|files?|filename|dir|folder|urls?|uri|checkpoints?|repo|repo_id|hub_id)$"
)
"""Fields that name a place, whatever stands in them."""
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
"""Where there are no weights. The deepest models of transformers have some 200."""
SHARED_LAYERS = 64
"""Layers that may share their tensors, as those of ALBERT do, where there are fewer tensors."""
LABELS = re.compile(r"(?:^|_)num_(?:labels|classes)$")
MOST_LABELS = 1 << 17
SIDES = re.compile(r"(?:^|_)(?:image|img|input)_size$")
LONGEST_SIDE = 16384
MOST_CALLS = 100_000
"""Tensors that are made while a model without weights is built."""
SPARE_CALLS = 4000
SPARE_BYTES = 1 << 27
"""What a model may have beside the tensors of its file: tables of positions, masks."""

_ENDS = (
    "bin|pt|pth|ckpt|pkl|pickle|safetensors|npz|npy|h5|msgpack|onnx|gguf|tar|gz|zip|json|py|so|txt"
)
_NAMES = {
    "an address": re.compile(r"[A-Za-z][\w+.-]*://.*", re.S),
    "another model": re.compile(
        r"(?:hf|hf[-_]hub|timm|torchvision|local[-_]dir|file)\s*:.*|[\w.-]+/[\w.-]+(?:@.*)?", re.S
    ),
    "a path": re.compile(rf"\.\.?|~.*|(?=.*\w).*[/\\].*|.*\.(?:{_ENDS})", re.S | re.I),
    "a class": re.compile(
        r"(?!torch\.[a-z]*(?:float|int|bool|complex))"
        r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?::\w+)?|[A-Za-z_]\w*:[A-Za-z_]\w*)"
    ),
}
"""What a text can name beyond the config."""


def named_by(text: str, *, timm: bool = False) -> str:
    """What a text names beyond the config; empty where it names nothing.

    >>> named_by("hf-hub:org/model"), named_by("gelu")
    ('another model', '')
    """
    found = (kind for kind, form in _NAMES.items() if form.fullmatch(text))
    kind = next(found, "")
    return "" if timm and kind == "a class" else kind


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
    count = len(tensors or ())
    widest = max((max(t.shape, default=0) for t in (tensors or {}).values()), default=0)
    limits = {
        LAYERS: max(SHARED_LAYERS, count) if tensors else MOST_LAYERS,
        LABELS: max(MOST_LABELS, widest),
        SIDES: LONGEST_SIDE,
    }
    for place, key, value, is_read in _values(raw, cls):
        if isinstance(value, str) and is_read:
            kind = named_by(value, timm=key in TIMM)
            kind = "a path" if value and not kind and PLACES.search(key) else kind
            if kind:
                raise LoraFxError(
                    f"{file}: {place} is {one_line(repr(value), 80)}, {kind}; a config says "
                    "nothing but what its own model is like",
                    _hint(key),
                )
        if isinstance(value, (int, float)) and not isinstance(value, bool) and is_read:
            _check_number(value, key, f"{file}: {place}", limits)


def backbones(raw: JsonView) -> str:
    """The names of timm that a config has, for messages: a library may look them up on the Hub."""
    texts = (
        f"{place} {one_line(repr(leaf), 80)}"
        for place, key, leaf in _leaves(raw, "", "", 1)
        if key in TIMM and isinstance(leaf, str)
    )
    return ", ".join(place.removeprefix(".") for place in texts)


def _hint(key: str) -> str:
    if key in TIMM:
        return "write its backbone_config in its place, or give file.py:FACTORY"
    return "take it out, or give file.py:FACTORY, which may load what it likes"


def _check_number(
    value: float, key: str, where: str, limits: Mapping[re.Pattern[str], int]
) -> None:
    shown = one_line(repr(value), 60)
    # A whole number of more than 64 bits is read as a float; the largest floats are masks.
    is_long = isinstance(value, float) and value.is_integer() and 2.0**64 <= value < 1e38
    if is_long or (isinstance(value, int) and abs(value) > LARGEST):
        raise LoraFxError(f"{where} is {shown}; at most 2^53 is read", "is the file damaged?")
    for form, most in limits.items():
        if form.search(key) and value > most:
            raise LoraFxError(
                f"{where} is {shown}; expected at most {most}",
                "is config.json that of its weights?",
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
    known = (getattr(cls, "sub_configs", None) or {}).get(key)
    return known if isinstance(known, type) and known is not AutoConfig else None


def _leaves(value: object, place: str, key: str, depth: int) -> Iterator[tuple[str, str, object]]:
    if depth > DEEPEST:
        raise LoraFxError(f"{place[:80]}: nested deeper than {DEEPEST}", "is the file damaged?")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}", name, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{i}]", key, depth + 1)
    else:
        yield place, key, value


def _mentions(cls: type[object], key: str) -> bool:
    """Whether what builds a model of these configs reads a field, as its source tells.

    A field of a config is a name in its class, or a text there; a model has it from something
    called a config. Comments and variables have common words such as `source` or `language`, too.
    """
    configs, models = _sources(Path(inspect.getfile(cls)).parent)
    name = re.escape(key)
    told = rf"""(?mx) \bself\.{name}\b | ^\ +{name}\ *[:=] | [(,]\ *{name}\ *[:=,)]
        | ["']{name}["']"""
    read = rf"""(?x) (?:config|cfg|args)\w*\.{name}\b
        | (?: \[ | get\( | pop\( | attr\([^()\n]*, ) \s*["']{name}["']"""
    return re.search(told, configs) is not None or re.search(read, models) is not None


@functools.cache
def _sources(folder: Path) -> tuple[str, str]:
    """The sources of a family and of what all share: of their configs, and of their models."""
    import transformers

    def text(kind: str, *shared: str) -> str:
        root = Path(transformers.__file__).parent
        files = [*folder.glob(f"{kind}_*.py"), *(root / f"{name}.py" for name in shared)]
        return "\n".join(f.read_text(encoding="utf-8") for f in files if f.is_file())

    models = text("modeling", "backbone_utils", "modeling_utils", "modeling_rope_utils")
    return text("configuration", "configuration_utils"), models


_CONSTRUCTORS = frozenset({
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint,
    torch.arange, torch.linspace, torch.logspace, torch.eye, torch.tril_indices,
    torch.triu_indices,
})  # fmt: skip
"""What makes a tensor of a size that it is given."""


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
            if not (isinstance(leaf, str) and FILES.search(field) and len(leaf) < 4096):
                continue
            exists = "\0" not in leaf and os.path.exists(leaf)
            if exists and folder.resolve() not in Path(leaf).resolve().parents:
                raise LoraFxError(
                    f"{file}: {place} is {one_line(repr(leaf), 80)}, a file beyond the folder",
                    "copy it into the folder and write its name alone, or take the line out",
                )


@contextlib.contextmanager
def sealed_libraries(what: str, *folders: Path) -> Iterator[None]:
    """A block in which libraries reach nothing but some folders; see `sealed`.

    torch.load is refused in it too. So is a client of the Hub, which reads the certificates of the
    machine as it is made, before it connects.

    Args:
        what: What is built, as the subject of a sentence.
        folders: Those whose files may be opened.
    """
    tempfile.gettempdir()  # Python finds it by writing a file: importing torch._dynamo asks for it
    with sealed(what, *folders), _told_calls():
        yield


_patches = contextlib.ExitStack()
_patches_lock = threading.Lock()
_blocks = [0]
"""The patches of `_told_calls`, and how many blocks need them: those of threads may overlap."""


@contextlib.contextmanager
def _told_calls() -> Iterator[None]:
    """A block in which torch.load, or what makes a client, raises an event first, in any thread."""
    with _patches_lock:
        if not _blocks[0]:
            load = _telling(torch.load, TORCH_LOAD)
            _patches.enter_context(patched(torch, load=load))
            _patches.enter_context(patched(torch.serialization, load=load))
            # whatever builds a model of transformers or timm has imported it
            if http := sys.modules.get("huggingface_hub.utils._http"):
                hub = vars(http)
                client = _telling(
                    hub["_GLOBAL_CLIENT_FACTORY"], HUB_CLIENT, hub["constants"].ENDPOINT
                )
                _patches.enter_context(patched(http, _GLOBAL_CLIENT_FACTORY=client))
        _blocks[0] += 1
    try:
        yield
    finally:
        with _patches_lock:
            _blocks[0] -= 1
            if not _blocks[0]:
                _patches.close()


def _telling(plain: Callable[..., Any], event: str, *details: str) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        sys.audit(event, *details)
        return plain(*args, **kwargs)

    return call


FEW = 4096
"""Elements of operands whose result is not looked at: a product of two has some millions."""


def _makes_anew(func: Callable[..., Any]) -> bool:
    """Whether a function may take memory: none that works in place, or reads an attribute."""
    name = getattr(func, "__name__", "")
    return name not in ("__get__", "__set__") and (not name.endswith("_") or name.endswith("__"))


def _operands(value: object) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results, that are no views and have memory or would take some."""
    if isinstance(value, torch.Tensor):
        if not value._is_view():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _operands(part)


def _size(values: tuple[object, ...]) -> int:
    """The elements of arguments that have values."""
    return sum(t.numel() for t in tree_leaves(values) if _has_values(t))


def _has_values(value: object) -> bool:
    return isinstance(value, torch.Tensor) and has_values(value)


def _as_shapes(values: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), values)


class Metered(TorchFunctionMode):
    """A block in which tensors are counted before they are made.

    Args:
        where: The config, for messages.
        tensors: Those of the weights, which say how much there can be; None where there are none.
    """

    def __init__(self, where: str, tensors: Tensors | None) -> None:
        super().__init__()
        self.where = where
        self.calls = self.bytes = 0
        self.most_calls, self.most_bytes = MOST_CALLS, LARGEST
        if tensors:
            stored = sum(tensor.stop - tensor.start for tensor in tensors.values())
            self.most_calls = SPARE_CALLS + 16 * len(tensors)
            self.most_bytes = SPARE_BYTES + 8 * stored

    @contextlib.contextmanager
    def anew(self) -> Iterator[None]:
        """A block whose tensors are counted by themselves, against the same bounds."""
        calls, size = self.calls, self.bytes
        self.calls = self.bytes = 0
        try:
            yield
        finally:
            self.calls, self.bytes = calls, size

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count what a constructor of tensors is about to make; look at what else is large."""
        keywords = dict(kwargs or {})
        if func in _CONSTRUCTORS:
            self._count(func, args, keywords)
        elif _makes_anew(func) and _size((*args, *keywords.values())) > FEW:
            self._look(func, args, keywords)
        return func(*args, **keywords)

    def _look(
        self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Refuse a result that alone is larger than all may be, such as a product of two lines."""
        try:
            made = func(*_as_shapes(args), **_as_shapes(keywords))
        except Exception:  # what reads values has no result on the meta device
            return
        self._refuse_bytes(sum(t.numel() * t.element_size() for t in _operands(made)))

    def _count(
        self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self.calls += 1
        if self.calls > self.most_calls:
            raise LoraFxError(
                f"{self.where} asks for more than {self.most_calls} tensors",
                "is config.json that of its weights?",
            )
        sizes = {k: v for k, v in keywords.items() if k not in ("generator", "out")}
        made = func(*args, **{**sizes, "device": "meta"})
        self.bytes += made.numel() * made.element_size()
        self._refuse_bytes(self.bytes)

    def _refuse_bytes(self, size: int) -> None:
        if size > self.most_bytes:
            raise LoraFxError(
                f"{self.where} asks for tensors of more than {human(self.most_bytes)}B",
                "is config.json that of its weights?",
            )
