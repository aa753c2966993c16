"""Adapt a diffusion transformer (Flux) whose weights are nf4 codes.

`python samples/diffusion_flux.py` needs `pip install 'lora-fx[domains]'`. The architecture is
Flux' own, from diffusers, at a small size and with random weights: no package has trained ones.
The task is made: the model learns the flow from noise to pictures of stripes. Codes take no
update, so mode merged is refused for the adapter; the branches run beside the codes.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from domains import Batch, adapt, prove, redraw, train
from torch import nn

SIDE, CHANNELS, WORDS, WIDTH = 8, 4, 6, 32
torch.manual_seed(0)
rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
IMAGE_IDS = torch.stack([0 * rows, rows, columns], -1).reshape(-1, 3).float()
prompts = torch.randn(2, WORDS, WIDTH)


def batch(size: int = 8) -> Batch:
    """Upright or lying stripes with a prompt for each kind, part of the way to noise."""
    kind = torch.arange(size) % 2
    pictures = torch.where(kind[:, None, None] == 0, rows, columns) % 2 * 2.0 - 1
    pictures = pictures.reshape(size, -1, 1).expand(-1, -1, CHANNELS)
    noise, time = torch.randn_like(pictures), torch.rand(size)
    mixed = (1 - time[:, None, None]) * pictures + time[:, None, None] * noise
    return {
        "hidden_states": mixed,
        "encoder_hidden_states": prompts[kind],
        "pooled_projections": prompts[kind].mean(1),
        "timestep": time,
        "img_ids": IMAGE_IDS,
        "txt_ids": torch.zeros(WORDS, 3),
        "flow": noise - pictures,
    }


base = redraw(
    FluxTransformer2DModel(
        patch_size=1, in_channels=CHANNELS, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    ).eval()
)  # fmt: skip
print("Flux, 3 blocks, random weights")

batches = [batch() for _ in range(4)]
inputs = {name: value for name, value in batches[0].items() if name != "flow"}
adapted = adapt(base, inputs, quantise="nf4")


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean square error of the flow."""
    flow = module(**{name: value for name, value in batch.items() if name != "flow"}).sample
    return (flow - batch["flow"]).square().mean()


train(adapted, batches, loss)
prove(base, adapted, inputs, quantise="nf4")
