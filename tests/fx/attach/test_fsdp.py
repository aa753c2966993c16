"""FSDP2 around an attached model: sharded by block, the losses and the adapter of one process."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from tests.fx.attach.attached import adapter_gap
from tests.zoo.models import ZOO

STEPS = 5
NAMES = ["hf_gpt2", "hf_llama", "transformer_encoder"]


def blocks(model: nn.Module) -> list[nn.Module]:
    found = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(found)


def build(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name].build()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    return lora_fx.attach(model, args, kwargs, rank=2, include="*"), args, kwargs


def run(model: nn.Module, args: Any, kwargs: Any) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.01), []
    model.eval()
    for _ in range(STEPS):
        out = model(*args, **kwargs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        loss = (out - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def worker(rank: int, world: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for name in NAMES:
        model, args, kwargs = build(name)
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = run(model, args, kwargs)
        adapter = model.adapter()  # gathered: every process takes part
        if rank == 0:
            Path(folder, f"{name}.json").write_text(json.dumps(losses))
            lora_fx.save_adapter(adapter, f"{folder}/{name}")
        try:
            lora_fx.detach(model)
            raise AssertionError("sharded classes are not ours to take off")
        except lora_fx.LoraFxError as e:
            assert "another tool turned a " in str(e) and " after attach" in str(e)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_sharded_by_block(world: int, tmp_path: Path) -> None:
    import socket

    from torch.multiprocessing.spawn import start_processes

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start_processes(worker, (world, port, str(tmp_path)), nprocs=world, start_method="spawn")
    for name in NAMES:
        model, args, kwargs = build(name)
        want = run(model, args, kwargs)
        got = json.loads((tmp_path / f"{name}.json").read_text())
        assert max(abs(a - b) for a, b in zip(want, got, strict=True)) < 1e-5
        assert want[0] - want[-1] > 1e-5
        own = model.adapter()
        saved = lora_fx.load_adapter(tmp_path / name).bind(model.report().found)
        model.load_adapter(saved)
        assert adapter_gap(model.adapter(), own) < 1e-5
