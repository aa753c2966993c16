"""An adapter's names and a checkpoint's: the prefix between them, and layers that are missing."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter import Adapter
from lora_fx.checkpoint.strict import TensorInfo
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft_targets import missing
from lora_fx.target import base_name


class Renaming:
    """A prefix that the adapter's names have more, or less, than the checkpoint's.

    Called with a name of the adapter it gives that of the checkpoint.
    """

    def __init__(self, more: str = "", less: str = "") -> None:
        self.more, self.less = more, less

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor."""
        return self.less + name.removeprefix(self.more)

    def back(self, name: str) -> str:
        """The adapter's name of a tensor of the checkpoint."""
        return self.more + name.removeprefix(self.less)


def renaming(adapter: Adapter, tensors: Mapping[str, TensorInfo], notes: list[str]) -> Renaming:
    """The prefix under which the most names are known; none where names are known as they are.

    A model saved by its inner class lacks the outer's prefix (`bert.`), a component of a pipeline
    its own (`unet.`), and the reverse.
    """
    names = [base_name(k) for k in adapter.entries]
    if any(n in tensors for n in names):
        return Renaming()
    tails = {f".{n}" for n in names}
    leads = {n[: i + 1] for n in names for i, c in enumerate(n) if c == "."}
    tries = [Renaming(more=lead) for lead in sorted(leads)]
    # The ends of a stored name that begin after a dot are the names that may lack a prefix.
    ends = {t[: i + 1] for t in tensors for i, c in enumerate(t) if c == "." and t[i:] in tails}
    tries += [Renaming(less=lead) for lead in sorted(ends)]
    known = {t: sum(n.startswith(t.more) and t(n) in tensors for n in names) for t in tries}
    most = max(known.values(), default=0)
    best = [t for t in tries if known[t] == most]
    if not most or len(best) != 1:
        return Renaming()
    what = f"without {best[0].more!r}" if best[0].more else f"with {best[0].less!r} before them"
    notes.append(f"the adapter's names are the base's {what}")
    return best[0]


def absent_of(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], rename: Renaming
) -> dict[str, str]:
    """{module of the base that PEFT would have adapted and the adapter lacks: by which entry}."""
    config = adapter.metadata.get("peft")
    if not isinstance(config, Mapping):
        return {}
    modules = {
        rename.back(name).removesuffix(".weight"): name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1
    }
    names = list(adapter.entries)
    for low in adapter.lowrank.values():  # other names of the same tensor
        also = low.extra.get("tied")
        names += [low.use, *(also if isinstance(also, list) else ())]
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    return {modules[m]: entry for m, entry in missing(config, modules, adapted).items()}


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
