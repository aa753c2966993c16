"""Tiny models of transformers whose output head is tied to their embedding, by naming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

ROWS, SIDE = 40, 16
IDS = torch.arange(10).reshape(2, 5) * 7 % ROWS
_BERT = {
    "hidden_size": SIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_SEQ = {
    "d_model": SIDE,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
    "init_std": 0.3,
    "scale_embedding": True,
}
_SPEECH = {
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_T5 = {
    "d_model": SIDE,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_WIDE = {"initializer_range": 0.3}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    # name: (class, config, its fields, table, head)
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {**_BERT, **_WIDE, "num_key_value_heads": 1},
        "model.embed_tokens.weight", "lm_head.weight",
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": SIDE, "n_layer": 1, "n_head": 2, "n_positions": 20, **_WIDE,
         "bos_token_id": 1, "eos_token_id": 1},
        "transformer.wte.weight", "lm_head.weight",
    ),
    "gpt2 double": (
        "GPT2DoubleHeadsModel", "GPT2Config",
        {"n_embd": SIDE, "n_layer": 1, "n_head": 2, "n_positions": 20, **_WIDE,
         "bos_token_id": 1, "eos_token_id": 1, "num_labels": 1},
        "transformer.wte.weight", "lm_head.weight",
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        {"hidden_size": SIDE, "n_layer": 1, "n_head": 2, **_WIDE},
        "transformer.word_embeddings.weight", "lm_head.weight",
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_BERT, **_WIDE},
        "gpt_neox.embed_in.weight", "embed_out.weight",
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {"hidden_size": SIDE, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 20, "word_embed_proj_dim": SIDE, "init_std": 0.3},
        "model.decoder.embed_tokens.weight", "lm_head.weight",
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"hidden_size": SIDE, "num_hidden_layers": 1, "state_size": 4, **_WIDE},
        "backbone.embeddings.weight", "lm_head.weight",
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig", _SEQ, "model.shared.weight", "lm_head.weight",
    ),
    "bart decoder": (
        "BartForCausalLM", "BartConfig", _SEQ,
        "model.decoder.embed_tokens.weight", "lm_head.weight",
    ),
    "marian": (
        "MarianMTModel", "MarianConfig", {**_SEQ, "pad_token_id": 0, "decoder_start_token_id": 0},
        "model.shared.weight", "lm_head.weight",
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config", _T5, "shared.weight", "lm_head.weight",
    ),
    "bert": (
        "BertForMaskedLM", "BertConfig", {**_BERT, **_WIDE},
        "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
    ),
    "bert of pre-training": (
        "BertForPreTraining", "BertConfig", {**_BERT, **_WIDE},
        "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
    ),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"dim": SIDE, "n_layers": 1, "n_heads": 2, "hidden_dim": 24,
         "max_position_embeddings": 20, **_WIDE},
        "distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight",
    ),
    "roberta": (
        "RobertaForMaskedLM", "RobertaConfig", {**_BERT, **_WIDE},
        "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight",
    ),
    "albert": (
        "AlbertForMaskedLM", "AlbertConfig", {**_BERT, **_WIDE, "embedding_size": SIDE},
        "albert.embeddings.word_embeddings.weight", "predictions.decoder.weight",
    ),
    "electra": (
        "ElectraForMaskedLM", "ElectraConfig", {**_BERT, **_WIDE, "embedding_size": SIDE},
        "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight",
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", {**_SEQ, **_SPEECH},
        "model.decoder.embed_tokens.weight", "proj_out.weight",
    ),
}  # fmt: skip


def tied(name: str, folder: Path, *, tie: bool = True) -> Any:
    """A model of a family, saved by transformers; its biases are not zero."""
    kind, config, fields, _, _ = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=ROWS, tie_word_embeddings=tie, **fields)
    model = getattr(transformers, kind)(made).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def load(name: str, folder: Path) -> Any:
    """The model of a folder in fp64; what is missing, unused or of another shape is an error."""
    kind = getattr(transformers, FAMILIES[name][0])
    model, said = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    wrong = {k: v for k, v in said.items() if v and k != "error_msgs"}
    assert not wrong, wrong
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Over tokens, of fixed inputs."""
    given: dict[str, Any] = {"input_ids": IDS}
    if model.config.model_type == "whisper":
        torch.manual_seed(1)
        given = {"input_features": torch.randn(2, 8, 40, dtype=torch.float64)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        out = model(**given)
    found: torch.Tensor = out.prediction_logits if "prediction_logits" in out else out.logits
    return found
