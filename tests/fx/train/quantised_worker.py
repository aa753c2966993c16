"""One process of the test of DDP over codes; torchrun starts it and reads what process 0 prints."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from tests.fx.train.loops import still
from tests.fx.train.loops_worker import Tied, end, train
from tests.zoo.models import ZOO

STEPS = 20


def made(name: str, kind: str = "nf4") -> Any:
    """An adapted model over codes."""
    if name == "tied":
        model, kwargs = Tied().eval(), {"input_ids": torch.arange(10).reshape(2, 5)}
        return lora_fx.insert(model, (), kwargs, rank=3, exclude="head", quantise=kind)
    model, _, kwargs = ZOO[name].build()
    return lora_fx.insert(still(model), (), kwargs, rank=3, exclude="lm_head", quantise=kind)


def main(name: str) -> None:
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(copy.deepcopy(made(name)))
    losses = train(wrapped, range(STEPS), dist.get_rank())
    if dist.get_rank() == 0:
        print(json.dumps(losses))
    del wrapped
    end()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
