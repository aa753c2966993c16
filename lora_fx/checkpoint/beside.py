"""What lies beside a merged checkpoint's shards: companions, the index, links to old shards."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.checkpoint.plan import Plan
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import read_json

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


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says so."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return result


def copy_companions(plan: Plan, folder: Path) -> None:
    """Configs, tokenizer and whatever else belongs to the folder."""
    for name in plan.base.companions()[0]:
        source, target = plan.base.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) == "config.json" and plan.tie is not None:
            config = untied(json.loads(source.read_bytes()))
            target.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            shutil.copyfile(source, target)


def report_name(plan: Plan) -> str:
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


def write_index(plan: Plan, folder: Path) -> None:
    """The index, byte for byte where it still holds, else with its sums and new names."""
    if plan.base.index is None:
        return
    same = not plan.added and all(c.dtype == c.source.dtype for c in plan.changes.values())
    data = plan.base.index.read_bytes()
    if not same:
        index = json.loads(data)
        index["weight_map"] |= dict(plan.added)
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            sizes = {n: t.stop - t.start for n, t in plan.base.tensors.items()}
            sizes |= {n: c.nbytes for n, c in plan.changes.items()}
            metadata["total_size"] = sum(sizes.values())
        if isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
            metadata["total_parameters"] += sum(
                math.prod(plan.changes[n].shape) for n in plan.added
            )
        data = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / plan.base.index.name).write_bytes(data)
