"""Train the module that insert returns with Hugging Face's accelerate: bf16, states, processes.

Run `python samples/accelerate_loop.py`, or start it with torchrun or accelerate launch for several
processes. It needs `pip install lora-fx accelerate`. A small network learns which of three numbers
is largest. A saved state holds the adapter and no weight of the base; a second run resumes from it.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

import lora_fx

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
x = torch.randn(256, 16)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
start = lora_fx.insert(base.eval(), (x[:4],), rank=4)
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)


def save(models: list[Any], weights: list[Any], folder: str) -> None:
    for model in models:
        adapter = accelerator.unwrap_model(model).adapter()
        if accelerator.is_main_process:
            lora_fx.save_adapter(adapter, Path(folder, "adapter"), force=True)
        weights.pop()  # so that accelerate writes no weights of this model


def load(models: list[Any], folder: str) -> None:
    while models:
        model = accelerator.unwrap_model(models.pop())
        model.load_adapter(lora_fx.load_adapter(Path(folder, "adapter")))


accelerator.register_save_state_pre_hook(save)
accelerator.register_load_state_pre_hook(load)


def train(state: Path, epochs: range, resume: bool = False) -> tuple[lora_fx.Adapter, float]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    if resume:
        accelerator.load_state(str(state))
    for epoch in epochs:
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 2 and not resume:
            accelerator.save_state(str(state))
    adapter = accelerator.unwrap_model(model).adapter()
    accelerator.free_memory()
    return adapter, float(loss.detach())


mine = tempfile.mkdtemp() if accelerator.is_main_process else ""
state = Path(broadcast_object_list([mine])[0])  # one folder for all processes
whole, loss = train(state, range(6))
resumed, _ = train(state, range(3, 6), resume=True)
files = sorted(p.name for p in state.iterdir())
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    shutil.rmtree(state)
same = all((resumed.lowrank[key].b == update.b).all() for key, update in whole.lowrank.items())
accelerator.print(f"loss {loss:.3f}; the state: {', '.join(files)}")
accelerator.print(f"the resumed run gives the same adapter: {same}")
