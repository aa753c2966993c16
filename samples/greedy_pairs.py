"""Greedy decoding of any encoder-decoder that was exported with `cache=True`, with numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def greedy(
    encode: Run, step: Run, source: Mapping[str, np.ndarray], start: int, steps: int
) -> np.ndarray:
    """The encoder's inputs → [batch, 1 + steps] tokens, of which the first is `start`.

    `encode` and `step` are the `run` of the files' sessions; with an adapter, it is
    `partial(session.run, adapter=NAME)`.
    """
    states = encode(source)
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
        out = step({"input_ids": new, **past, **crossed})
        new = out["logits"][:, -1].argmax(-1)[:, None]
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        tokens = np.concatenate([tokens, new], 1)
    return tokens
