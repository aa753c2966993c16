"""Models of transformers that take text and images at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import HEADS, HIDDEN, INNER, LABELS, MAX_SEQ, VOCAB, Built, entry, ids, image, text
from .hf_decoders import llama
from .hf_vision import vit


class ImageFirst(nn.Module):
    """An image-and-text model; every prompt begins with the placeholders of its one image."""

    def __init__(self, model: nn.Module, image_token: int, patches: int) -> None:
        super().__init__()
        self.model, self.image_token, self.patches = model, image_token, patches

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        words = input_ids.clamp(max=self.image_token - 1)
        marks = words.new_full((pixel_values.shape[0], self.patches), self.image_token)
        prompt = torch.cat([marks, words], dim=1)
        return self.model(input_ids=prompt, pixel_values=pixel_values).logits


def towers(**more: Any) -> dict[str, Any]:
    """A text and an image tower."""
    common = dict(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=INNER, projection_dim=16,
    )  # fmt: skip
    words = dict(vocab_size=VOCAB, max_position_embeddings=MAX_SEQ, eos_token_id=2, pad_token_id=1)
    return dict(
        text_config=common | words | {"bos_token_id": 0},
        vision_config=common | dict(image_size=32, patch_size=8),
        projection_dim=16,
    ) | more  # fmt: skip


@entry("hf_zero_shot_image", "hf")
def _hf_zero_shot_image() -> Built:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**towers())), (), text() | image()


@entry("hf_siglip", "hf")
def _hf_siglip() -> Built:
    from transformers import SiglipConfig, SiglipModel

    parts = towers()
    del parts["projection_dim"], parts["text_config"]["projection_dim"]
    return SiglipModel(SiglipConfig(**parts)), (), {"input_ids": ids()} | image()


@entry("hf_zero_shot_detection", "hf")
def _hf_zero_shot_detection() -> Built:
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    return (
        OwlViTForObjectDetection(OwlViTConfig(**towers(projection_dim=HIDDEN))),
        (),
        text() | image(),
    )


@entry("hf_visual_question", "hf", captures=False)
def _hf_visual_question() -> Built:
    from transformers import ViltConfig, ViltForQuestionAnswering

    config = ViltConfig(**vit(vocab_size=VOCAB, max_position_embeddings=MAX_SEQ))
    return ViltForQuestionAnswering(config), (), text() | image()


@entry("hf_image_text_to_text", "hf")
def _hf_image_text_to_text() -> Built:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower = CLIPVisionConfig(**vit(projection_dim=16))
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**llama(max_position_embeddings=40)),
        image_token_id=VOCAB - 1, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    return ImageFirst(model, VOCAB - 1, 16), (), {"input_ids": ids()} | image()


@entry("hf_image_to_text", "hf", tied=True)
def _hf_image_to_text() -> Built:
    from transformers import (
        TrOCRConfig,
        TrOCRForCausalLM,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTModel,
    )  # fmt: skip

    decoder = TrOCRConfig(
        vocab_size=VOCAB, d_model=16, cross_attention_hidden_size=HIDDEN, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=INNER, max_position_embeddings=MAX_SEQ,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    encoder = ViTModel(ViTConfig(**vit()), add_pooling_layer=False)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=TrOCRForCausalLM(decoder))
    model.config.decoder.use_cache = False
    return model, (), image() | {"decoder_input_ids": ids()}


@entry("hf_image_text_retrieval", "hf")
def _hf_image_text_retrieval() -> Built:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    parts = towers(image_text_hidden_size=16)
    parts["text_config"] |= dict(encoder_hidden_size=HIDDEN, sep_token_id=2, use_cache=False)
    return BlipForImageTextRetrieval(BlipConfig(**parts)), (), text() | image()


@entry("hf_document_question", "hf")
def _hf_document_question() -> Built:
    from transformers import LayoutLMConfig, LayoutLMForSequenceClassification

    from .hf_text import bert

    # Boxes default to zeros: random ones would have corners in the wrong order.
    config = LayoutLMConfig(**bert(num_labels=LABELS, max_2d_position_embeddings=MAX_SEQ))
    return LayoutLMForSequenceClassification(config), (), text()
