"""A recommender of two towers over one table of words, with an adapter for each customer."""

import copy

import torch
from torch import nn

import lora_fx


class Recommender(nn.Module):
    """Scores of items for users; both towers read the same table of words."""

    def __init__(self):
        super().__init__()
        self.user_words = nn.Embedding(60, 16)
        self.item_words = nn.Embedding(60, 16)
        self.item_words.weight = self.user_words.weight
        self.user_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        self.item_tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, user, item):
        user = self.user_tower(self.user_words(user).mean(1))
        item = self.item_tower(self.item_words(item).mean(1))
        return (user * item).sum(-1)


torch.manual_seed(0)
net = Recommender().eval()
user, item = torch.randint(0, 60, (32, 5)), torch.randint(0, 60, (32, 4))
base = net(user, item).detach()

# The table is tied: one update of it serves both towers.
model = lora_fx.insert(net, (user, item), rank=3, include="*")
print(model.report())
untrained = model.adapter()
adapters, scores = {}, {}
for customer in ("books", "shoes"):
    model.load_adapter(untrained, name=customer)
    model.activate(customer)
    bought = torch.randint(0, 2, (32,)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), bought)
        loss.backward()
        optimizer.step()
    model.eval()
    adapters[customer], scores[customer] = model.adapter(), model(user, item).detach()


def by_hand(adapter):
    """The scores of a copy of the model with the adapter's changes in its weights."""
    plain = copy.deepcopy(net)
    for key, change in adapter.deltas().items():
        plain.get_parameter(key).data += torch.from_numpy(change)
    return plain(user, item).detach()


for customer in ("shoes", "books", "shoes"):
    model.activate(customer)
    assert torch.equal(model(user, item), scores[customer])
    assert torch.allclose(scores[customer], by_hand(adapters[customer]), atol=1e-5)
model.activate(None)
assert torch.equal(model(user, item), base)
assert not torch.allclose(scores["books"], scores["shoes"])
