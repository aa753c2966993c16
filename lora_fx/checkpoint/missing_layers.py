"""Layers that an adapter's own config adapts and its file lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.renaming import Renaming
from lora_fx.formats.peft.config import missing
from lora_fx.targets.target import base_name

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


def absent_of(adapter: Adapter, rename: Renaming) -> dict[str, str]:
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
        names += [low.use, *low.origin.twins]
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    apart = any(_EXPERT.search(name) for name in adapted)
    weights = [n for n, t in rename.tensors.items() if n.endswith(".weight") and len(t.shape) > 1]
    weights = [n for n in weights if apart or not _EXPERT.search(n)]
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
