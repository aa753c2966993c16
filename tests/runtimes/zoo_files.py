"""Twenty portable switch files of the zoo: `python -m tests.runtimes.zoo_files FOLDER [NAME…]`.

They are the zoo's fast models, every one that torch.export can capture, as switch_files.py has
them: two adapters of rank 2 and 3 on the targets of the zoo's own tests.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.dtypes import Array
from lora_fx.fx.module.execution import execution_of
from lora_fx.inputs import SIZES
from lora_fx.passes.proofs.proof_inputs import arrays_of
from tests.runtimes import switch_files
from tests.zoo import checks
from tests.zoo.models import ZOO
from tests.zoo.oracles import explicit

NAMES = tuple(name for name, entry in ZOO.items() if entry.fast and entry.captures)


def adapters_of(name: str, module: Any) -> dict[str, Adapter]:
    """Adapter a is that of the zoo's tests, and b has other numbers and another rank."""
    first = module.adapter()
    updates = {}
    for key, update in first.lowrank.items():
        a, b = draw(key, update.layout, min(3, update.layout.max_rank), 1, "probe")
        gain = np.float32(checks.EFFECT * checks.facts(name).gain)
        updates[key] = replace(update, a=a, b=b * gain)
    return {"a": first, "b": Adapter(updates)}


def write(folder: Path, name: str) -> None:
    """Write the files of one model."""
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise; the graph has none
    module = checks.perturbed(name)
    adapters = adapters_of(name, module)
    subject = checks.built(name)

    def outputs(adapter: Adapter | None, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if adapter is None:
            zero = {key: replace(u, b=np.zeros_like(u.b)) for key, u in adapters["a"].items()}
            adapter = Adapter(zero)
        changed = checks.adapted(name)
        changed.load_adapter(adapter)
        return explicit(subject, changed)(inputs)

    sizes = [arrays_of(execution_of(module).sample(size)) for size in SIZES[:2]]
    switch_files.write(folder, name, subject.cap, adapters, sizes, outputs)


def main(arguments: list[str]) -> None:
    """Write the files of the models that are named, or of all."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments[1:] or NAMES:
        write(folder, name)
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
