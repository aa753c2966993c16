"""Train the module that insert returns with Lightning Fabric: bf16, checkpoints of the adapter.

Run `python samples/fabric_loop.py`, or start it with torchrun for several processes. It needs
`pip install lora-fx lightning-fabric`. A small network learns which of three numbers is largest. A
checkpoint holds the trained tensors and no weight of the base; a second run resumes from it.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import lora_fx

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
x = torch.randn(256, 16)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
start = lora_fx.insert(base.eval(), (x[:4],), rank=4)
processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
fabric = Fabric(accelerator="cpu", devices=processes, precision="bf16-mixed")
fabric.launch()


def train(file: Path, epochs: range, resume: bool = False) -> tuple[lora_fx.Adapter, float]:
    model = copy.deepcopy(start)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    wrapped, wrapped_optimizer = fabric.setup(model.train(), optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=32))
    state: dict[str, Any] = {"model": wrapped, "optimizer": wrapped_optimizer}
    if resume:
        fabric.load(file, state, strict=False)  # the file has no frozen tensors
    for epoch in epochs:
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(wrapped(inputs), labels)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=1.0)
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
        if epoch == 2 and not resume:
            fabric.save(file, state, filter={"model": lambda name, _: name in trained})
    return model.adapter(), float(loss.detach())


mine = tempfile.mkdtemp() if fabric.is_global_zero else ""
folder = Path(fabric.broadcast(mine))  # one folder for all processes
whole, loss = train(folder / "state.ckpt", range(6))
resumed, _ = train(folder / "state.ckpt", range(3, 6), resume=True)
names = list(torch.load(folder / "state.ckpt", weights_only=True)["model"])
fabric.barrier()
if fabric.is_global_zero:
    shutil.rmtree(folder)
same = all((resumed.lowrank[key].b == update.b).all() for key, update in whole.lowrank.items())
if fabric.is_global_zero:
    print(f"loss {loss:.3f}; the checkpoint: {', '.join(names)}")
    print(f"the resumed run gives the same adapter: {same}")
