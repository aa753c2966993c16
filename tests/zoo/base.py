"""How the zoo's models are entered, drawn and fed.

Every ``Entry.build()`` gives ``(module, args, kwargs)``: the module in eval mode with every
parameter and norm statistic redrawn by ``redraw``, and example inputs of batch size 2.
A build is deterministic and leaves the global random state as it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Built]

BATCH = 2
SEQ = 5
VOCAB = 61  # of the text models; tied_head has its own, 37
MAX_SEQ = 16  # position tables are at least this long
HIDDEN = 24
HEADS = 3
INNER = 40
LABELS = 10
P_DROP = 0.1
IMAGE = (BATCH, 3, 32, 32)

CONTRACTED = {  # the axis that a product with a bare parameter sums over, by class name
    "MixtralExperts": 2,
    "Qwen3MoeExperts": 2,
    "Conv1D": 0,  # transformers': a linear layer stored [in, out]
}


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: What tests and tables call it.
        build: Gives (module, args, kwargs).
        family: hf, torchvision, timm or hand.
        tied: Two of its uses share one parameter.
        fast: In the default test run; the others are marked slow.
        captures: False where torch.export cannot capture it by design.
        include: What insert adapts; None is the default plan.
        trains: False where torch.export cannot capture its train mode.
        idle: Parts of it do not move its outputs: insert leaves them out, by name (dead="drop").
        branches: A cond in it takes one branch at a time, by the values of its inputs.
        gain: Factor on a random B: deep sums and unscaled logits amplify change and rounding.
    """

    name: str
    build: Callable[[], Built]
    family: str
    tied: bool = False
    fast: bool = False
    captures: bool = True
    include: str | None = None
    trains: bool = True
    idle: bool = False
    branches: bool = False
    gain: float = 1.0


ZOO: dict[str, Entry] = {}


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _fan_in(owner: nn.Module, shape: torch.Size) -> int:
    """How many products one output of the weight sums up."""
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return max(1, shape[0] * math.prod(shape[2:]) // owner.groups // math.prod(owner.stride))
    if isinstance(
        owner, (nn.modules.conv._ConvNd, nn.Bilinear, nn.utils.parametrize.ParametrizationList)
    ):
        return math.prod(shape[1:])
    return shape[getattr(owner, "contracted", CONTRACTED.get(type(owner).__name__, 1))]


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Draws every parameter and norm statistic anew, in place; a shared parameter once.

    Matrices are normal with std 1/sqrt(fan in), embeddings and other tables (class tokens,
    position tables) standard normal, biases normal with std .1, gains (also the lengths of
    weight norms) uniform on [.5, 1.5]; running means are normal with std .1, running variances
    uniform on [.5, 1.5]. Spectral norms find their weight's largest singular value anew.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(target: Tensor, std: float) -> None:
        target.copy_(torch.randn(target.shape, generator=generator) * std)

    def gain(target: Tensor) -> None:
        target.copy_(torch.rand(target.shape, generator=generator) + 0.5)

    owners = list(module.modules())
    tables = {id(m.weight) for m in owners if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    seen: set[int] = set()
    with torch.no_grad():
        for owner in owners:
            for name, param in owner.named_parameters(recurse=False):
                if id(param) in seen or not param.is_floating_point():
                    continue
                seen.add(id(param))
                if id(param) in tables or (param.ndim > 2 and param.shape[0] == 1):
                    normal(param, 1.0)
                elif name.endswith("bias") or name.startswith("bias_"):
                    normal(param, 0.1)
                elif param.ndim < 2 or _is_norm(owner) or math.prod(param.shape[1:]) == 1:
                    gain(param)
                else:
                    normal(param, _fan_in(owner, param.shape) ** -0.5)
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "running_mean":
                    normal(buffer, 0.1)
                elif name == "running_var":
                    gain(buffer)
        for owner in owners:
            if type(owner).__name__ == "ParametrizationList" and hasattr(owner, "original"):
                for part in owner.children():
                    if hasattr(part, "_power_method"):
                        part._power_method(part._reshape_weight_to_matrix(owner.original), 30)


def entry(name: str, family: str, **facts: Any) -> Callable[[Builder], Builder]:
    """Enters a builder into the zoo, its module redrawn and in eval mode."""

    def enter(builder: Builder) -> Builder:
        def build() -> Built:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                module, args, kwargs = builder()
            redraw(module)
            return module.eval(), args, kwargs

        assert name not in ZOO, name
        ZOO[name] = Entry(name, build, family, **facts)
        return build

    return enter


def floats(*shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(vocab: int = VOCAB, seed: int = 1) -> Tensor:
    """Token ids past the special ones (0 to 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (BATCH, SEQ), generator=generator)


def text() -> dict[str, Tensor]:
    """Inputs of a text model."""
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def image() -> dict[str, Tensor]:
    """Inputs of an image model."""
    return {"pixel_values": floats(*IMAGE)}
