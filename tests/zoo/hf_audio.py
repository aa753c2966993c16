"""Audio and time-series models of transformers."""

from __future__ import annotations

from typing import Any

from .base import (
    BATCH,
    HEADS,
    HIDDEN,
    INNER,
    LABELS,
    MAX_SEQ,
    P_DROP,
    VOCAB,
    Built,
    entry,
    floats,
    ids,
    text,
)  # fmt: skip


def wave(**more: Any) -> dict[str, Any]:
    """The fields that wav2vec 2's relatives share. SpecAugment draws with numpy: off."""
    return dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, conv_dim=(12, 12), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_labels=LABELS,
        apply_spec_augment=False, layerdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ) | more  # fmt: skip


@entry("hf_whisper", "hf", tied=True, fast=True)
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
    features = floats(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    inputs = {"input_features": features, "decoder_input_ids": ids()}
    return WhisperForConditionalGeneration(config), (), inputs


@entry("hf_wav2vec2", "hf")
def _hf_wav2vec2() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(Wav2Vec2Config(**wave())), (), {"input_values": floats(BATCH, 200)}


@entry("hf_hubert", "hf")
def _hf_hubert() -> Built:
    from transformers import HubertConfig, HubertForSequenceClassification

    config = HubertConfig(**wave(classifier_proj_size=16))
    return HubertForSequenceClassification(config), (), {"input_values": floats(BATCH, 200)}


@entry("hf_audio_frames", "hf")
def _hf_audio_frames() -> Built:
    from transformers import WavLMConfig, WavLMForAudioFrameClassification

    config = WavLMConfig(**wave(num_buckets=8, max_bucket_distance=16))
    return WavLMForAudioFrameClassification(config), (), {"input_values": floats(BATCH, 200)}


@entry("hf_speaker", "hf")
def _hf_speaker() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    more = dict(tdnn_dim=(12, 16), tdnn_kernel=(3, 1), tdnn_dilation=(2, 1), xvector_output_dim=9)
    return (
        Wav2Vec2ForXVector(Wav2Vec2Config(**wave(**more))),
        (),
        {"input_values": floats(BATCH, 200)},
    )


@entry("hf_audio_classification", "hf")
def _hf_audio_classification() -> Built:
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, patch_size=4, frequency_stride=4, time_stride=4, max_length=16,
        num_mel_bins=12, num_labels=LABELS,
    )  # fmt: skip
    return ASTForAudioClassification(config), (), {"input_values": floats(BATCH, 16, 12)}


@entry("hf_speech_to_text", "hf")
def _hf_speech_to_text() -> Built:
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_source_positions=40, max_target_positions=MAX_SEQ,
        input_feat_per_channel=12, conv_channels=16, num_conv_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    inputs = {"input_features": floats(BATCH, 20, 12), "decoder_input_ids": ids()}
    return Speech2TextForConditionalGeneration(config), (), inputs


@entry("hf_zero_shot_audio", "hf")
def _hf_zero_shot_audio() -> Built:
    from transformers import ClapConfig, ClapModel

    config = ClapConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
            intermediate_size=INNER, max_position_embeddings=MAX_SEQ, pad_token_id=1,
            projection_dim=16,
        ),
        audio_config=dict(
            window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4],
            patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2],
            projection_dim=16, enable_fusion=False, drop_path_rate=0.0,
        ),
        projection_dim=16,
    )  # fmt: skip
    return ClapModel(config), (), text() | {"input_features": floats(BATCH, 1, 256, 16)}


@entry("hf_time_series", "hf")
def _hf_time_series() -> Built:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3, context_length=24, patch_length=4, patch_stride=4, d_model=HIDDEN,
        num_attention_heads=HEADS, num_hidden_layers=2, ffn_dim=INNER, prediction_length=6,
        scaling="std",
    )  # fmt: skip
    return PatchTSTForPrediction(config), (), {"past_values": floats(BATCH, 24, 3)}


@entry("hf_patchtsmixer", "hf")
def _hf_patchtsmixer() -> Built:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(
        num_input_channels=3, context_length=24, patch_length=4, patch_stride=4, d_model=HIDDEN,
        num_layers=2, prediction_length=6, mode="mix_channel",
    )  # fmt: skip
    return PatchTSMixerForPrediction(config), (), {"past_values": floats(BATCH, 24, 3)}
