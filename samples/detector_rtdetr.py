"""Adapt a detector (RT-DETR) to find a bright square in an image.

`python samples/detector_rtdetr.py` needs `pip install 'lora-fx[domains]'`. The architecture is
RT-DETR's own, from transformers, at a small size and with random weights: no package has trained
ones. Most of its work is convolutions, which the default plan therefore adapts too.
"""

from __future__ import annotations

import torch
from domains import Batch, adapt, prove, redraw, train
from torch import nn
from transformers import RTDetrConfig, RTDetrForObjectDetection
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

SIZE = 64
torch.manual_seed(0)


def batch(size: int = 8) -> Batch:
    """Noise with one square in each image, and the square's centre and sides in 0 … 1."""
    images = 0.1 * torch.randn(size, 3, SIZE, SIZE)
    boxes = torch.empty(size, 4)
    for row in range(size):
        side = int(torch.randint(12, 32, ()))
        left, top = (int(torch.randint(0, SIZE - side, ())) for _ in "xy")
        images[row, :, top : top + side, left : left + side] += 1
        boxes[row] = torch.tensor([left + side / 2, top + side / 2, side, side]) / SIZE
    return {"pixel_values": images, "boxes": boxes}


config = RTDetrConfig(
    backbone_config=RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_indices=[2, 3, 4],
    ),
    encoder_hidden_dim=32, encoder_in_channels=[32, 48, 64], encoder_ffn_dim=64,
    encoder_attention_heads=4, d_model=32, num_queries=10, decoder_in_channels=[32, 32, 32],
    decoder_ffn_dim=64, decoder_layers=2, decoder_attention_heads=4, num_labels=2,
    auxiliary_loss=False,
)  # fmt: skip
base = redraw(RTDetrForObjectDetection(config).eval())
print("RT-DETR with a ResNet of 4 blocks, random weights")

batches = [batch() for _ in range(4)]
for norm in base.modules():
    if isinstance(norm, nn.BatchNorm2d):
        norm.momentum = 1.0  # one run in train mode gives a random network its statistics
with torch.no_grad():
    base.train()(pixel_values=batches[0]["pixel_values"])
base.eval()
inputs = {"pixel_values": batches[0]["pixel_values"]}
adapted = adapt(base, inputs)


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """RT-DETR's own loss: each square is matched with the query that fits it best."""
    output = module(pixel_values=batch["pixel_values"])
    squares = [{"class_labels": torch.ones(1).long(), "boxes": box[None]} for box in batch["boxes"]]
    return base.loss_function(output.logits, squares, "cpu", output.pred_boxes, config)[0]


train(adapted, batches, loss)
prove(base, adapted, inputs)
