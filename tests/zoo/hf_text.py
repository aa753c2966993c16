"""Text models of transformers: encoders, and encoders with decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import HEADS, HIDDEN, INNER, LABELS, MAX_SEQ, VOCAB, Built, entry, ids, text


def bert(**more: Any) -> dict[str, Any]:
    """The fields that BERT's relatives share."""
    return dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=MAX_SEQ,
    ) | more  # fmt: skip


def both(**more: Tensor) -> dict[str, Tensor]:
    """Inputs of an encoder with a decoder."""
    return text() | {"decoder_input_ids": ids(seed=2)} | more


@entry("hf_bert", "hf", fast=True)
def _hf_bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**bert(num_labels=LABELS, use_cache=False))
    return BertForSequenceClassification(config), (), text()


@entry("hf_t5", "hf", tied=True, fast=True, gain=0.3)
def _hf_t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=MAX_SEQ,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), both()


@entry("hf_deberta_v2", "hf", fast=True)
def _hf_deberta_v2() -> Built:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    more = dict(
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        num_labels=LABELS,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(DebertaV2Config(**bert(**more))), (), text()


@entry("hf_deberta", "hf")
def _hf_deberta() -> Built:
    from transformers import DebertaConfig, DebertaForSequenceClassification

    more = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], num_labels=LABELS)
    config = DebertaConfig(**bert(**more, position_biased_input=False, max_relative_positions=8))
    return DebertaForSequenceClassification(config), (), text()


@entry("hf_roberta", "hf", tied=True)
def _hf_roberta() -> Built:
    from transformers import RobertaConfig, RobertaForMaskedLM

    more = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, use_cache=False)
    return RobertaForMaskedLM(RobertaConfig(**bert(**more))), (), text()


@entry("hf_bert_mlm", "hf", tied=True)
def _hf_bert_mlm() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**bert(use_cache=False))), (), text()


@entry("hf_modernbert", "hf")
def _hf_modernbert() -> Built:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    more = dict(num_labels=LABELS, pad_token_id=0, attn_implementation="sdpa", local_attention=4)
    config = ModernBertConfig(**bert(**more, global_attn_every_n_layers=2))
    return ModernBertForSequenceClassification(config), (), text()


@entry("hf_albert", "hf")
def _hf_albert() -> Built:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(**bert(embedding_size=16, num_labels=LABELS))
    return AlbertForSequenceClassification(config), (), text()


@entry("hf_fnet", "hf")
def _hf_fnet() -> Built:
    from transformers import FNetConfig, FNetForSequenceClassification

    config = FNetConfig(**bert(num_labels=LABELS))
    return FNetForSequenceClassification(config), (), {"input_ids": ids()}


@entry("hf_xlnet", "hf")
def _hf_xlnet() -> Built:
    from transformers import XLNetConfig, XLNetForSequenceClassification

    config = XLNetConfig(
        vocab_size=VOCAB, d_model=HIDDEN, n_layer=2, n_head=HEADS, d_inner=INNER, d_head=8,
        num_labels=LABELS, use_mems_eval=False, use_mems_train=False,
    )  # fmt: skip
    return XLNetForSequenceClassification(config), (), text()


@entry("hf_bart", "hf", tied=True)
def _hf_bart() -> Built:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_position_embeddings=MAX_SEQ, use_cache=False,
    )  # fmt: skip
    return BartForConditionalGeneration(config), (), both()


@entry("hf_marian", "hf", tied=True)
def _hf_marian() -> Built:
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_position_embeddings=MAX_SEQ, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return MarianMTModel(config), (), both()


# one model for every task of text


@entry("hf_token_classification", "hf")
def _hf_token_classification() -> Built:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    config = DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, n_layers=2, n_heads=HEADS, hidden_dim=INNER,
        max_position_embeddings=MAX_SEQ, num_labels=LABELS,
    )  # fmt: skip
    return DistilBertForTokenClassification(config), (), text()


@entry("hf_question_answering", "hf")
def _hf_question_answering() -> Built:
    from transformers import ElectraConfig, ElectraForQuestionAnswering

    return ElectraForQuestionAnswering(ElectraConfig(**bert(embedding_size=16))), (), text()


@entry("hf_multiple_choice", "hf")
def _hf_multiple_choice() -> Built:
    from transformers import BertConfig, BertForMultipleChoice

    choices = {k: v.unsqueeze(1).repeat(1, 3, 1) for k, v in text().items()}
    return BertForMultipleChoice(BertConfig(**bert(use_cache=False))), (), choices


@entry("hf_next_sentence", "hf")
def _hf_next_sentence() -> Built:
    from transformers import MobileBertConfig, MobileBertForNextSentencePrediction

    more = dict(embedding_size=16, intra_bottleneck_size=12, num_feedforward_networks=2)
    config = MobileBertConfig(**bert(**more))
    return MobileBertForNextSentencePrediction(config), (), text()


@entry("hf_text_embedding", "hf")
def _hf_text_embedding() -> Built:
    from transformers import MPNetConfig, MPNetModel

    return MPNetModel(MPNetConfig(**bert())), (), text()


@entry("hf_table_question", "hf")
def _hf_table_question() -> Built:
    import torch
    from transformers import TapasConfig, TapasForSequenceClassification

    config = TapasConfig(**bert(type_vocab_sizes=[3] * 7, num_labels=LABELS))
    kinds = {"token_type_ids": torch.zeros(*ids().shape, 7, dtype=torch.long)}
    return TapasForSequenceClassification(config), (), text() | kinds
