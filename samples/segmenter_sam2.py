"""Adapt a segmenter (SAM 2) to segment a disc at which a point is given.

`python samples/segmenter_sam2.py` needs `pip install 'lora-fx[domains]'`. The architecture is
SAM 2's own, from transformers, at a small size and with random weights: no package has trained
ones.
"""

from __future__ import annotations

import torch
from domains import Batch, adapt, prove, redraw, train
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

SIZE, MASK = 128, 32
torch.manual_seed(0)


def batch(size: int = 4) -> Batch:
    """Two discs of different colours in each image, a point in one of them, and its mask."""
    images = 0.1 * torch.randn(size, 3, SIZE, SIZE)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    points, masks = torch.empty(size, 1, 1, 2), torch.empty(size, MASK, MASK)
    for row in range(size):
        for half in (0, 1):
            x, y = int(torch.randint(24, 40, ())) + half * SIZE // 2, int(torch.randint(30, 98, ()))
            disc = (rows - y) ** 2 + (columns - x) ** 2 < 20**2
            images[row, half, disc] += 1
        points[row] = torch.tensor([x, y])
        masks[row] = disc[:: SIZE // MASK, :: SIZE // MASK]
    return {"pixel_values": images, "input_points": points, "masks": masks}


backbone = Sam2HieraDetConfig(
    hidden_size=16, image_size=[SIZE, SIZE], blocks_per_stage=[1, 1, 2, 1],
    embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
    window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[3],
    window_positional_embedding_background_size=[7, 7],
)  # fmt: skip
vision = Sam2VisionConfig(
    backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=32,
    backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
)  # fmt: skip
prompts = Sam2PromptEncoderConfig(hidden_size=32, image_size=SIZE, mask_input_channels=4)
decoder = Sam2MaskDecoderConfig(
    hidden_size=32,
    mlp_dim=64,
    num_attention_heads=4,
    iou_head_hidden_dim=32,
    dynamic_multimask_via_stability=False,
)
config = Sam2Config(
    vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
)
base = redraw(Sam2Model(config).eval())
print("SAM 2 with a Hiera of 5 blocks, random weights")

batches = [batch() for _ in range(4)]
inputs = {name: batches[0][name] for name in ("pixel_values", "input_points")}
inputs["multimask_output"] = False
adapted = adapt(base, inputs)


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of each pixel of the mask."""
    output = module(
        pixel_values=batch["pixel_values"], input_points=batch["input_points"],
        multimask_output=False,
    )  # fmt: skip
    return binary_cross_entropy_with_logits(output.pred_masks[:, 0, 0], batch["masks"])


train(adapted, batches, loss)
prove(base, adapted, inputs)
