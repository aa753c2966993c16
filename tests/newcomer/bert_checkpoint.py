"""Train a BERT classifier in a loop of one's own, merge it into a checkpoint, and verify that."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import lora_fx

torch.manual_seed(0)
config = BertConfig(
    vocab_size=120,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
    num_labels=2,
)
bert = BertForSequenceClassification(config).eval()
bert.save_pretrained("base")

# A text is of class 1 if word 7 is in it.
words = torch.randint(10, 120, (96, 12))
labels = torch.arange(96) % 2
words[labels == 1, 5] = 7
batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}

example = {name: value[:2] for name, value in batch.items()}
model = lora_fx.insert(bert, kwargs=example, rank=4, also_train="classifier").train()
print(model.report())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.eval()

adapter = model.adapter()
lora_fx.save_adapter(adapter, "adapter")
lora_fx.merge("base", "adapter", "merged")
assert lora_fx.verify("merged", "base", adapter="adapter")
assert not lora_fx.verify("merged", "base"), "the merge changed tensors"

# transformers alone reads the merged folder, and computes what the trained module computes.
merged = BertForSequenceClassification.from_pretrained("merged").eval()
with torch.no_grad():
    assert torch.allclose(merged(**batch).logits, model(**batch).logits, atol=1e-5)

# By hand: W + alpha/rank * B A.
key = "bert.encoder.layer.0.attention.self.query.weight"
update = adapter[key]
change = torch.from_numpy(update.alpha / update.rank * update.b @ update.a)
by_hand = bert.get_parameter(key) + change
assert torch.allclose(merged.get_parameter(key), by_hand, atol=1e-6)
