"""lora, and what differs from it by its scale or by how it learns.

W' = W + s·b·a, Hu et al. 2021 (2106.09685); rslora: Kalajdzievski 2023 (2312.03732); lora-fa:
Zhang et al. 2023 (2308.03303); lora+: Hayou et al. 2024 (2402.12354).
"""

from __future__ import annotations

from lora_fx.adapter.variant_protocol import Variant


class Lora(Variant):
    """W + s·b·a, as PEFT's files have it."""

    peft_type = "LORA"

    @property
    def learns_as_lora(self) -> bool:
        """Files of LoRA have no word for what does not train, nor for rates."""
        return bool(self.still) or self.ratio != 1.0
