"""Outputs beside a main one, which go again where that one does not get its name."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_fx.files.entries import exists, inode_of, is_folder
from lora_fx.files.leftovers import NEW, OLD, take_back


class Beside(contextlib.ExitStack):
    """Outputs beside a main one, which go again where that one does not get its name.

    What they replaced comes back. Between two renames a run can be killed: what lies in the folder
    of the main output is taken away by the next run of that, by a link in a temporary folder whose
    name has the same token. A copy elsewhere stays.

    Attributes:
        target: The main output; None where nothing follows.
        temporary: Where that lies until it has its name.
    """

    target: Path | None = None
    temporary: Path | None = None

    def on_error(self, undo: Callable[[], object]) -> None:
        """Let this be called where an error comes before the main output has its name."""
        main = None if self.temporary is None else inode_of(self.temporary)

        def end(error: type[BaseException] | None, *_: object) -> None:
            settled = self.target is not None and main in {inode_of(self.target)} - {None}
            if error is not None and not settled:
                with contextlib.suppress(OSError):
                    undo()

        self.push(end)

    def token(self, target: Path) -> str:
        """What the temporary folder of an output is known by: that of the main one, beside it."""
        main = self.temporary
        together = main is not None and target.parent == main.parent.parent
        return main.parent.name[-12:-4] if together and main else secrets.token_hex(4)

    def add(self, target: Path, new: Path) -> None:
        """Take in what is about to be renamed to `target`; it lies in its temporary folder."""
        inode, old = new.stat().st_ino, new.with_name(OLD)
        self.on_error(lambda: take_back(target, inode, (old, new)))
        if exists(target) and not is_folder(target):  # a folder changes places with its new one
            try:
                os.link(target, old, follow_symlinks=False)
            except OSError:  # no links on this file system
                shutil.copy2(target, old, follow_symlinks=False)
        if not is_folder(new):
            with contextlib.suppress(OSError):
                os.link(new, new.with_name(NEW))
