"""Causal language models of transformers: dense, mixtures of experts, state spaces."""

from __future__ import annotations

from typing import Any

from .base import HEADS, HIDDEN, INNER, MAX_SEQ, P_DROP, VOCAB, Built, entry, ids, text


def llama(**more: Any) -> dict[str, Any]:
    """The fields that Llama's relatives share; 4 heads of 8 on a width of 24."""
    return dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=MAX_SEQ, use_cache=False,
    ) | more  # fmt: skip


@entry("hf_gpt2", "hf", tied=True, fast=True)
def _hf_gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=MAX_SEQ, n_embd=HIDDEN, n_layer=2, n_head=HEADS,
        n_inner=INNER, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), (), text()


@entry("hf_llama", "hf", fast=True)
def _hf_llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**llama(attention_dropout=P_DROP))), (), text()


@entry("hf_qwen2", "hf", tied=True)
def _hf_qwen2() -> Built:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**llama(tie_word_embeddings=True))), (), text()


@entry("hf_qwen3", "hf")
def _hf_qwen3() -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**llama(tie_word_embeddings=False))), (), text()


@entry("hf_mistral", "hf")
def _hf_mistral() -> Built:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**llama(sliding_window=4))), (), text()


@entry("hf_gemma", "hf", tied=True)
def _hf_gemma() -> Built:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**llama())), (), text()


@entry("hf_gemma3", "hf", tied=True)
def _hf_gemma3() -> Built:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **llama(sliding_window=4, query_pre_attn_scalar=8),
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config), (), text()


@entry("hf_phi3", "hf")
def _hf_phi3() -> Built:
    from transformers import Phi3Config, Phi3ForCausalLM

    return (
        Phi3ForCausalLM(Phi3Config(**llama(num_attention_heads=HEADS, num_key_value_heads=HEADS))),
        (),
        text(),
    )


@entry("hf_gpt_neox", "hf")
def _hf_gpt_neox() -> Built:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=MAX_SEQ, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config), (), text()


@entry("hf_opt", "hf", tied=True)
def _hf_opt() -> Built:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        ffn_dim=INNER, max_position_embeddings=MAX_SEQ, word_embed_proj_dim=HIDDEN,
        pad_token_id=1, bos_token_id=2, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return OPTForCausalLM(config), (), text()


@entry("hf_bloom", "hf", tied=True)
def _hf_bloom() -> Built:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=HEADS, use_cache=False
    )
    return BloomForCausalLM(config), (), text()


@entry("hf_falcon", "hf", tied=True)
def _hf_falcon() -> Built:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        multi_query=True, use_cache=False,
    )  # fmt: skip
    return FalconForCausalLM(config), (), text()


@entry("hf_mixtral", "hf")
def _hf_mixtral() -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**llama(num_local_experts=4, num_experts_per_tok=2))
    return MixtralForCausalLM(config), (), text()


@entry("hf_gpt_oss", "hf")
def _hf_gpt_oss() -> Built:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **llama(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False,
    )  # fmt: skip
    return GptOssForCausalLM(config), (), text()


@entry("hf_qwen3_moe", "hf")
def _hf_qwen3_moe() -> Built:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
    config = Qwen3MoeConfig(**llama(**more, tie_word_embeddings=False))
    return Qwen3MoeForCausalLM(config), (), text()


@entry("hf_mamba", "hf", tied=True)
def _hf_mamba() -> Built:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4,
        time_step_rank=3, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return MambaForCausalLM(config), (), {"input_ids": ids()}
