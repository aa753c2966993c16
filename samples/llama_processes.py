"""Train an adapter of a Llama in several processes: by DDP, FSDP2 or accelerate.

Run `torchrun --nproc-per-node 2 samples/llama_processes.py fsdp`, or with ddp; with accelerate it
is `accelerate launch --multi_gpu --num_processes 2 samples/llama_processes.py accelerate`. Plain
python runs one process. It needs `pip install lora-fx transformers accelerate peft`. The weights
are random: a small shape, or with --billion that of a Llama of a billion parameters, with --layers
of its layers. --attach adapts the model in place; insert makes a module of its own.

Every process builds the model and takes its rows of each batch. Under FSDP2 it keeps its part of
each weight. The state of the run is saved in shards and whole, and both are read back. The adapter
is saved whole, for PEFT.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
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
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

STEPS, SAVED_AFTER, ROWS = 6, 3, 4
SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 5000}
BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256}

parser = argparse.ArgumentParser()
parser.add_argument("way", choices=["ddp", "fsdp", "accelerate"])
parser.add_argument("--attach", action="store_true")
parser.add_argument("--billion", action="store_true")
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--tokens", type=int, default=16)
parser.add_argument("--out", type=Path, help="keep the adapter and the states in this folder")
options = parser.parse_args()

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
else:
    alone = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=alone, rank=0, world_size=1)
me, processes = dist.get_rank(), dist.get_world_size()


def llama() -> LlamaForCausalLM:
    """Build the same base in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **(BILLION if options.billion else SMALL),
        num_hidden_layers=options.layers,
        num_attention_heads=32 if options.billion else 8,
        num_key_value_heads=8 if options.billion else 2,
        tie_word_embeddings=True,
        dtype="bfloat16" if options.billion else "float32",
    )
    return LlamaForCausalLM._from_config(config).eval()


def adapted() -> Any:
    """Adapt the base; under FSDP2 keep this process's part of each tensor, and no other."""
    base = llama()
    example = {"input_ids": batch()[:2], "labels": batch()[:2], "use_cache": False}
    adapt = lora_fx.attach if options.attach else lora_fx.insert
    model: Any = adapt(base, (), example, rank=8, exclude="lm_head")
    if options.way == "fsdp":
        mesh = init_device_mesh("cpu", (processes,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if model is not base:
            base.to("meta")  # insert leaves the base as it was, with its whole weights
    return model.train()


def batch() -> torch.Tensor:
    """Return the rows of every step, for all processes together."""
    draw = torch.Generator().manual_seed(1)
    highest = BILLION["vocab_size"] if options.billion else SMALL["vocab_size"]
    return torch.randint(0, highest, (ROWS, options.tokens), generator=draw)


def frozen_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of frozen weights in this process, and in all as if there were one."""
    here, whole = 0, 0
    for weight in model.parameters():
        if not weight.requires_grad:
            part = weight.to_local() if hasattr(weight, "to_local") else weight
            here += part.nbytes
            whole += weight.numel() * weight.itemsize
    return here, whole


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=0.01)


def train(model: Any, optimizer: Any, steps: range, accelerator: Any = None) -> list[float]:
    """Return the loss of each step over the rows of all processes."""
    call = DistributedDataParallel(model) if options.way == "ddp" else model
    if accelerator:
        call, optimizer = accelerator.prepare(model, optimizer)
    rows, losses = batch()[me::processes], []
    for _ in steps:
        loss = call(input_ids=rows, labels=rows, use_cache=False).loss
        if accelerator:
            accelerator.backward(loss)
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float() / processes
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def state_of(model: Any, optimizer: Any, *, whole: bool = False) -> dict[str, Any]:
    """Return the trained tensors and the optimizer's; whole ones only in the first process."""
    kept = states.StateDictOptions(
        ignore_frozen_params=True, full_state_dict=whole, cpu_offload=whole
    )
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    held = states.get_model_state_dict(model, options=kept)
    return {
        "model": {name: tensor for name, tensor in held.items() if name in names},
        "optimizer": states.get_optimizer_state_dict(model, optimizer, options=kept),
    }


def put(state: dict[str, Any], model: Any, optimizer: Any, *, whole: bool = False) -> None:
    """Put a state into a model and its optimizer; every process may read a whole one."""
    kept = states.StateDictOptions(ignore_frozen_params=True, strict=False, full_state_dict=whole)
    states.set_model_state_dict(model, state["model"], options=kept)
    states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=kept)


def resumed(model: Any, folder: Path, *, whole: bool, accelerator: Any = None) -> list[float]:
    """Return the losses after a saved state has been read."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.zero_()  # so that every value comes from the file
    optimizer = optimizer_of(model)
    if whole:
        state = torch.load(folder / "state.pt", weights_only=True)
    else:
        state = state_of(model, optimizer)
        load(state, checkpoint_id=folder / "state")
    put(state, model, optimizer, whole=whole)
    return train(model, optimizer, range(SAVED_AFTER, STEPS), accelerator)


def peft_logits(folder: Path) -> torch.Tensor:
    """Return the logits of PEFT's model with the saved adapter."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(llama(), str(folder / "adapter"))
    logits: torch.Tensor = model.eval()(input_ids=batch(), use_cache=False).logits
    return logits


def main(folder: Path) -> None:
    accelerator = None
    if options.way == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    model = adapted()
    here, whole = frozen_bytes(model)
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, range(SAVED_AFTER), accelerator)
    save(state_of(model, optimizer), checkpoint_id=folder / "state")
    state = state_of(model, optimizer, whole=True)
    if me == 0:
        torch.save(state, folder / "state.pt")
    dist.barrier()
    losses += train(model, optimizer, range(SAVED_AFTER, STEPS), accelerator)
    adapter = model.adapter()  # it gathers shards, so every process calls it
    if me == 0:
        lora_fx.save_adapter(adapter, folder / "adapter")
        print(f"{options.way} in {processes} processes: losses", *(f"{x:.6f}" for x in losses))
        print(f"frozen bytes of a process: {here:,} of {whole:,}")
    logits = model.eval()(input_ids=batch(), use_cache=False).logits.detach()
    if me == 0:
        gap = float((logits - peft_logits(folder)).abs().max())
        size = float(logits.abs().max())
        print(f"logits of PEFT with the adapter: within {gap:.1e} of {size:.2f}")
    model.train()
    for is_whole in (False, True):
        again = resumed(model, folder, whole=is_whole, accelerator=accelerator)
        if me == 0:
            kind = "whole" if is_whole else "sharded"
            same = again == losses[SAVED_AFTER:]
            print(f"resumed from the {kind} state: the same losses: {same}")


with tempfile.TemporaryDirectory() as own:
    shared = [str(options.out or own)]
    dist.broadcast_object_list(shared)  # one folder for all processes
    main(Path(shared[0]))
    dist.barrier()
dist.destroy_process_group()
