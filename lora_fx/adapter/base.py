"""The older name of `lora_fx.adapter.variant_protocol`, for variants written outside."""

from __future__ import annotations

from lora_fx.adapter.variant_protocol import Beginning as Beginning
from lora_fx.adapter.variant_protocol import Read as Read
from lora_fx.adapter.variant_protocol import Variant as Variant
