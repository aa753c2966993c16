"""Insert branches into a small network, train them, and export the folded network to ONNX."""

import tempfile

import torch
from torch import nn

import lora_fx

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
x = torch.randn(256, 16)
labels = (x[:, :3] * torch.tensor([1.0, -1.0, 2.0])).argmax(1)

print(lora_fx.find(base, (x,)))
model = lora_fx.insert(base, (x,), rank=2).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
for step in range(101):
    loss = nn.functional.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    lora_fx.save_adapter(model.eval().adapter(), f"{folder}/adapter")
    print(lora_fx.export(model, f"{folder}/mlp.onnx"))
