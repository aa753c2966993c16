"""lora, and the variants that differ from it only in scale or training (rslora, lora-fa, lora+).

W' = W + s·b·a, Hu et al. 2021 (2106.09685); rslora: Kalajdzievski 2023 (2312.03732); lora-fa:
Zhang et al. 2023 (2308.03303); lora+: Hayou et al. 2024 (2402.12354).
"""

from __future__ import annotations

from lora_fx.adapter.variant_protocol import Variant


class Lora(Variant):
    """The variant lora: W' = W + s·b·a, stored in files of PEFT's type LORA."""

    peft_type = "LORA"

    @property
    def learns_as_lora(self) -> bool:
        """True for frozen tensors or other learning rates, which LoRA files cannot store."""
        return bool(self.still) or self.ratio != 1.0
