"""Greedy decoding of any decoder that was exported with `cache=True`, with numpy only."""

from __future__ import annotations

import numpy as np

from lora_fx.onnx.session import RuntimeSession


def greedy(session: RuntimeSession, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """[batch, length] prompts → [batch, length + steps]; padding is on the left, with mask 0."""
    past = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    tokens = new = ids
    for _ in range(steps):
        out = session.run({"input_ids": new, "attention_mask": mask, **past})
        new = out["logits"][:, -1].argmax(-1)[:, None]
        past = {n: out[n.replace("past_key_values", "present")] for n in past}
        tokens = np.concatenate([tokens, new], 1)
        mask = np.concatenate([mask, np.ones_like(new)], 1)
    return tokens
