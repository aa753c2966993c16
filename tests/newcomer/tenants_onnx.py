"""Adapt an .onnx file without its source for two tenants, and serve both in one batch."""

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import lora_fx

# What the supplier did: a scorer of texts, exported and given away as one file.
torch.manual_seed(0)
supplier = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5)).eval()
rows = torch.export.Dim("rows")
torch.onnx.export(
    supplier,
    (torch.randn(3, 20),),
    "scorer.onnx",
    dynamo=True,
    verbose=False,
    input_names=["features"],
    output_names=["scores"],
    dynamic_shapes=({0: rows},),
)
onnx.checker.check_model("scorer.onnx")

# What we have is the file. `lora-fx targets scorer.onnx` names its weights, and their sides.
sides = {"0.weight": (20, 32), "3.weight": (32, 5)}
rng = np.random.default_rng(0)
tenants = {}
for tenant, rank in (("bakery", 2), ("garage", 3)):
    updates = {}
    for key, (size_in, size_out) in sides.items():
        a = rng.standard_normal((rank, size_in), dtype=np.float32) / 4
        b = rng.standard_normal((size_out, rank), dtype=np.float32) / 4
        updates[key] = lora_fx.LowRank(a, b, alpha=2 * rank)
    tenants[tenant] = lora_fx.Adapter(updates)
report = lora_fx.export(
    "scorer.onnx", "served.onnx", adapters=list(tenants.values()), mode="batch", provider="cpu"
)
print(report)

session = onnxruntime.InferenceSession("served.onnx", providers=["CPUExecutionProvider"])
features = rng.standard_normal((6, 20), dtype=np.float32)
who = np.array([1, 2, 0, 2, 1, 0])
served = session.run(None, {"features": features, "adapter_ids": who})[0]

# Each row alone, in the supplier's own torch module with W + alpha/rank * B A put in by hand.
original = {name: value.clone() for name, value in supplier.state_dict().items()}
for number, adapter in enumerate([None, *tenants.values()]):
    state = dict(original)
    for key, update in (adapter or {}).items():
        state[key] = original[key] + 2 * torch.from_numpy(update.b @ update.a)
    supplier.load_state_dict(state)
    with torch.no_grad():
        expected = supplier(torch.from_numpy(features))[who == number].numpy()
    assert np.allclose(served[who == number], expected, atol=1e-5), number
