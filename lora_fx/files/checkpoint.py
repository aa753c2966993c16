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
from lora_fx.files.atomic import CONTENTS
from lora_fx.files.read import AGAIN, companion, inside, read_json, remember, trusted
from lora_fx.files.safetensors import CONVERT, TRUST, Header, TensorInfo, Tensors, read_header
from lora_fx.text import Json, JsonView

STEMS = ("model", "diffusion_pytorch_model")
PICKLED = ("pytorch_model", "diffusion_pytorch_model")
"""How the files of weights begin, as safetensors and as pickles."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".data", ".gguf", ".safetensors", ".npz")
"""Endings of files that hold weights: beside merged ones they would be stale copies."""


QUANTISER_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What AutoGPTQ, AutoAWQ and ModelOpt write beside config.json."""

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
    """A config.json whose fields are what they should be, those of its text_config too.

    Raises:
        LoraFxError: Names the field.
    """
    config = read_json(file, constants=True)  # which Python writes for infinite limits
    for part in (config, text_config(config)):
        for name, kinds in _FIELDS.items():
            value, wanted = part.get(name), " or ".join(k.__name__ for k in kinds)
            fits = value is None or type(value) in kinds
            if fits and name == "architectures":
                fits, wanted = all(isinstance(n, str) for n in value or ()), "texts"
            if not fits:
                raise LoraFxError(
                    f"{file}: {name} is {one_line(repr(value), 80)}; expected {wanted}",
                    "correct the file, or download it again",
                )
    return config


def text_config(config: JsonView) -> JsonView:
    """What a config.json of several models says of the one of language; empty for others."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def says_tied(config: JsonView) -> bool | None:
    """What a config.json says of one table for embedding and head; None where it says nothing.

    The model's own word counts before that of its `text_config`, and null is no word.
    """
    field = "tie_word_embeddings"
    own = config.get(field)
    return text_config(config).get(field) if own is None else own


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
        """Where the shards lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        sizes = (t.stop - t.start for h in self.shards.values() for t in h.tensors.values())
        return sum(sizes) + sum(h.data for h in self.shards.values())

    @property
    def elements(self) -> int:
        """How many all tensors have together."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    def config(self) -> Json:
        """config.json of a folder; empty for a file, or where there is none."""
        if self.settings is not None:
            return dict(self.settings)
        file = self.path / "config.json"
        return model_config(file) if self.path.is_dir() and file.is_file() else {}

    def companions(self) -> tuple[list[PurePosixPath], list[str]]:
        """Relative paths of the folder's other files, and names that are left out.

        Hidden names, other weight files and folders that lora-fx wrote are left out.

        Raises:
            LoraFxError: A file is a link that leads out of the folder.
        """
        mine = {*self.shards, self.index.name if self.index else ""}
        mine |= {*self.of.shards} if self.of is not None else set()
        mine |= {*QUANTISER_CONFIGS} if self.settings is not None else set()
        found = _walk(self.path, PurePosixPath()) if self.path.is_dir() else ()
        others = [(name, goes) for name, goes in found if str(name) not in mine]
        for name in (n for n, goes in others if goes):
            companion(self.path, str(name))
        return [n for n, goes in others if goes], [str(n) for n, goes in others if not goes]


def _walk(folder: Path, at: PurePosixPath) -> Iterator[tuple[PurePosixPath, bool]]:
    """Every file below a folder, and whether it goes along with other weights."""
    for child in sorted(folder.iterdir()):
        name, hidden = at / child.name, child.name.startswith(".")
        if hidden and (".lora_fx_" in child.name or child.name.endswith(".lock")):
            continue  # what is being written, in a folder of its own base
        if child.is_dir() and not (hidden or child.is_symlink() or len(name.parts) > 8):
            if not (child / CONTENTS).is_file():  # a folder of lora-fx's own
                yield from _walk(child, name)
        elif child.name != CONTENTS:
            weights = child.name.endswith((*OTHER_WEIGHTS, ".index.json"))
            yield name, child.is_file() and not (hidden or weights)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a `.safetensors` file or of a Hugging Face folder.

    Within `trusting`, pickles are read too: as a view whose shards are safetensors files.

    Raises:
        LoraFxError: Damaged, incomplete or unsafe files; the message names file and tensor.
    """
    path = Path(path)
    remember(path)
    file, is_index = _weights_of(path) if path.is_dir() else (path, False)
    if is_index:
        found = _sharded(path, file)
    else:
        header = read_header(file)
        found = Checkpoint(path, {file.name: header}, header.tensors)
    pickled = any(not header.data for header in found.shards.values())
    return _of_pickles(found) if pickled else found


def _of_pickles(base: Checkpoint) -> Checkpoint:
    """The view of a checkpoint whose weights are pickles."""
    odd = next((n for n, t in base.tensors.items() if t.start < 0), None)
    if odd is not None:
        raise LoraFxError(
            f"{base.tensors[odd].file}: the numbers of tensor {odd!r} do not lie there row by row: "
            "it is transposed, compressed, cut off, or in torch's format from before 1.6",
            CONVERT,
        )
    stems = (Path(name.removeprefix("pytorch_")).stem for name in base.shards)
    shards = {f"{s}.safetensors": h for s, h in zip(stems, base.shards.values(), strict=True)}
    return replace(base, shards=shards, of=base)


def _weights_of(folder: Path) -> tuple[Path, bool]:
    """The file that holds a folder's weights, or the index of its shards and True."""
    if (found := _named(folder, STEMS, ".safetensors")) is not None:
        return found
    names = sorted(p.name for p in folder.iterdir())
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")]
    indexes = [n for n in names if n.endswith(".safetensors.index.json")]
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return folder / (indexes or files)[0], bool(indexes)
    if indexes or files:
        raise LoraFxError(
            f"{folder}: {len(indexes) or len(files)} candidates and no model.safetensors "
            f"({', '.join((indexes or files)[:3])} …)",
            "give the one file that you mean",
        )
    if trusted() and (found := _named(folder, PICKLED, ".bin")) is not None:
        return found
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        raise LoraFxError(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code and are not "
            "read",
            "give the one file that you mean" if trusted() else TRUST,
        )
    if "adapter_config.json" in names:
        raise LoraFxError(f"{folder}: an adapter, not a model", "give the folder of its base model")
    raise LoraFxError(f"{folder}: no .safetensors file", "is the download complete?")


def _named(folder: Path, stems: tuple[str, ...], ending: str) -> tuple[Path, bool] | None:
    """The first of these that is there: a file of weights, or an index and True."""
    for name in (f"{stem}{ending}{index}" for stem in stems for index in ("", ".index.json")):
        if os.path.lexists(folder / name):
            return folder / name, name.endswith(".json")
    return None


def _sharded(folder: Path, index: Path) -> Checkpoint:
    """All shards; where two hold the same name, the index says which counts."""
    home = read_json(index).get("weight_map")
    if not isinstance(home, dict) or not all(isinstance(v, str) for v in home.values()):
        raise LoraFxError(f"{index}: no weight_map of tensor names to file names", AGAIN)
    result: dict[str, TensorInfo] = {}
    shards = {shard: _shard(index, shard, home) for shard in dict.fromkeys(home.values())}
    for shard, header in shards.items():
        for name, info in header.tensors.items():
            here = home.get(name, shard) == shard
            if here and name in result:
                raise LoraFxError(
                    f"{index}: tensor {name!r} is in two shards and in no line of it", AGAIN
                )
            if here:
                result[name] = info
    lost = next((n for n in home if n not in result), None)
    if lost is not None:
        raise LoraFxError(
            f"{index.parent / home[lost]}: tensor {lost!r} is not there, but {index.name} says so",
            AGAIN,
        )
    return Checkpoint(folder, shards, result, index)


def _shard(index: Path, name: str, home: Mapping[str, str]) -> Header:
    outside = inside(index.parent, name) is None
    if outside or not name.endswith((".safetensors", *(PICKLES if trusted() else ()))):
        elsewhere = "do not use this folder: its index points elsewhere"
        copied = "it is a link: copy what it points to (cp -L) in its place"
        linked = "\0" not in name and os.path.islink(index.parent / name)
        raise LoraFxError(
            f"{index}: names the shard {one_line(repr(name), 120)}; expected a .safetensors file "
            "inside the folder",
            (copied if linked else elsewhere) if outside else TRUST,
        )
    file = index.parent / name
    if not os.path.exists(file):  # also False for names that no file can have
        count = sum(1 for v in home.values() if v == name)
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
