"""Train in several processes: DDP, or FSDP2 for each block with torch.distributed.checkpoint.

Run `torchrun --nproc_per_node=2 samples/torchrun_loop.py fsdp`, or with ddp; plain python runs one
process. A small network of blocks learns which of three numbers is largest. Every process captures
the model, and the adapter is gathered at the end. The FSDP2 run also resumes from a checkpoint. It
holds the trained tensors in shards, and any number of processes can read it.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_fx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
else:
    alone = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=alone, rank=0, world_size=1)
me, processes = dist.get_rank(), dist.get_world_size()
way = sys.argv[1] if len(sys.argv) > 1 else "fsdp"
torch.manual_seed(0)  # the same base, adapter and data in every process
x = torch.randn(256, 16)
labels = x[:, :3].argmax(1)
start = lora_fx.insert(Net().eval(), (x[:4],), rank=4)
ONLY = states.StateDictOptions(ignore_frozen_params=True, strict=False)


def trained(model: Any, optimizer: Any) -> dict[str, Any]:
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    held = states.get_model_state_dict(model)
    return {
        "model": {name: tensor for name, tensor in held.items() if name in names},
        "optimizer": states.get_optimizer_state_dict(model, optimizer, options=ONLY),
    }


def train(steps: range, folder: str = "", resume: bool = False) -> tuple[lora_fx.Adapter, float]:
    model = copy.deepcopy(start).train()
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (processes,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    call: Any = DistributedDataParallel(model) if way == "ddp" else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    if resume:
        state = trained(model, optimizer)
        load(state, checkpoint_id=folder)
        states.set_model_state_dict(model, state["model"], options=ONLY)
        states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY)
    for step in steps:
        rows = slice(step % 4 * 64 + me, (step % 4 + 1) * 64, processes)
        loss = nn.functional.cross_entropy(call(x[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 9 and folder and not resume:
            save(trained(model, optimizer), checkpoint_id=folder)
    mean = loss.detach() / processes
    dist.all_reduce(mean)
    return model.adapter(), float(mean)  # it gathers shards, so every process calls it


names = [tempfile.mkdtemp() if me == 0 else ""]
dist.broadcast_object_list(names)  # one folder for all processes
whole, loss = train(range(20), names[0] if way == "fsdp" else "")
if me == 0:
    print(f"{way} trained in {processes} processes: loss {loss:.3f}")
if way == "fsdp":
    again, _ = train(range(10, 20), names[0], resume=True)
    same = all((again.lowrank[key].b == update.b).all() for key, update in whole.lowrank.items())
    if me == 0:
        print(f"the resumed run gives the same adapter: {same}")
dist.barrier()
if me == 0:
    shutil.rmtree(names[0])
dist.destroy_process_group()
