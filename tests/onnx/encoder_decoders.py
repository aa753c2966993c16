"""Small encoder-decoders of transformers, of random weights; no two of their sizes are equal."""

from __future__ import annotations

from typing import Any

import torch

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LAYERS = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 36, "init_std": 0.3,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(1)
    config = WhisperConfig(
        **TOKENS, **LAYERS, num_mel_bins=6, max_source_positions=14, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    # with more layers than the encoder has, transformers' own generate fails (5.24)
    config = T5Config(
        **TOKENS, d_model=24, d_kv=7, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=2
    )
    return T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(3)
    config = BartConfig(**TOKENS, **LAYERS, max_position_embeddings=64)
    return BartForConditionalGeneration(config).eval()


def mbart() -> Any:
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(4)
    config = MBartConfig(**TOKENS, **LAYERS, max_position_embeddings=64)
    return MBartForConditionalGeneration(config).eval()


def marian() -> Any:
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(5)
    config = MarianConfig(**TOKENS, **LAYERS, max_position_embeddings=64)
    return MarianMTModel(config).eval()


FAMILIES = {"whisper": whisper, "t5": t5, "bart": bart, "mbart": mbart, "marian": marian}
