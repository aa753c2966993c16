"""Find, adapt and fold weights that are used by `x @ w` and einsum, without an nn.Linear."""

import torch
from torch import nn

import lora_fx


class Attention(nn.Module):
    """Attention with bare parameters: einsum for the heads, `@` for the output projection."""

    def __init__(self, width: int = 24, heads: int = 3, size: int = 10) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, width, heads, size) * width**-0.5)
        self.out = nn.Parameter(torch.randn(heads * size, width) * (heads * size) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bsd,dhe->bhse", x, w) for w in self.qkv.unbind(0))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).flatten(2) @ self.out


torch.manual_seed(0)
model = Attention().eval()
x = torch.randn(2, 7, 24)

found = lora_fx.find(model, (x,))
print(found)

adapted = lora_fx.insert(model, (x,), rank=4)
with torch.no_grad():
    assert torch.equal(adapted(x), model(x)), "B starts at zero"
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.1)
    folded = lora_fx.fold(adapted)
    gap = (folded(x) - adapted(x)).abs().max().item()
    moved = (adapted(x) - model(x)).abs().max().item()
    for key, delta in adapted.adapter().deltas().items():
        print(f"{key}: ΔW {list(delta.shape)}, rank 4")
print(f"the adapter changes the output by {moved:.3f}; folded and unfolded differ by {gap:.1e}")
