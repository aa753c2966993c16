"""An adapter's names and a checkpoint's: what lies between them, and layers that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.loaded import Loaded, Stack, loaded_of
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo
from lora_fx.formats.peft.config import missing
from lora_fx.targets.target import base_name

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


class Renaming:
    """What the checkpoint calls the tensors that an adapter names.

    A prefix that the adapter's names have more, or less, than the checkpoint's; then the names of
    the loaded model. Called with a name of the adapter it gives that of the checkpoint.
    """

    def __init__(self, more: str = "", less: str = "", loaded: Loaded | None = None) -> None:
        self.more, self.less, self.loaded = more, less, loaded or Loaded()
        self._of_file = {stored: name for name, stored in self.loaded.names.items()}

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor."""
        name = self.prefixed(name)
        return self.loaded.names.get(name, name)

    def prefixed(self, name: str) -> str:
        """A name of the adapter with the checkpoint's prefix, else as it is."""
        return self.less + name.removeprefix(self.more)

    def stack(self, name: str) -> Stack | None:
        """The matrices that the checkpoint has instead of one tensor of this name."""
        return self.loaded.stacks.get(self.prefixed(name))

    def info(self, name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
        """The tensor of an adapter's name; of a stack, its shape and its first matrix."""
        stack = self.stack(name)
        return stack.info if stack else tensors.get(self(name))

    def back(self, name: str, *, loaded: bool = False) -> str:
        """The adapter's name of a tensor of the checkpoint, or of the model that loads it."""
        if loaded:
            name = self._of_file.get(name, name)
        return self.more + name.removeprefix(self.less)

    def tellers(self, names: Iterable[str]) -> tuple[bool, bool]:
        """Does an adapter have names that only the file has, and some that only the model has?"""
        mine = [self.prefixed(n) for n in names]
        return any(n in self._of_file for n in mine), any(n in self.loaded for n in mine)


def renaming(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    notes: list[str],
) -> Renaming:
    """The names of the loaded model, and the prefix under which the most names are known.

    There is no prefix where names are known as they are. A model saved by its inner class lacks
    the outer's prefix (`bert.`), a component of a pipeline its own (`unet.`), and the reverse.
    """
    loaded = loaded_of(tensors, config)
    known = {*tensors, *loaded.names, *loaded.stacks}
    names = [base_name(k) for k in adapter.entries]
    best = Renaming(loaded=loaded)
    if not any(n in known for n in names):
        tails = {f".{n}" for n in names}
        leads = {n[: i + 1] for n in names for i, c in enumerate(n) if c == "."}
        tries = [Renaming(lead, "", loaded) for lead in sorted(leads)]
        # The ends of a known name that begin after a dot are the names that may lack a prefix.
        ends = {t[: i + 1] for t in known for i, c in enumerate(t) if c == "." and t[i:] in tails}
        tries += [Renaming("", lead, loaded) for lead in sorted(ends)]
        hits = {
            t: sum(n.startswith(t.more) and t.prefixed(n) in known for n in names) for t in tries
        }
        most = max(hits.values(), default=0)
        winners = [t for t in tries if hits[t] == most]
        if most and len(winners) == 1:
            best = winners[0]
            what = f"without {best.more!r}" if best.more else f"with {best.less!r} before them"
            notes.append(f"the adapter's names are the base's {what}")
    if best.tellers(names)[1]:
        notes.append(
            "the adapter's names are those of the loaded model: transformers 5 renames the "
            f"parameters of a {config.get('model_type')} when it loads"
        )
    return best


def absent_of(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], rename: Renaming
) -> dict[str, str]:
    """{module of the base that PEFT would have adapted and the adapter lacks: by which entry}.

    PEFT compares target_modules with the names of the model that it was given, which are the
    file's, or those that transformers 5 makes of them. Where the adapter's own names do not tell
    which, a module counts only if both say so. Experts that the file has one by one may have been
    stacks there, and no modules; they count where the adapter has an update of one.
    """
    config = adapter.metadata.get("peft")
    if not isinstance(config, Mapping):
        return {}
    names = list(adapter.entries)
    for low in adapter.lowrank.values():  # other names of the same tensor
        also = low.extra.get("tied")
        names += [low.use, *(also if isinstance(also, list) else ())]
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    apart = any(_EXPERT.search(name) for name in adapted)
    weights = [
        name
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1 and (apart or not _EXPERT.search(name))
    ]
    of_file, of_model = rename.tellers(map(base_name, names))
    answers = []
    for loaded in (False, True):
        if of_file != of_model and loaded == of_file:
            continue  # the adapter's own names tell
        modules = {
            rename.back(n, loaded=loaded).removesuffix(".weight"): n.removesuffix(".weight")
            for n in weights
        }
        lost = missing(config, modules, adapted)
        answers.append({modules[m]: entry for m, entry in lost.items()})
    return {m: entry for m, entry in answers[0].items() if all(m in a for a in answers)}


def check_present(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    rename: Renaming,
    where: str,
    notes: list[str],
    *,
    allow: bool,
) -> None:
    """Raise for a layer that the adapter's own config adapts and its file lacks; or note it."""
    absent = absent_of(adapter, tensors, rename)
    if not absent:
        return
    name, entry = next(iter(absent.items()))
    said = (
        f"{where}: {name!r} is adapted by the adapter's own config (target_modules {entry!r}), "
        f"but its file has no update of it: {len(absent)} such layers"
    )
    if not allow:
        raise LoraFxError(
            said, "is the file complete, and this its base? --allow-missing leaves them as they are"
        )
    notes.append(said)
