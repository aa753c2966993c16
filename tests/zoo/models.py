"""The zoo: tiny models built from nothing (no network, no checkpoints).

The list was fixed before any of the models was tried, and models are only added to it.
"""

from __future__ import annotations

from . import hand_models, hf_audio, hf_decoders, hf_tasks, hf_text, hf_vision, vision
from .base import ZOO, Entry, redraw

__all__ = ["ZOO", "Entry", "redraw"]

_FAMILIES = (hf_text, hf_decoders, hf_tasks, hf_vision, hf_audio, vision, hand_models)
