"""What killed runs left beside an output, and what goes when a run fails."""

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

OLD, NEW = "replaced", "new"


def take_back(target: Path, inode: int, old: Sequence[Path]) -> None:
    """Remove an output, unless another has its name by now; put back what it replaced."""
    if not exists(target) or target.lstat().st_ino != inode:
        return
    if is_folder(target):
        shutil.rmtree(target, ignore_errors=True)
    replaced = next(filter(exists, old), None)
    if replaced is not None:
        os.replace(replaced, target)
    else:
        target.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Take away what an interrupt between two steps left of an output of this run."""
    with contextlib.suppress(OSError, LoraFxError), locked(target):
        clear_stale(target)


def clear_stale(target: Path) -> None:
    """Remove what killed runs left of this target; its lock is held, so none of it is in use."""
    ours = re.compile(re.escape(f".{target.name}.lora_fx_") + r"([0-9a-f]{8})\.tmp")
    for name in os.listdir(target.parent):
        path = target.with_name(name)
        if (found := ours.fullmatch(name)) and is_folder(path):
            _clear_beside(target, found[1], named=not exists(path / target.name))
            discard(path, target)


def _clear_beside(target: Path, token: str, *, named: bool) -> None:
    """Take away what a killed run left beside an output.

    Where that did not get its name, what was put beside it goes too: it lies in the same folder,
    and its own temporary folder has a hard link to it.
    """
    beside = re.compile(r"\.(.+)\.lora_fx_" + token + r"\.tmp")
    for name in os.listdir(target.parent):
        found, holder = beside.fullmatch(name), target.with_name(name)
        if found is None or found[1] == target.name or not is_folder(holder):
            continue
        path, new = target.with_name(found[1]), holder / NEW
        with contextlib.suppress(OSError, LoraFxError), locked(path):
            if not named and exists(new) and stat.S_ISREG(new.lstat().st_mode):
                take_back(path, new.lstat().st_ino, [holder / OLD])
            discard(holder, path)


def discard(holder: Path, target: Path) -> None:
    """Remove a temporary folder, unless it holds the only copy of what was to be replaced."""
    old, interrupt = holder / OLD, None
    for last in (False, False, True):  # an error may pass, and who waits may press Ctrl-C again
        try:
            if exists(old) and not exists(target):
                old.rename(target)
            if exists(holder):
                shutil.rmtree(holder, ignore_errors=last)
            break
        except OSError:
            continue
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
