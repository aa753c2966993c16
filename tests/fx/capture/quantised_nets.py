"""A small net with layers that other packages have quantised, and what those say they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

IN, MIDDLE, OUT, TOKENS = 64, 128, 64, 40


class Net(nn.Module):
    """A table, two linear layers that get quantised, and a head that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, IN)
        self.up = nn.Linear(IN, MIDDLE)
        self.down = nn.Linear(MIDDLE, OUT, bias=False)
        self.head = nn.Linear(OUT, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.relu(self.up(self.table(ids))))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, TOKENS, (rows, 5), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A way to quantise the net.

    Attributes:
        make: Quantises it in place.
        own: The layer's dequantised weight, by its package.
        format: As find lists it.
        bits: As find lists them.
        x: The live layer quantises x too.
        names: The quantised layers.
    """

    make: Callable[[Net], Any]
    own: Callable[[Any], torch.Tensor]
    format: str
    bits: int
    x: bool = False
    names: tuple[str, ...] = field(default=("up", "down"))


def bitsandbytes() -> Iterator[tuple[str, Case]]:
    import bitsandbytes as bnb
    from bitsandbytes import functional as f

    def four(kind: str, nested: bool, compute: torch.dtype | None) -> Callable[[Net], None]:
        def make(model: Net) -> None:
            for name in ("up", "down"):
                old: Any = getattr(model, name)
                new = bnb.nn.Linear4bit(
                    old.in_features,
                    old.out_features,
                    bias=old.bias is not None,
                    compute_dtype=compute,
                    compress_statistics=nested,
                    quant_type=kind,
                )
                new.load_state_dict(old.state_dict())
                setattr(model, name, new.requires_grad_(False).to("cpu").eval())

        return make

    def of_four(layer: Any) -> torch.Tensor:
        made: torch.Tensor = f.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return made

    def eight(model: Net) -> None:
        for name in ("up", "down"):
            old: Any = getattr(model, name)
            sizes = old.in_features, old.out_features
            new = bnb.nn.Linear8bitLt(*sizes, old.bias is not None, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            setattr(model, name, new.requires_grad_(False).to("cpu").eval())

    def of_eight(layer: Any) -> torch.Tensor:  # as their backward and layers in train mode have it
        made: torch.Tensor = layer.weight.data * layer.weight.SCB[:, None].mul(1.0 / 127.0)
        return made

    def table(cls: Any, **options: Any) -> Callable[[Net], None]:
        def make(model: Net) -> None:
            old = model.table
            new = cls(TOKENS, IN, **options)
            new.load_state_dict(old.state_dict())
            model.table = new.requires_grad_(False).to("cpu").eval()

        return make

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for compute in (None, torch.float32, torch.bfloat16):
                name = f"{kind}{' nested' * nested} {str(compute).removeprefix('torch.')}"
                case = Case(four(kind, nested, compute), of_four, f"bitsandbytes {kind}", 4)
                yield name, case
    yield "int8", Case(eight, of_eight, "bitsandbytes int8", 8, x=True)
    tables = {"names": ("table",)}
    for cls, kind in ((bnb.nn.EmbeddingNF4, "nf4"), (bnb.nn.EmbeddingFP4, "fp4")):
        yield f"table {kind}", Case(table(cls), of_four, f"bitsandbytes {kind}", 4, **tables)
    yield (
        "table int8",
        Case(table(bnb.nn.Embedding8bit), of_eight, "bitsandbytes int8", 8, **tables),
    )


def torchao() -> Iterator[tuple[str, Case]]:
    from torchao import quantization as q
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    def by(config: Any) -> Callable[[Net], None]:
        def chosen(module: nn.Module, name: str) -> bool:
            return name in ("up", "down")

        return lambda model: q.quantize_(model, config, chosen)

    def own(layer: Any) -> torch.Tensor:
        made: torch.Tensor = layer.weight.dequantize()
        return made

    def nf4(model: Net) -> None:
        for name in ("up", "down"):
            layer: Any = getattr(model, name)
            made = to_nf4(layer.weight.data, 32, 4)
            layer.weight = nn.Parameter(made, requires_grad=False)

    def of_nf4(layer: Any) -> torch.Tensor:
        made: torch.Tensor = layer.weight.get_original_weight()
        return made

    group, axis = q.PerGroup(32), q.PerAxis(0)
    intx = "torchao IntxUnpackedToInt8Tensor"
    four, two = (getattr(torch, name) for name in ("int4", "int2"))
    yield "int4 groups", Case(by(q.IntxWeightOnlyConfig(four, group)), own, intx, 4)
    yield "int4 rows", Case(by(q.IntxWeightOnlyConfig(four, axis)), own, intx, 4)
    odd = q.IntxWeightOnlyConfig(four, group, mapping_type=q.MappingType.ASYMMETRIC)
    yield "int4 with zeros", Case(by(odd), own, intx, 4)
    yield "int2 groups", Case(by(q.IntxWeightOnlyConfig(two, group)), own, intx, 2)
    yield "int8", Case(by(q.Int8WeightOnlyConfig()), own, "torchao Int8Tensor", 8)
    yield "float8", Case(by(q.Float8WeightOnlyConfig()), own, "torchao Float8Tensor", 8)
    yield "nf4", Case(nf4, of_nf4, "torchao nf4", 4)
    dynamic = q.Int8DynamicActivationInt8WeightConfig()
    yield "int8 and x", Case(by(dynamic), own, "torchao Int8Tensor", 8, x=True)
    dynamic = q.Int8DynamicActivationIntxWeightConfig(four, group)
    yield "int4 and x", Case(by(dynamic), own, intx, 4, x=True)


def compressed_tensors() -> Iterator[tuple[str, Case]]:
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    def by(x: bool, **options: Any) -> Callable[[Net], None]:
        def make(model: Net) -> None:
            for name in ("up", "down"):
                layer: Any = getattr(model, name)
                args = QuantizationArgs(**options)
                dynamic = QuantizationArgs(num_bits=8, dynamic=True, strategy="token")
                scheme = QuantizationScheme(
                    targets=["Linear"], weights=args, input_activations=dynamic if x else None
                )
                initialize_module_for_quantization(layer, scheme)
                groups = args.group_size or layer.in_features
                cut = layer.weight.reshape(layer.out_features, -1, groups)
                steps, zero = calculate_qparams(cut.amin(-1), cut.amax(-1), args)
                layer.weight_scale.data.copy_(steps)
                if not args.symmetric:
                    layer.weight_zero_point.data.copy_(zero)
                compress_module(layer)
            model.requires_grad_(False)

        return make

    def own(layer: Any) -> torch.Tensor:
        whole = copy.deepcopy(layer)
        decompress_module(whole)
        weight: torch.Tensor = whole.weight
        return weight

    four: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
    packed = "compressed-tensors packed"
    yield "int4", Case(by(False, **four), own, packed, 4)
    yield "int4 with zeros", Case(by(False, symmetric=False, **four), own, packed, 4)
    eight: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
    yield "int8 and x", Case(by(True, **eight), own, "compressed-tensors int8", 8, x=True)
    fp8 = by(False, type="float", **eight)
    yield "fp8", Case(fp8, own, "compressed-tensors fp8", 8)


def gptqmodel() -> Iterator[tuple[str, Case]]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def by(cls: Any, order: bool) -> Callable[[Net], None]:
        def make(model: Net) -> None:
            for name in ("up", "down"):
                old: Any = getattr(model, name)
                layer = cls(
                    bits=4, group_size=32, sym=False, desc_act=order,
                    in_features=old.in_features, out_features=old.out_features,
                    bias=old.bias is not None, pack_dtype=torch.int32, register_buffers=True,
                )  # fmt: skip
                for words in (layer.qweight, layer.qzeros):
                    words.copy_(torch.randint(-(2**31), 2**31 - 1, words.shape))
                layer.scales.copy_(torch.rand(layer.scales.shape) / 50)
                if old.bias is not None:
                    layer.bias.copy_(old.bias)
                if cls is TorchLinear:
                    groups = torch.arange(old.in_features, dtype=torch.int32) // 32
                    layer.g_idx = groups[torch.randperm(len(groups))] if order else groups
                layer.post_init()
                setattr(model, name, layer.eval())
            model.requires_grad_(False)

        return make

    def own(layer: Any) -> torch.Tensor:
        made: torch.Tensor = layer.dequantize_weight().T
        return made

    def of_awq(layer: Any) -> torch.Tensor:
        parts = layer.qweight, layer.qzeros, layer.scales
        made: torch.Tensor = dequantize_gemm(*parts, 4, 32).T
        return made

    yield "gptq", Case(by(TorchLinear, False), own, "GPTQ", 4)
    yield "gptq in an order", Case(by(TorchLinear, True), own, "GPTQ", 4)
    yield "awq", Case(by(AwqTorchLinear, False), of_awq, "AWQ", 4)
