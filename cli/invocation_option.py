"""--invocation: the text or the token ids that invoke an aLoRA, and the examples that have them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_fx.cli.data_arguments import batches_of
from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.data import Buckets, Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.module.adapted import AdaptedModule

_IDS = re.compile(r"\d+(,\d+)*")


def invocation_of(text: str | None, cap: Captured) -> tuple[int, ...] | None:
    """Return the token ids of --invocation: numbers with commas, or a text of the tokenizer's.

    Raises:
        LoraFxError: A text, and a model without a tokenizer; a text without tokens.
    """
    from lora_fx.adapter.invocation import checked

    if text is None:
        return None
    if _IDS.fullmatch(text.replace(" ", "")):
        return checked([int(token) for token in text.split(",")], "--invocation")
    if cap.tokenizer_folder is None:
        raise LoraFxError(
            f"--invocation is the text {text!r}, and the model has no tokenizer",
            "pass token ids: --invocation 529,13,882",
        )
    from lora_fx.fx.load.folder_tokenizer import read_tokenizer

    ids = read_tokenizer(cap.tokenizer_folder).encode(text, add_special_tokens=False)
    tokens = checked(ids, f"--invocation {text!r} as tokens")
    note(f"invocation: tokens {','.join(map(str, tokens))}")
    return tokens


def check_examples(table: Table | Buckets, module: AdaptedModule) -> None:
    """Note how many examples have no invocation: the adapter learns nothing from these.

    Raises:
        LoraFxError: No example has it.
    """
    from lora_fx.adapter.invocation import NEVER, adapter_starts
    from lora_fx.fx.module.insertion import insertion_of

    name, invocation = insertion_of(module).invoked
    if not invocation:
        return
    count = 0
    without = 0
    for columns in batches_of(table):
        starts = adapter_starts(columns[name], invocation)
        count += len(starts)
        without += int((starts == NEVER).sum())
    tokens = ",".join(map(str, invocation))
    if without == count:
        raise LoraFxError(
            f"no example has the invocation tokens {tokens}, so the adapter would never act",
            "compare them with the tokens of an example: a tokenizer may join the first or last "
            "one with its neighbour in a text",
        )
    if without:
        note(
            f"{without} of {count} examples have no invocation tokens: nothing is learnt from them",
            warns=True,
        )
