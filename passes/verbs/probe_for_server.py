"""The probe of an adapter: what its base does with it, and the question for a server."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.load.folder_tokenizer import read_tokenizer
from lora_fx.fx.train.language_data import is_causal
from lora_fx.passes.proofs.language_making import Speaker, make_language
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.proofs.varied_runs import VariedRuns
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.open import captured_of, user_module
from lora_fx.passes.verbs.options import CaptureOptions
from lora_fx.passes.verbs.probe_adapter import narrow_run, probe_adapter, with_branches
from lora_fx.probe.language import LanguageProbe
from lora_fx.probe.probe import FULL, MOST_BYTES, Probe


def probe_for_server(
    model: object, adapter: Adapter, *, kind: str = FULL, trust: bool = False
) -> tuple[Probe, list[str]]:
    """Make the probe of an adapter, with a question for a server of a causal language model.

    Args:
        model: The base: whatever `lora_fx.capture` takes.
        adapter: As its file has it.
        kind: full; or short, without groups.
        trust: Read pickled tensors of the base.

    Returns:
        The probe, and notes on what it does not show.

    Raises:
        LoraFxError: The adapter does not fit, or no probe of it can be made.
    """
    cap = captured_of(model, CaptureOptions(adapter=adapter, trust=trust))
    found = find(cap)
    bound = adapter.bind(found)
    probe, notes = probe_adapter(cap, bound, adapter_hash(adapter), kind)
    if probe is None:
        raise LoraFxError("; ".join(notes), "report this model")
    folder = cap.tokenizer_folder
    if folder is None or not is_causal(user_module(cap)):
        return probe, [*notes, *cap.notes, _why_no_language(cap, folder)]
    language = make_language(_speaker(cap, folder), bound, found)
    if kind != FULL:
        language = replace(language, groups={})
    return _with_language(probe, language, notes)


def _speaker(cap: Captured, folder: Path) -> Speaker:
    """Return the model and its tokenizer."""
    reference = TorchReference(cap, partial(with_branches, cap))
    runs = VariedRuns(reference.base, reference.branched)
    narrow = partial(narrow_run, cap, runs)
    return Speaker(runs.run, narrow, read_tokenizer(folder), list(cap.named))


def _why_no_language(cap: Captured, folder: Path | None) -> str:
    if not is_causal(user_module(cap)):
        return "the probe has no question for a server: the base is no causal language model"
    return "the probe has no question for a server: the folder of the base has no tokenizer"


def _with_language(
    probe: Probe, language: LanguageProbe, notes: list[str]
) -> tuple[Probe, list[str]]:
    """Put the question into a probe; without its groups where both are too long."""
    whole = replace(probe, language=language.to_json())
    if whole.size <= MOST_BYTES:
        return whole, notes
    short = replace(probe, language=replace(language, groups={}).to_json())
    if short.size > MOST_BYTES:
        raise LoraFxError(
            f"the probe would have {short.size} bytes; at most {MOST_BYTES} are allowed",
            "make a short probe: --probe short",
        )
    return short, [*notes, f"the question has no groups: {MOST_BYTES} bytes hold no more"]
