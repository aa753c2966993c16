"""Attach to a speech model in place, train, detach; PEFT reads the adapter."""

import copy

import peft
import torch
from torch import nn

import lora_fx


class Speech(nn.Module):
    """Frames [batch, time, 20] to letters: a convolution over time, a GRU and a projection."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(20, 24, 5, stride=2, padding=2)
        self.gru = nn.GRU(24, 32, batch_first=True)
        self.proj = nn.Linear(32, 28)
        self.letters = nn.Linear(28, 12)

    def forward(self, frames):
        y = torch.relu(self.conv(frames.transpose(1, 2))).transpose(1, 2)
        y = torch.tanh(self.proj(self.gru(y)[0]))
        return self.letters(y).log_softmax(-1)


torch.manual_seed(0)
net = Speech().eval()
frames = torch.randn(8, 40, 20)
text = torch.randint(1, 12, (8, 6))
lengths = torch.full((8,), 20), torch.full((8,), 6)
before = net(frames).detach()

lora_fx.attach(net, (frames,), rank=4, include=["conv", "gru.*", "proj", "letters"])
print(net.report())
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
net.train()
for _ in range(10):
    optimizer.zero_grad()
    loss = nn.functional.ctc_loss(net(frames).transpose(0, 1), text, *lengths)
    loss.backward()
    optimizer.step()
net.eval()
trained, adapter = net(frames).detach(), net.adapter()
lora_fx.detach(net)
assert torch.equal(net(frames), before)
assert not torch.allclose(trained, before, atol=1e-2)


def by_hand(adapter):
    """What a copy of the model computes with the adapter's changes in its weights."""
    model = copy.deepcopy(net)
    for key, change in adapter.deltas().items():
        model.get_parameter(key).data += torch.from_numpy(change)
    return model(frames)


assert torch.allclose(by_hand(adapter), trained, atol=1e-4)

# PEFT adapts the weights of modules alone: the notes say what of the file it will not load.
notes = lora_fx.save_adapter(adapter, "speech")
assert [note.split("'")[1] for note in notes] == ["gru.weight_ih_l0", "gru.weight_hh_l0"], notes
theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), "speech").eval()
assert torch.allclose(theirs(frames), by_hand(adapter.select(exclude="gru.*")), atol=1e-4)
assert torch.equal(by_hand(lora_fx.load_adapter("speech")), by_hand(adapter)), "the file has all"
