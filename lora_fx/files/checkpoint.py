"""A checkpoint: one `.safetensors` file, or a Hugging Face folder with a file or shards.

Only headers are read. What else lies in a folder (configs, tokenizer, code of its own) is listed,
and so is what must not travel with changed weights: other copies of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.links import companion, inside
from lora_fx.files.read import AGAIN, trusted
from lora_fx.files.replaceable import CONTENTS
from lora_fx.files.run_files import remember
from lora_fx.files.safetensors import CONVERT, TRUST, Header, TensorInfo, Tensors, read_header
from lora_fx.files.strict_json import read_json
from lora_fx.text import Json, JsonView

STEMS = ("model", "diffusion_pytorch_model")
PICKLED = ("pytorch_model", "diffusion_pytorch_model")
"""Beginnings of the names of weight files, as safetensors and as pickles."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".data", ".gguf", ".safetensors", ".npz")
"""Suffixes of files that hold weights: next to merged weights they would be stale copies."""


QUANTISER_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that AutoGPTQ, AutoAWQ and ModelOpt write next to config.json."""

_FIELDS: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "architectures": (list,),
    "tie_word_embeddings": (bool,),
    "text_config": (dict,),
    "quantization_config": (dict,),
    "dtype": (str, dict),
    "torch_dtype": (str, dict),
    "num_attention_heads": (int, float, list),
    "num_key_value_heads": (int, float, list),
    "head_dim": (int, float, list),
    "vocab_size": (int,),
}
"""Fields of config.json that are looked at, and what they can be."""


def model_config(file: Path) -> Json:
    """Read config.json and check the types of its fields, also in its text_config.

    Raises:
        LoraFxError: Names the field.
    """
    config = read_json(file, constants=True)  # which Python writes for infinite limits
    for section in (config, text_config(config)):
        for name, kinds in _FIELDS.items():
            value = section.get(name)
            if value is None:
                continue
            expected = ""
            if type(value) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
            elif name == "architectures" and not all(isinstance(item, str) for item in value):
                expected = "texts"
            if expected:
                raise LoraFxError(
                    f"{file}: {name} is {one_line(repr(value), 80)}; expected {expected}",
                    "correct the file, or download it again",
                )
    return config


def text_config(config: JsonView) -> JsonView:
    """The part of a config.json for the language model in a multimodal model; empty for others."""
    section = config.get("text_config")
    if isinstance(section, dict):
        return section
    return {}


def says_tied(config: JsonView) -> bool | None:
    """Whether config.json ties embedding and head; None if it does not say.

    The model's own word counts before that of its `text_config`, and null is no word.
    """
    field = "tie_word_embeddings"
    tied = config.get(field)
    if tied is None:
        tied = text_config(config).get(field)
    return tied


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model on disk.

    Attributes:
        path: The file or folder.
        shards: File name → header, in the order of the index.
        tensors: Every tensor, from the shard that counts.
        index: The index of the shards, or None.
        settings: What takes the place of config.json; None: the file counts.
        of: The checkpoint that this is a view of, whose shards and quantiser's configs are not the
            view's own; None where it is on disk.
    """

    path: Path
    shards: Mapping[str, Header]
    tensors: Tensors
    index: Path | None = None
    settings: JsonView | None = None
    of: Checkpoint | None = None

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        if self.path.is_dir():
            return self.path
        return self.path.parent

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        total = 0
        for header in self.shards.values():
            total += header.data
            total += sum(tensor.stop - tensor.start for tensor in header.tensors.values())
        return total

    @property
    def elements(self) -> int:
        """The number of elements in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def config(self) -> Json:
        """config.json of a folder; empty for a file, or where there is none."""
        if self.settings is not None:
            return dict(self.settings)
        file = self.path / "config.json"
        if self.path.is_dir() and file.is_file():
            return model_config(file)
        return {}

    def companions(self) -> tuple[list[PurePosixPath], list[str]]:
        """Relative paths of the folder's other files, and names that are left out.

        Hidden names, other weight files and folders that lora-fx wrote are left out.

        Raises:
            LoraFxError: A file is a link that leads out of the folder.
        """
        if not self.path.is_dir():
            return [], []
        checkpoint_files = set(self.shards)
        if self.index is not None:
            checkpoint_files.add(self.index.name)
        if self.of is not None:
            checkpoint_files.update(self.of.shards)
        if self.settings is not None:
            checkpoint_files.update(QUANTISER_CONFIGS)

        companions: list[PurePosixPath] = []
        left_out: list[str] = []
        for name, travels in _walk(self.path, PurePosixPath()):
            if str(name) in checkpoint_files:
                continue
            if travels:
                companions.append(name)
            else:
                left_out.append(str(name))
        for name in companions:
            companion(self.path, str(name))
        return companions, left_out


def _walk(folder: Path, prefix: PurePosixPath) -> Iterator[tuple[PurePosixPath, bool]]:
    """Every file below a folder, and whether it goes along with other weights."""
    for child in sorted(folder.iterdir()):
        name = prefix / child.name
        hidden = child.name.startswith(".")
        if hidden and (".lora_fx_" in child.name or child.name.endswith(".lock")):
            continue  # what is being written, in a folder of its own base
        if child.is_dir() and not (hidden or child.is_symlink() or len(name.parts) > 8):
            written_by_lora_fx = (child / CONTENTS).is_file()
            if not written_by_lora_fx:
                yield from _walk(child, name)
        elif child.name != CONTENTS:
            has_weights = child.name.endswith((*OTHER_WEIGHTS, ".index.json"))
            yield name, child.is_file() and not (hidden or has_weights)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a `.safetensors` file or of a Hugging Face folder.

    Within `trusting`, pickles are read too: as a view whose shards are safetensors files.

    Raises:
        LoraFxError: Damaged, incomplete or unsafe files; the message names file and tensor.
    """
    path = Path(path)
    remember(path)
    if path.is_dir():
        file, is_index = _weights_of(path)
    else:
        file = path
        is_index = False
    if is_index:
        checkpoint = _sharded(path, file)
    else:
        header = read_header(file)
        checkpoint = Checkpoint(path, {file.name: header}, header.tensors)

    is_pickled = any(header.data == 0 for header in checkpoint.shards.values())
    if is_pickled:
        return _of_pickles(checkpoint)
    return checkpoint


def _of_pickles(base: Checkpoint) -> Checkpoint:
    """The view of a checkpoint whose weights are pickles."""
    for name, tensor in base.tensors.items():
        if tensor.start < 0:
            raise LoraFxError(
                f"{tensor.file}: tensor {name!r} is not stored row by row: it is transposed, "
                "compressed, cut off, or in torch's format from before 1.6",
                CONVERT,
            )
    shards = {}
    for name, header in base.shards.items():
        stem = Path(name.removeprefix("pytorch_")).stem
        shards[f"{stem}.safetensors"] = header
    return replace(base, shards=shards, of=base)


def _weights_of(folder: Path) -> tuple[Path, bool]:
    """The file that holds a folder's weights, or the index of its shards and True.

    The first of these that is there:
    1. a file or an index by one of the usual names;
    2. the only index, or without one the only file of weights;
    3. within `trusting`, a pickle or an index of pickles by one of the usual names.
    """
    usual = _usual_name(folder, STEMS, ".safetensors")
    if usual is not None:
        return usual

    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    files = [
        name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")
    ]
    candidates = indexes or files
    if len(candidates) == 1:
        return folder / candidates[0], bool(indexes)
    if candidates:
        raise LoraFxError(
            f"{folder}: {len(candidates)} candidates and no model.safetensors "
            f"({', '.join(candidates[:3])} …)",
            "give one file instead of the folder",
        )

    if trusted():
        pickle = _usual_name(folder, PICKLED, ".bin")
        if pickle is not None:
            return pickle
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise LoraFxError(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code and are not "
            "read",
            "give one file instead of the folder" if trusted() else TRUST,
        )
    if "adapter_config.json" in names:
        raise LoraFxError(
            f"{folder}: the folder holds an adapter, not a model",
            "give the folder of its base model",
        )
    raise LoraFxError(f"{folder}: no .safetensors file", "is the download complete?")


def _usual_name(folder: Path, stems: tuple[str, ...], ending: str) -> tuple[Path, bool] | None:
    """The first of these that is there: a file of weights, or an index and True."""
    for stem in stems:
        file = folder / f"{stem}{ending}"
        if os.path.lexists(file):
            return file, False
        index = folder / f"{stem}{ending}.index.json"
        if os.path.lexists(index):
            return index, True
    return None


def _sharded(folder: Path, index: Path) -> Checkpoint:
    """All shards; if two hold the same tensor, the index decides which one is used."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(v, str) for v in shard_of.values()):
        raise LoraFxError(f"{index}: no weight_map of tensor names to file names", AGAIN)
    names = dict.fromkeys(shard_of.values())
    shards = {shard: _shard(index, shard, shard_of) for shard in names}

    tensors: dict[str, TensorInfo] = {}
    for shard, header in shards.items():
        for name, info in header.tensors.items():
            if shard_of.get(name, shard) != shard:
                continue
            if name in tensors:
                raise LoraFxError(
                    f"{index}: tensor {name!r} is in two shards, and the index does not list it",
                    AGAIN,
                )
            tensors[name] = info
    for name, shard in shard_of.items():
        if name not in tensors:
            raise LoraFxError(
                f"{index.parent / shard}: tensor {name!r} is missing, but {index.name} lists it "
                "here",
                AGAIN,
            )
    return Checkpoint(folder, shards, tensors, index)


def _shard(index: Path, name: str, shard_of: Mapping[str, str]) -> Header:
    """The header of a shard that an index names.

    Args:
        index: The file of the index.
        name: What it says.
        shard_of: Tensor → name of its shard, for messages.
    """
    is_outside = inside(index.parent, name) is None
    endings = (".safetensors", *PICKLES) if trusted() else (".safetensors",)
    if is_outside or not name.endswith(endings):
        is_link = "\0" not in name and os.path.islink(index.parent / name)
        if not is_outside:
            hint = TRUST
        elif is_link:
            hint = "it is a link: replace it by a copy of the file that it points to (cp -L)"
        else:
            hint = "do not use this folder: its index points outside of it"
        raise LoraFxError(
            f"{index}: names the shard {one_line(repr(name), 120)}; expected a .safetensors file "
            "inside the folder",
            hint,
        )
    file = index.parent / name
    if not os.path.exists(file):  # also False for names that no file can have
        count = list(shard_of.values()).count(name)
        raise LoraFxError(
            f"{file}: this shard is missing ({count} tensors)",
            "is the download complete?",
        )
    return read_header(file)


def tensors(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a `.safetensors` file or of a Hugging Face folder, in file order.

    Args:
        path: A file, or a folder with one file or with shards and their index.

    Raises:
        LoraFxError: Damaged, incomplete or unsafe files; the message names file and tensor.
    """
    return dict(open_checkpoint(path).tensors)
