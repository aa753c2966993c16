"""Twenty tiny models, built from nothing (no network, no checkpoints), for the test suite.

Every ``Entry.build()`` gives ``(module, args, kwargs)``: the module in eval mode with every
parameter and norm statistic redrawn by ``redraw``, and example inputs of batch size 2.
A build is deterministic and leaves the global random state as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import hand

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


@dataclass(frozen=True)
class Entry:
    """One model of the zoo; ``tied`` says that two of its uses share one parameter."""

    name: str
    build: Callable[[], Built]
    family: str
    tied: bool = False


ZOO: dict[str, Entry] = {}


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _fan_in(owner: nn.Module, shape: torch.Size) -> int:
    """How many products one output of the weight sums up."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return math.prod(shape[1:])
    if type(owner).__name__ == "Conv1D":  # transformers': a linear layer stored [in, out]
        return shape[0]
    return shape[getattr(owner, "contracted", 1)]


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Draws every parameter and norm statistic anew, in place; a shared parameter once.

    Matrices are normal with std 1/sqrt(fan in), embeddings and other tables (class tokens,
    position tables) standard normal, biases normal with std .1, gains uniform on [.5, 1.5];
    running means are normal with std .1, running variances uniform on [.5, 1.5].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(target: Tensor, std: float) -> None:
        target.copy_(torch.randn(target.shape, generator=generator) * std)

    def gain(target: Tensor) -> None:
        target.copy_(torch.rand(target.shape, generator=generator) + 0.5)

    owners = list(module.modules())
    tables = {id(m.weight) for m in owners if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    with torch.no_grad():
        for owner in owners:
            for name, param in owner.named_parameters(recurse=False):
                if id(param) in seen:
                    continue
                seen.add(id(param))
                if id(param) in tables or (param.ndim > 2 and param.shape[0] == 1):
                    normal(param, 1.0)
                elif name.endswith("bias"):
                    normal(param, 0.1)
                elif param.ndim < 2 or _is_norm(owner):
                    gain(param)
                else:
                    normal(param, _fan_in(owner, param.shape) ** -0.5)
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "running_mean":
                    normal(buffer, 0.1)
                elif name == "running_var":
                    gain(buffer)


def _entry(name: str, family: str, tied: bool = False) -> Callable[[Builder], Builder]:
    """Enters a builder into the zoo, its module redrawn and in eval mode."""

    def enter(builder: Builder) -> Builder:
        def build() -> Built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module, args, kwargs = builder()
            redraw(module)
            return module.eval(), args, kwargs

        ZOO[name] = Entry(name, build, family, tied)
        return build

    return enter


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(vocab: int = VOCAB, seed: int = 1) -> Tensor:
    """Token ids past the special ones (0 to 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (BATCH, SEQ), generator=generator)


def _text() -> dict[str, Tensor]:
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# transformers


@_entry("hf_bert", "hf")
def _hf_bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=MAX_SEQ, num_labels=LABELS,
        use_cache=False,
    )  # fmt: skip
    return BertForSequenceClassification(config), (), _text()


@_entry("hf_gpt2", "hf", tied=True)
def _hf_gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=MAX_SEQ, n_embd=HIDDEN, n_layer=2, n_head=HEADS,
        n_inner=INNER, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), (), _text()


@_entry("hf_llama", "hf")
def _hf_llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_dropout=P_DROP,
        max_position_embeddings=MAX_SEQ, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), (), _text()


@_entry("hf_t5", "hf", tied=True)
def _hf_t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=MAX_SEQ,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), _text() | {"decoder_input_ids": _ids(seed=2)}


@_entry("hf_vit", "hf")
def _hf_vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=HEADS, intermediate_size=INNER, num_labels=LABELS,
        hidden_dropout_prob=P_DROP, attention_probs_dropout_prob=P_DROP,
    )  # fmt: skip
    return ViTForImageClassification(config), (), {"pixel_values": _floats(BATCH, 3, 32, 32)}


@_entry("hf_deberta_v2", "hf")
def _hf_deberta_v2() -> Built:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=MAX_SEQ, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, position_biased_input=False, num_labels=LABELS,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config), (), _text()


@_entry("hf_whisper", "hf", tied=True)
def _hf_whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=12, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_source_positions=9, max_target_positions=MAX_SEQ,
        dropout=P_DROP, attention_dropout=P_DROP, activation_dropout=P_DROP, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
        use_cache=False,
    )  # fmt: skip
    features = _floats(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    inputs = {"input_features": features, "decoder_input_ids": _ids()}
    return WhisperForConditionalGeneration(config), (), inputs


# torchvision and timm


@_entry("tv_vit", "torchvision")
def _tv_vit() -> Built:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=HEADS, hidden_dim=HIDDEN,
        mlp_dim=INNER, dropout=P_DROP, attention_dropout=P_DROP, num_classes=LABELS,
    )  # fmt: skip
    return model, (_floats(BATCH, 3, 32, 32),), {}


@_entry("tv_resnet18", "torchvision")
def _tv_resnet18() -> Built:
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=LABELS), (_floats(BATCH, 3, 64, 64),), {}


@_entry("timm_resnet18", "timm")
def _timm_resnet18() -> Built:
    import timm

    model = timm.create_model("resnet18", pretrained=False, num_classes=LABELS)
    return model, (_floats(BATCH, 3, 64, 64),), {}


@_entry("timm_mixer", "timm")
def _timm_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        num_classes=LABELS, img_size=32, patch_size=8, num_blocks=2, embed_dim=HIDDEN,
        mlp_ratio=(0.5, 2.0), drop_rate=P_DROP, proj_drop_rate=P_DROP,
    )  # fmt: skip
    return model, (_floats(BATCH, 3, 32, 32),), {}


# hand-written


def _enter_hand(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Enters a module of one float input, ``shape`` without the batch."""
    _entry(name, "hand")(lambda: (make(), (_floats(BATCH, *shape),), {}))


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, dropout=P_DROP, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


_enter_hand("raw_matmul", lambda: hand.RawMatmul(12, 20), SEQ, 12)
_enter_hand("einsum", lambda: hand.Einsum(12, 20), SEQ, 12)
_enter_hand("f_linear", lambda: hand.FLinear(12, 20), SEQ, 12)
_enter_hand("fused_qkv", lambda: hand.FusedQKV(HIDDEN, 4, 8, P_DROP), SEQ, HIDDEN)
_enter_hand("mha", lambda: hand.SelfAttention(HIDDEN, HEADS, P_DROP), SEQ, HIDDEN)
_enter_hand("transformer_encoder", _transformer_encoder, SEQ, HIDDEN)


@_entry("tied_head", "hand", tied=True)
def _tied_head() -> Built:
    return hand.TiedHead(37, 12, 20), (_ids(37),), {}


_enter_hand("left_weight", lambda: hand.LeftWeight(12, 20), 12, 7)
_enter_hand("bmm_experts", lambda: hand.BmmExperts(4, 12, 20), SEQ, 12)
