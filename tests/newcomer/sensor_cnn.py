"""Fine-tune a small 1-d CNN on a new sensor, watch a held-out set, and ship one ONNX file."""

import onnxruntime
import torch
from torch import nn

import lora_fx

torch.manual_seed(0)


def recordings(count, step):
    """Signals [count, 2, 64] and the class of each: a slow, a middle or a fast wave, with noise."""
    labels = torch.randint(0, 3, (count,))
    angle = step * torch.arange(64) * (0.2 + 0.25 * labels[:, None]) + 6.3 * torch.rand(count, 1)
    clean = torch.stack([angle.sin(), angle.cos()], dim=1)
    return clean + 0.3 * torch.randn(count, 2, 64), labels


def fit(model, signals, labels):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(signals), labels).backward()
        optimizer.step()
    model.eval()


def accuracy(logits, labels):
    return float((logits.argmax(1) == labels).float().mean())


net = nn.Sequential(
    nn.Conv1d(2, 16, 7, padding=3),
    nn.BatchNorm1d(16),
    nn.ReLU(),
    nn.MaxPool1d(2),
    nn.Conv1d(16, 24, 5, stride=2),
    nn.ReLU(),
    nn.AdaptiveAvgPool1d(1),
    nn.Flatten(),
    nn.Linear(24, 3),
)
fit(net, *recordings(256, step=1.0))

# The new sensor takes half as many samples in a second, so every wave looks twice as fast.
signals, labels = recordings(256, step=2.0)
new_signals, new_labels = recordings(128, step=2.0)
model = lora_fx.insert(net, (signals[:4],), rank=4)
print(model.report())
fit(model, signals, labels)
with torch.no_grad():
    expected = model(new_signals)
    before = accuracy(net(new_signals), new_labels)
after = accuracy(expected, new_labels)
print(f"held out: {before:.2f} -> {after:.2f}")
assert after > before

print(lora_fx.export(model, "sensor.onnx", provider="cpu"))
session = onnxruntime.InferenceSession("sensor.onnx", providers=["CPUExecutionProvider"])
shipped = torch.from_numpy(session.run(None, {"input": new_signals.numpy()})[0])
assert torch.allclose(shipped, expected, atol=1e-4)

# By hand: the changes of the weights, added to the network of torch.
for key, change in model.adapter().deltas().items():
    net.get_parameter(key).data += torch.from_numpy(change)
assert torch.allclose(shipped, net(new_signals), atol=1e-4)
