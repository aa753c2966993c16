"""The probe of a merged checkpoint, in the header of the first shard that the merge wrote."""

from __future__ import annotations

from lora_fx.checkpoint.provenance import history
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.probe.carried import is_of
from lora_fx.probe.probe import PROPERTY, Probe


def probe_of_merge(checkpoint: Checkpoint) -> Probe:
    """Return the probe of a checkpoint that one merge of one adapter wrote.

    Raises:
        LoraFxError: There is none, or a damaged one, or another merge followed.
    """
    where = checkpoint.path
    texts = [
        header.metadata[PROPERTY]
        for header in checkpoint.shards.values()
        if PROPERTY in header.metadata
    ]
    if not texts:
        raise LoraFxError(
            f"{where}: it has no probe",
            "merge an adapter that has one, as lora-fx train writes it; or compare the folder: "
            f"lora-fx verify {where} BASE --adapter ADAPTER",
        )
    probe = Probe.from_text(texts[0], str(where))
    merges = history(checkpoint)
    adapters = merges[0]["adapters"] if len(merges) == 1 else []
    is_whole = len(adapters) == 1 and adapters[0].get("weight") == 1
    if not is_whole or not is_of(probe, str(adapters[0].get("hash"))):
        raise LoraFxError(
            f"{where}: its probe is not of the merge that it records",
            f"compare the folder: lora-fx verify {where} BASE --adapter ADAPTER",
        )
    return probe
