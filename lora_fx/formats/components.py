"""Components of an image model, each a model of its own: a UNet or transformer, and text encoders.

=================  =================================  =========================================
component          kohya, with "_" for "."            diffusers, and single-file checkpoints
=================  =================================  =========================================
unet               lora_unet_                         unet. · model.diffusion_model. · …
transformer        lora_transformer_, lora_unet_      transformer. · model.diffusion_model. · …
text_encoder       lora_te_, lora_te1_                text_encoder. · cond_stage_model. …
text_encoder_2     lora_te2_                          text_encoder_2.
(any model)        lycoris_, lora_                    as the model has it
=================  =================================  =========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_fx.files.checkpoint import tensors


@dataclass(frozen=True)
class Component:
    """The names of one component in files.

    Attributes:
        prefixes: Kohya's, which has "_" for ".".
        homes: The dotted ones of pipelines and of checkpoints in a single file.
    """

    prefixes: tuple[str, ...]
    homes: tuple[str, ...]


_DIFFUSION = ("model.diffusion_model.", "diffusion_model.")
COMPONENTS = {
    "unet": Component(("lora_unet_",), ("unet.", "transformer.", *_DIFFUSION)),
    "transformer": Component(("lora_transformer_",), ("transformer.", *_DIFFUSION)),
    "text_encoder": Component(
        ("lora_te_", "lora_te1_"),
        ("text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    ),
    "text_encoder_2": Component(("lora_te2_",), ("text_encoder_2.",)),
    "text_encoder_3": Component(("lora_te3_",), ("text_encoder_3.",)),
}
_ONLY_OF = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding."),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.",),
}
"""component → beginnings that the names of no other component's modules have."""


def split_component(key: str) -> tuple[str, str]:
    """(component, the rest) of a dotted key; no component where it names none.

    >>> split_component("text_encoder_2.text_model.x.weight"), split_component("h.0.fc.weight")
    (('text_encoder_2', 'text_model.x.weight'), ('', 'h.0.fc.weight'))
    """
    component, _, path = key.partition(".")
    if component in COMPONENTS and path:
        return component, path
    return "", key


def has_home(key: str) -> bool:
    """True for a key that begins with a component, or as in a single-file checkpoint."""
    component, _ = split_component(key)
    return bool(component) or key.startswith(_DIFFUSION)


def guess_component(key: str) -> str:
    """The component that a key without one can only belong to; empty where several could."""
    for component, starts in _ONLY_OF.items():
        if key.startswith(starts):
            return component
    return ""


def names_of(base: str | Path) -> tuple[str, ...]:
    """Tensor names of a model's folder or file; of a pipeline's, with the component before them."""
    base = Path(base)
    if not is_pipeline(base):
        return tuple(tensors(base))
    names: list[str] = []
    for component in COMPONENTS:
        folder = base / component
        if any(folder.glob("*.safetensors")):
            names += [f"{component}.{name}" for name in tensors(folder)]
    return tuple(names)


def is_pipeline(base: str | Path) -> bool:
    """True for a folder of diffusers with one folder a component."""
    return (Path(base) / "model_index.json").is_file()
