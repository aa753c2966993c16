"""One process of the tests of DDP, FSDP2 and torch.distributed.checkpoint.

`python -m tests.fx.train.loops_worker NAME FOLDER`, in two processes that know of each other as
torchrun tells them, trains the model NAME in every way of WAYS, and process 0 writes {way: losses}
to losses.json, and the adapters beside it.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx.fx.module.execution import execution_of
from tests.fx.attach.attached import adapter_gap
from tests.fx.train.loops import loss_of_chunks, still
from tests.zoo.models import ZOO

STEPS, ROWS, WORLD = 4, 4, 2
ONLY = states.StateDictOptions(ignore_frozen_params=True, strict=False)


class Tied(nn.Module):
    """Two blocks between an embedding and the head that it is; the loss comes with labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 17), nn.GELU(), nn.Linear(17, 12))
            for _ in range(2)
        )
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(self.out(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def made(name: str, dtype: torch.dtype = torch.float32, rank: int = 3) -> Any:
    """An adapted model, captured without labels: the training program comes with the first step."""
    if name == "tied":
        model, kwargs = Tied().eval(), {"input_ids": torch.arange(10).reshape(2, 5)}
    else:
        model, _, kwargs = ZOO[name].build()
    chosen: Any = {"rank": rank, "exclude": "head" if name == "tied" else "lm_head"}
    if name == "tied" and dtype == torch.float32:  # FSDP2 wants one dtype of all that is trained
        chosen["also_train"] = "out.bias"
    return lora_fx.insert(still(model).to(dtype), (), kwargs, **chosen)


def batch(step: int, rank: int | None = None) -> dict[str, torch.Tensor]:
    """The global batch of a step, or this process' rows of it."""
    g = torch.Generator().manual_seed(step % 2)
    ids = torch.randint(3, 20, (ROWS, 5), generator=g)
    part = ids if rank is None else ids[rank :: dist.get_world_size()]
    return {"input_ids": part, "labels": part}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(
    model: Any, steps: range, rank: int | None = None, optimizer: Any = None, inner: Any = None
) -> list[float]:
    """Mean losses over all processes. Process 0 alone evaluates `inner` before step 2."""
    optimizer, losses = optimizer or optimizer_of(model), []
    model.train()
    for step in steps:
        if step == 2 and rank == 0 and inner is not None:
            with torch.no_grad():
                inner.eval()(batch(step)["input_ids"])
            inner.train()
        loss = model(**batch(step, rank))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is trained, and the optimizer; ignore_frozen_params alone leaves tied tensors in."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    held = states.get_model_state_dict(model)
    return {
        "model": {n: t for n, t in held.items() if n in trained},
        "optimizer": states.get_optimizer_state_dict(model, optimizer, options=ONLY),
    }


def take(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    states.set_model_state_dict(model, state["model"], options=ONLY)
    states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY)


def parts_with_tensors(model: nn.Module) -> list[list[nn.Module]]:
    """Return every module that holds tensors itself, inner ones first; tied ones are together."""
    together: list[list[nn.Module]] = []
    for module in reversed(list(model.modules())):
        own = set(module.parameters(recurse=False))
        if not own or module is model:
            continue
        for others in together:
            if own & {p for other in others for p in other.parameters(recurse=False)}:
                others.append(module)
                break
        else:
            together.append([module])
    return together


def check_frozen_bytes(sharded: nn.Module, whole: nn.Module) -> None:
    """Check that processes have each frozen byte once, and that this one holds about its share."""
    frozen: list[Any] = [p for p in sharded.parameters() if not p.requires_grad]
    parts = [p.to_local() for p in frozen]
    everywhere = torch.tensor(sum(part.nbytes for part in parts))
    dist.all_reduce(everywhere)
    of_one = sum(p.nbytes for p in whole.parameters() if not p.requires_grad)
    assert int(everywhere) == of_one
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
    held = sum(storage.nbytes() for storage in storages.values())
    assert 0.45 * of_one < held < 0.55 * of_one, f"{held} of {of_one} bytes"


class Run:
    """The ways, one method each; `start` is copied, so that it is inserted once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.rank = name, folder, dist.get_rank()
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.start = made(name)

    def shard(self, model: Any, **options: Any) -> Any:
        for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(block, mesh=self.mesh, **options)
        return fully_shard(model, mesh=self.mesh, **options)

    def keep(self, way: str, model: Any) -> None:
        adapter = model.adapter()  # gathered: every process takes part
        if self.rank == 0:
            lora_fx.save_adapter(adapter, self.folder / way)

    def ddp(self) -> list[float]:
        model = copy.deepcopy(self.start)
        losses = train(DistributedDataParallel(model), range(STEPS), self.rank, inner=model)
        self.keep("ddp", model)
        return losses

    def ddp_again(self) -> list[float]:
        model = copy.deepcopy(self.start)
        model.activation_checkpointing_enable()
        losses = train(DistributedDataParallel(model), range(STEPS), self.rank)
        self.keep("ddp_again", model)
        return losses

    def ddp_codes(self) -> list[float]:
        from tests.fx.train import quantised_worker  # which imports this module

        model = DistributedDataParallel(quantised_worker.made(self.name))
        return train(model, range(STEPS), self.rank)

    def fsdp(self) -> list[float]:
        model = self.shard(copy.deepcopy(self.start))
        execution_of(model).captured.model.to("meta")  # the whole weights are not needed any more
        check_frozen_bytes(model, self.start)
        losses = train(model, range(STEPS), self.rank)
        check_frozen_bytes(model, self.start)
        self.keep("fsdp", model)
        mine = model.adapter()
        for adapter in (self.start.adapter(), mine):
            model.load_adapter(adapter)
            assert adapter_gap(model.adapter(), adapter) == 0.0
        assert adapter_gap(mine, self.start.adapter()) > 1e-3
        try:
            model.load_adapter(made(self.name, rank=2).adapter())
            raise AssertionError("FSDP2 holds the tensors")
        except lora_fx.LoraFxError as e:
            assert "a sharded model keeps the targets and ranks" in str(e)
        return losses

    def ddp_chunks(self) -> list[float]:
        model = copy.deepcopy(self.start)
        with loss_of_chunks(), execution_of(model).loss_alone():
            losses = train(DistributedDataParallel(model), range(STEPS), self.rank)
        self.keep("ddp_chunks", model)
        return losses

    def fsdp_parts(self) -> list[float]:
        """Shard each norm, product and table on its own, which no program calls; and recompute."""
        model = copy.deepcopy(self.start)
        model.activation_checkpointing_enable()
        for parts in parts_with_tensors(model):
            fully_shard(parts, mesh=self.mesh)
        self.shard(model)
        with loss_of_chunks(), execution_of(model).loss_alone():
            losses = train(model, range(STEPS), self.rank)
        self.keep("fsdp_parts", model)
        return losses

    def accelerate(self) -> list[float]:
        """Let accelerate shard: all values come from the first process, and ties are made again.

        An Accelerator calls its function on GPUs alone.
        """
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = copy.deepcopy(self.start)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(blocks[0]).__name__],
            cpu_ram_efficient_loading=True,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=self.rank == 0,
            device=torch.device("cpu"),
        )
        model = fsdp2_prepare_model(accelerator, model)
        if self.name != "tied":  # a model of transformers, whose names accelerate ties again
            assert len(list(model.parameters())) == len(list(self.start.parameters()))
        losses = train(model, range(STEPS), self.rank)
        self.keep("accelerate", model)
        return losses

    def fsdp_again(self) -> list[float]:
        model = copy.deepcopy(self.start)
        model.activation_checkpointing_enable()
        losses = train(self.shard(model), range(STEPS), self.rank)
        self.keep("fsdp_again", model)
        return losses

    def fsdp_bf16(self) -> list[float]:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = self.shard(made(self.name, torch.bfloat16), mp_policy=policy)
        losses = train(model, range(STEPS), self.rank)
        model.eval()(batch(0)["input_ids"])  # leaves the root's tensors gathered, in bf16
        self.keep("fsdp_bf16", model)
        if self.name == "tied":
            b = model.adapter().lowrank["out.weight"].b
            full = states.StateDictOptions(ignore_frozen_params=True, full_state_dict=True)
            held = states.get_model_state_dict(model, options=full)["out.lora_B.weight"]
            assert np.array_equal(b, held.numpy()), "the fp32 masters, not what was gathered"
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        return losses

    def dcp(self) -> list[float]:
        """Adapters and optimizer are saved after two steps, and a new model goes on."""
        model = self.shard(copy.deepcopy(self.start))
        optimizer = optimizer_of(model)
        losses = train(model, range(2), self.rank, optimizer)
        save(state_of(model, optimizer), checkpoint_id=self.folder / "state")
        model = self.shard(copy.deepcopy(self.start))
        optimizer = optimizer_of(model)
        state = state_of(model, optimizer)
        load(state, checkpoint_id=self.folder / "state")
        take(state, model, optimizer)
        losses += train(model, range(2, STEPS), self.rank, optimizer)
        self.keep("dcp", model)
        return losses

    def fsdp1(self) -> list[float]:
        """The older FSDP keeps parts that nobody can see; adapter() says so, by name."""
        model = copy.deepcopy(self.start)
        outer = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        losses = train(outer, range(STEPS), self.rank)
        try:
            model.adapter()
            raise AssertionError("this process has a part only")
        except lora_fx.LoraFxError as e:
            assert "another tool keeps the rest" in str(e) and "lora_" in str(e)
        with FullyShardedDataParallel.summon_full_params(outer):
            self.keep("fsdp1", model)
        return losses


WAYS = (
    "ddp",
    "ddp_again",
    "ddp_chunks",
    "ddp_codes",
    "fsdp",
    "fsdp_again",
    "fsdp_parts",
    *(["accelerate"] if find_spec("accelerate") else []),
    "fsdp_bf16",
    "dcp",
    "fsdp1",
)


def every_way(name: str, folder: Path) -> None:
    """Writes the losses of each way; no model lives on when it returns."""
    run = Run(name, folder)
    losses = {way: getattr(run, way)() for way in WAYS}
    if run.rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def end() -> None:
    """End with no thread of gloo's that might still want the interpreter; no model lives here.

    A model that DDP or FSDP wrapped keeps its process group, and the group its threads, past
    destroy_process_group. A thread that lets go of a tensor while Python ends is unwound by it,
    and C++ says "terminate called without an active exception".
    """
    gc.collect()  # modules and their hooks are circles
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    warnings.simplefilter("ignore")
    importlib.import_module("tests.torchlib")
    dist.init_process_group("gloo")
    every_way(sys.argv[1], Path(sys.argv[2]))
    end()


if __name__ == "__main__":
    main()
