"""Names of a Stable Diffusion UNet: diffusers' names → the original names (sgm, ldm).

kohya trains SDXL on the original names, so its files hold `lora_unet_input_blocks_4_1_…` for what
diffusers calls `down_blocks.1.attentions.0.…`. Both UNets (1.x, 2.x, XL) have two layers a block:

    down block B, layer L → input_blocks.(1+3B+L)     its downsampler → input_blocks.(3+3B).0.op
    up block B, layer L   → output_blocks.(3B+L)      its upsampler   → output_blocks.(3B+2).{1,2}
    resnets → .0          attentions → .1             mid block → middle_block.0, .1, .2

Facts: diffusers, scripts/convert_original_stable_diffusion_to_diffusers.py; sd-scripts,
library/sdxl_model_util.py.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(\..+)?")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.([01])(\..+)?")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_names(module: str) -> tuple[str, ...]:
    """Return the original names that a module of diffusers' UNet may have; empty for others.

    >>> sgm_names("down_blocks.1.attentions.0.proj_in"), sgm_names("mid_block.resnets.1.conv1")
    (('input_blocks.4.1.proj_in',), ('middle_block.2.in_layers.2',))
    >>> sgm_names("up_blocks.0.upsamplers.0.conv")
    ('output_blocks.2.1.conv', 'output_blocks.2.2.conv')
    """
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    sampler = _SAMPLER.fullmatch(module)
    if sampler:
        direction, block = sampler.groups()
        return _names_of_sampler(direction, int(block))
    in_middle = _MID.fullmatch(module)
    if in_middle:
        kind, number, inner = in_middle.groups()
        index = 1 if kind == "attentions" else 2 * int(number)
        return (f"middle_block.{index}{_inner_name(kind, inner)}",)
    layer = _LAYER.fullmatch(module)
    if layer:
        direction, block, kind, number, inner = layer.groups()
        index = 3 * int(block) + int(number)
        side = f"input_blocks.{1 + index}" if direction == "down" else f"output_blocks.{index}"
        within_block = 1 if kind == "attentions" else 0
        return (f"{side}.{within_block}{_inner_name(kind, inner)}",)
    return ()


def _names_of_sampler(direction: str, block: int) -> tuple[str, ...]:
    """Return the names of a block's sampler; an upsampler may follow an attention or not."""
    if direction == "down":
        return (f"input_blocks.{3 + 3 * block}.0.op",)
    output = f"output_blocks.{2 + 3 * block}"
    return (f"{output}.1.conv", f"{output}.2.conv")


def _inner_name(kind: str, inner: str | None) -> str:
    """Return the end of a name inside a resnet or attention, with its dot; empty for the whole."""
    name = (inner or "").removeprefix(".")
    if kind == "resnets":
        name = _RESNET.get(name, name)
    return f".{name}" if name else ""
