"""The loop of greedy decoding over a file exported with `cache=True`: numpy only, any decoder."""

from __future__ import annotations

import numpy as np

from lora_fx.onnx.session import RuntimeSession


def greedy(session: RuntimeSession, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """[batch, length] prompts → [batch, length + steps]; the mask is 0 on padding, on the left."""
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
