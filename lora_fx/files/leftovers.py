"""Temporary folders next to an output: their names, and removal after a failed or killed run.

An output NAME is written in `.NAME.lora_fx_XXXXXXXX.tmp`, whose token, the XXXXXXXX, outputs that
belong together share. In that folder lie also the old output, between two renames, and a hard link
to the new one, where it stands beside a main output.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.files.entries import exists, is_folder
from lora_fx.files.locks import locked

REPLACED = "replaced"
"""The old output's name in a temporary folder."""
NEW = "new"
"""The name there of a hard link to an output that stands beside a main one."""


def temporary_folder(target: Path, token: str) -> Path:
    """The temporary folder of an output."""
    return target.with_name(f".{target.name}.lora_fx_{token}.tmp")


def token_of(holder: Path) -> str:
    """The token in the name of a temporary folder."""
    return holder.name[-len("XXXXXXXX.tmp") : -len(".tmp")]


def take_back(target: Path, inode: int, copies: Sequence[Path]) -> None:
    """Remove an output, unless another has its name by now; put back what it replaced.

    Args:
        target: The output.
        inode: What had its name when it was written.
        copies: Where what it replaced may lie; the first that exists is put back.
    """
    if not exists(target) or target.lstat().st_ino != inode:
        return
    if is_folder(target):
        shutil.rmtree(target, ignore_errors=True)
    replaced = next(filter(exists, copies), None)
    if replaced is not None:
        os.replace(replaced, target)
    else:
        target.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Remove what an interrupt between two steps left of an output of this run."""
    with contextlib.suppress(OSError, LoraFxError), locked(target):
        clear_stale(target)


def clear_stale(target: Path) -> None:
    """Remove what killed runs left of this target; its lock is held, so none of it is in use."""
    pattern = re.compile(re.escape(f".{target.name}.lora_fx_") + r"([0-9a-f]{8})\.tmp")
    for name in os.listdir(target.parent):
        match = pattern.fullmatch(name)
        holder = target.with_name(name)
        if match is not None and is_folder(holder):
            has_its_name = not exists(holder / target.name)
            _clear_beside(target, match[1], has_its_name)
            discard(holder, target)


def _clear_beside(target: Path, token: str, has_its_name: bool) -> None:
    """Remove temporary files that a killed run left next to an output.

    Where the output did not get its name, the outputs that were put beside it go too. They lie in
    the same folder, and the temporary folder of each has a hard link to it.

    Args:
        target: The main output of the killed run.
        token: That of the run's temporary folders.
        has_its_name: Whether the main output got its name.
    """
    pattern = re.compile(r"\.(.+)\.lora_fx_" + token + r"\.tmp")
    for name in os.listdir(target.parent):
        match = pattern.fullmatch(name)
        holder = target.with_name(name)
        if match is None or match[1] == target.name or not is_folder(holder):
            continue
        side_output = target.with_name(match[1])
        link = holder / NEW
        with contextlib.suppress(OSError, LoraFxError), locked(side_output):
            if not has_its_name and exists(link) and stat.S_ISREG(link.lstat().st_mode):
                take_back(side_output, link.lstat().st_ino, [holder / REPLACED])
            discard(holder, side_output)


def discard(holder: Path, target: Path) -> None:
    """Remove a temporary folder, and put back what it holds the only copy of.

    Args:
        holder: The temporary folder.
        target: Its output, in whose place the old one comes where nothing has the name.

    Raises:
        BaseException: An interrupt that came meanwhile, once the folder is removed.
    """
    replaced = holder / REPLACED
    interrupt: BaseException | None = None
    # An error may pass, and who waits may press Ctrl-C again.
    for is_last_attempt in (False, False, True):
        try:
            if exists(replaced) and not exists(target):
                replaced.rename(target)
            if exists(holder):
                shutil.rmtree(holder, ignore_errors=is_last_attempt)
            break
        except OSError:
            continue
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
