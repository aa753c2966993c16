"""Greedy decoding of any encoder-decoder that was exported with `cache=True`, with numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_fx.onnx import Session


def greedy(
    encoder: Session,
    decoder: Session,
    source: Mapping[str, np.ndarray],
    start: int,
    steps: int,
    adapter: str | None = None,
) -> np.ndarray:
    """The encoder's inputs → [batch, 1 + steps] tokens, of which the first is `start`.

    Both sessions have the adapter under this name, each from the file that was written for it.
    """
    states = encoder.run(source, adapter)
    crossed = {
        name.replace("present", "past_key_values"): states[name]
        for name in states
        if name.startswith("present.")
    }
    past = {name.replace("encoder", "decoder"): x[:, :, :0] for name, x in crossed.items()}
    if "attention_mask" in source:
        crossed["encoder_attention_mask"] = source["attention_mask"]
    rows = len(states["last_hidden_state"])
    tokens = new = np.full((rows, 1), start)
    for _ in range(steps):
        out = decoder.run({"input_ids": new, **past, **crossed}, adapter)
        new = out["logits"][:, -1].argmax(-1)[:, None]
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        tokens = np.concatenate([tokens, new], 1)
    return tokens
