"""The old import path of `lora_fx.adapter.variant_protocol`, kept for other packages' variants."""

from __future__ import annotations

from lora_fx.adapter.variant_protocol import Beginning as Beginning
from lora_fx.adapter.variant_protocol import Read as Read
from lora_fx.adapter.variant_protocol import Variant as Variant
