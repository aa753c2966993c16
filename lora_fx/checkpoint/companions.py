"""Files of a merged checkpoint besides its new shards: companions, the index, linked shards."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.permissions import copy_file, keep_mode
from lora_fx.files.read import read_bytes
from lora_fx.files.strict_json import read_json
from lora_fx.text import Json, JsonView

REPORTS = ("report.json", "lora-fx-report.json")
"""Names of a merge's report; the second one is used if the base has a file of the first name."""


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
            f"{source}: cannot be hard-linked into the output: {error.strerror}",
            "the base and the output need one file system with hard links; leave --link out to "
            "copy",
        ) from error


def untied(config: JsonView) -> Json:
    """A config.json changed to say that head and embedding are untied."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return result


def copy_companions(plan: MergePlan, folder: Path) -> None:
    """Copy configs, tokenizer and other files of the base that do not hold weights."""
    has_new_config = plan.tie is not None or plan.base.settings is not None
    companions, _ = plan.base.companions()
    for name in companions:
        source = plan.base.path / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) == "config.json" and has_new_config:
            config = plan.base.config()
            if plan.tie is not None:
                config = untied(config)
            keep_mode(source.stat(), target)
            target.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            copy_file(source, target)


def report_name(plan: MergePlan) -> str:
    """The name of the report: the first that the base does not use; empty if it uses both.

    A report of the merge that made the base is none of its own: it would not fit the output.
    """
    for name in REPORTS:
        if not _is_file_of_base(plan.base.path / name):
            return name
    return ""


def _is_file_of_base(file: Path) -> bool:
    """Whether a file exists and is not the report of an earlier merge."""
    if not os.path.lexists(file):
        return False
    try:
        return not read_json(file).keys() >= _OURS
    except LoraFxError:
        return True


def write_index(plan: MergePlan, folder: Path) -> None:
    """Write the index: unchanged if it is still right, else with the output's sizes and names.

    Of a view's shards, where there are several, it is new.
    """
    base = plan.base
    if base.of is not None:
        if len(base.shards) > 1:
            stem, _, _ = next(iter(base.shards)).partition("-0")
            file = folder / f"{stem}.safetensors.index.json"
            _write_changed_index(plan, _index_of_view(base), file)
        return
    if base.index is None:
        return
    file = folder / base.index.name
    index = read_json(base.index)
    if not plan.added and all(
        change.dtype == change.source.dtype for change in plan.changes.values()
    ):
        file.write_bytes(read_bytes(base.index))
    elif index:
        _write_changed_index(plan, index, file)


def _index_of_view(base: Checkpoint) -> Json:
    """The index of shards that are not on disk; its sum is to be filled in."""
    homes: dict[str, str] = {}
    for shard, header in base.shards.items():
        homes |= dict.fromkeys(header.tensors, shard)
    return {"metadata": {"total_size": 0}, "weight_map": homes}


def _write_changed_index(plan: MergePlan, index: Json, file: Path) -> None:
    """Write an index with the output's names and sizes."""
    index["weight_map"] |= dict(plan.added)
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        if "total_size" in metadata:
            metadata["total_size"] = _total_size(plan)
        if isinstance(metadata.get("total_parameters"), int):
            for name in plan.added:
                metadata["total_parameters"] += math.prod(plan.changes[name].shape)
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _total_size(plan: MergePlan) -> int:
    """Bytes of all tensors of the output."""
    sizes = {name: info.stop - info.start for name, info in plan.base.tensors.items()}
    sizes |= {name: change.nbytes for name, change in plan.changes.items()}
    return sum(sizes.values())
