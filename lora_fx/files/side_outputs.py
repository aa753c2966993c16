"""Side outputs of a main output, removed if the main output does not get its final name."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_fx.files.entries import exists, inode_of, is_folder
from lora_fx.files.leftovers import NEW, REPLACED, take_back, token_of


class Beside(contextlib.ExitStack):
    """The side outputs of a main output; they are undone if the main output is not completed.

    What they replaced comes back. A run can be killed between two renames. The next run of the main
    output then takes away the outputs in the same folder: each has a link in a temporary folder
    whose name has the token of the main one's. A copy elsewhere stays.

    Attributes:
        target: The main output; None where nothing follows.
        temporary: Where the main output lies until it has its name.
    """

    target: Path | None = None
    temporary: Path | None = None

    def on_error(self, undo: Callable[[], object]) -> None:
        """Call `undo` if an error occurs before the main output has its final name."""
        main_inode: int | None = None
        if self.temporary is not None:
            main_inode = inode_of(self.temporary)

        def undo_on_error(error: type[BaseException] | None, *_: object) -> None:
            if error is None or self._has_its_name(main_inode):
                return
            with contextlib.suppress(OSError):
                undo()

        self.push(undo_on_error)

    def _has_its_name(self, main_inode: int | None) -> bool:
        """Whether the main output, which had this inode, has its final name."""
        if self.target is None or main_inode is None:
            return False
        return inode_of(self.target) == main_inode

    def token(self, target: Path) -> str:
        """Return the token of an output's temporary folder: the main one's if in one folder."""
        if self.temporary is None:
            return secrets.token_hex(4)
        main_holder = self.temporary.parent
        if target.parent != main_holder.parent:
            return secrets.token_hex(4)
        return token_of(main_holder)

    def add(self, target: Path, new: Path) -> None:
        """Register an output that is about to be renamed from `new` to `target`.

        `new` lies in the output's temporary folder.
        """
        inode = new.stat().st_ino
        replaced = new.with_name(REPLACED)
        self.on_error(lambda: take_back(target, inode, (replaced, new)))
        if exists(target) and not is_folder(target):  # a folder changes places with its new one
            try:
                os.link(target, replaced, follow_symlinks=False)
            except OSError:  # no links on this file system
                shutil.copy2(target, replaced, follow_symlinks=False)
        if not is_folder(new):
            with contextlib.suppress(OSError):
                os.link(new, new.with_name(NEW))
