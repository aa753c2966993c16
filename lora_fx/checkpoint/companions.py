"""What lies beside a merged checkpoint's shards: companions, the index, links to old shards."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import copy_file, keep_mode
from lora_fx.files.read import read_bytes, read_json
from lora_fx.text import Json, JsonView

REPORTS = ("report.json", "lora-fx-report.json")
"""Names of what a merge leaves beside its output; the second where the base has its own first."""


_OURS = frozenset(("ok", "warnings", "tensors", "touched_bytes", "base_verified"))


_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def hard_link(source: Path, target: Path) -> None:
    """Give a shard's inode a second name.

    Raises:
        LoraFxError: The file systems cannot.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise LoraFxError(
            f"{source}: cannot be linked into the output: {error.strerror}",
            "hard links need one file system that has them; leave --link out to copy",
        ) from error


def untied(config: JsonView) -> Json:
    """A config.json that says so."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return result


def copy_companions(plan: MergePlan, folder: Path) -> None:
    """Configs, tokenizer and whatever else belongs to the folder."""
    for name in plan.base.companions()[0]:
        source, target = plan.base.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) == "config.json" and (plan.tie is not None or plan.base.settings is not None):
            config = plan.base.config()
            config = untied(config) if plan.tie is not None else config
            keep_mode(source.stat(), target)
            target.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            copy_file(source, target)


def report_name(plan: MergePlan) -> str:
    """The name of the report: the first that is no file of the base's own; empty if both are.

    A report of the merge that made the base is none of its own: it would not fit the output.
    """
    return next((n for n in REPORTS if not _is_file_of_base(plan.base.path / n)), "")


def _is_file_of_base(file: Path) -> bool:
    if not os.path.lexists(file):
        return False
    try:
        return not read_json(file).keys() >= _OURS
    except LoraFxError:
        return True


def write_index(plan: MergePlan, folder: Path) -> None:
    """The index, byte for byte where it still holds, else with its sums and new names.

    Of a view's shards, where there are several, it is new.
    """
    base, index = plan.base, Json()
    if base.of is not None and len(base.shards) > 1:
        homes = {n: shard for shard, header in base.shards.items() for n in header.tensors}
        index = {"metadata": {"total_size": 0}, "weight_map": homes}
        name = f"{next(iter(base.shards)).partition('-0')[0]}.safetensors.index.json"
    elif base.of is None and base.index is not None:
        index, name = read_json(base.index), base.index.name
        if not plan.added and all(c.dtype == c.source.dtype for c in plan.changes.values()):
            (folder / name).write_bytes(read_bytes(base.index))
            return
    if not index:
        return
    index["weight_map"] |= dict(plan.added)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        sizes = {n: t.stop - t.start for n, t in base.tensors.items()}
        sizes |= {n: c.nbytes for n, c in plan.changes.items()}
        metadata["total_size"] = sum(sizes.values())
    if isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(math.prod(plan.changes[n].shape) for n in plan.added)
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
