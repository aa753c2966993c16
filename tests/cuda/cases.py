"""The files of the placement table: models of the zoo, one of a family, in every mode of export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_fx

DECODERS = ("hf_gpt2", "hf_llama")
"""Families whose key-value cache can be an input and an output."""
TRAINED = ("hf_bert", "hf_gpt2", "hf_llama", "hf_vit", "timm_resnet18", "tied_head")
"""Families that are exported as a training step, which takes the longest."""
FOR_CUDA = {"target": "cuda"}
FUSED = ("hf_bert", *DECODERS, "hf_vit", "hf_swin", "timm_mixer", "hf_whisper")
"""Families whose sums and norms are one operator in a file for CUDA."""
CODED = ("hf_bert", *DECODERS)
"""Families that are exported with codes of 4 bits beside float16, which are files for CUDA only."""
INTEGER = ("tied_head", "hf_bert")
"""Families that are exported with products of int8, which CUDA has no kernels for."""
FAMILIES = (
    "tied_head",
    "torch_cond",
    "lstm",
    "gru",
    "embedding_bag",
    "bmm_experts",
    "transformer_encoder",
    "unet",
    "timm_resnet18",
    "timm_convnext",
    "timm_mixer",
    "hf_vit",
    "hf_swin",
    "hf_bert",
    "hf_deberta_v2",
    "hf_t5",
    *DECODERS,
    "hf_whisper",
    "hf_wav2vec2",
    "hf_mamba",
    "hf_qwen3",
    "hf_mixtral",
)
CRASHES = {
    ("lstm", "merged float16"),
    ("lstm", "merged float16 optimised"),
    ("gru", "merged float16"),
    ("gru", "merged float16 optimised"),
    ("transformer_encoder", "merged float16 optimised"),
}
"""Families and modes that cannot be in the table: the process that exports them ends with a
segmentation fault, where ONNX Runtime's CPU provider loads the file."""
RANK = 2


@dataclass(frozen=True)
class Mode:
    """One way to export.

    Attributes:
        options: Keywords of lora_fx.export.
        of_file: The mode whose file is exported again; empty for the captured model.
        families: The models that are exported so.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    of_file: str = ""
    families: tuple[str, ...] = FAMILIES


MODES: Mapping[str, Mode] = {
    "merged": Mode(),
    "merged optimised": Mode({"optimise": True}),
    "merged float16": Mode({"precision": "float16"}),
    "merged float16 optimised": Mode({"precision": "float16", "optimise": True}),
    "switch": Mode({"mode": "switch"}),
    "switch of optimised": Mode({"mode": "switch"}, "merged optimised"),
    "switch of float16": Mode({"mode": "switch"}, "merged float16"),
    "switch int4": Mode({"mode": "switch", "quantise": "int4"}),
    "load": Mode({"mode": "load"}),
    "batch": Mode({"mode": "batch"}),
    "batch int4": Mode({"mode": "batch", "quantise": "int4"}),
    "train": Mode({"mode": "train"}, families=TRAINED),
    "cache merged": Mode({"cache": True}, families=DECODERS),
    "cache optimised": Mode({"cache": True, "optimise": True}, families=DECODERS),
    "cache float16": Mode({"cache": True, "precision": "float16"}, families=DECODERS),
    "cache switch": Mode({"cache": True, "mode": "switch"}, families=DECODERS),
    "cache switch int4": Mode(
        {"cache": True, "mode": "switch", "quantise": "int4"}, families=DECODERS
    ),
    "cache load": Mode({"cache": True, "mode": "load"}, families=DECODERS),
    "cache batch": Mode({"cache": True, "mode": "batch"}, families=DECODERS),
    "optimised for cuda": Mode({"optimise": True, **FOR_CUDA}, families=FUSED),
    "float16 optimised for cuda": Mode(
        {"precision": "float16", "optimise": True, **FOR_CUDA}, families=FUSED
    ),
    "switch of optimised for cuda": Mode(
        {"mode": "switch", **FOR_CUDA}, "optimised for cuda", families=FUSED
    ),
    "switch of float16 optimised for cuda": Mode(
        {"mode": "switch", **FOR_CUDA}, "float16 optimised for cuda", families=FUSED
    ),
    "int4 float16 for cuda": Mode(
        {"quantise": "int4", "precision": "float16", **FOR_CUDA}, families=CODED
    ),
    "switch of int4 float16 for cuda": Mode(
        {"mode": "switch", **FOR_CUDA}, "int4 float16 for cuda", families=CODED
    ),
    "int8 for cuda": Mode({"precision": "int8", **FOR_CUDA}, families=INTEGER),
    "batch for cuda": Mode({"mode": "batch", **FOR_CUDA}),
    "cache batch for cuda": Mode({"cache": True, "mode": "batch", **FOR_CUDA}, families=DECODERS),
    "train for cuda": Mode({"mode": "train", **FOR_CUDA}, families=DECODERS),
    "cache merged for cuda": Mode({"cache": True, **FOR_CUDA}, families=DECODERS),
    "cache optimised for cuda": Mode(
        {"cache": True, "optimise": True, **FOR_CUDA}, families=DECODERS
    ),
    "cache float16 for cuda": Mode(
        {"cache": True, "precision": "float16", **FOR_CUDA}, families=DECODERS
    ),
    "cache switch for cuda": Mode({"cache": True, "mode": "switch", **FOR_CUDA}, families=DECODERS),
    "cache switch int4 for cuda": Mode(
        {"cache": True, "mode": "switch", "quantise": "int4", **FOR_CUDA}, families=DECODERS
    ),
    "cache load for cuda": Mode({"cache": True, "mode": "load", **FOR_CUDA}, families=DECODERS),
}
"""The ways of export. Files for CUDA are here where they differ from those for the CPU."""


@dataclass(frozen=True)
class Case:
    """One row of the table: a family of the zoo and a mode."""

    family: str
    mode: str

    def __str__(self) -> str:
        return f"{self.family}-{self.mode}"

    def export(self, folder: Path) -> Path:
        """Export the file into a folder, if it is not there, and return its path.

        Raises:
            LoraFxError: The model cannot be exported in this mode.
        """
        path = folder / f"{self}.onnx".replace(" ", "-")
        if path.exists():
            return path
        mode = MODES[self.mode]
        options = {"provider": "cpu", **mode.options}
        if mode.of_file:
            source = Case(self.family, mode.of_file).export(folder)
            lora_fx.export(source, path, **options)
            return path

        from tests.zoo.models import ZOO  # imports torch, which a list of cases does not need
        from tests.zoo.shared import captured

        include = ZOO[self.family].include
        model, _, _ = captured(self.family)
        if options.get("mode") == "batch":
            adapter = lora_fx.insert(model, rank=RANK, include=include).adapter()
            options["adapters"] = {"first": adapter, "second": adapter}
        elif "mode" in options:
            options["include"] = include
        lora_fx.export(model, path, **options)
        return path


CASES = tuple(
    Case(family, mode)
    for family in FAMILIES
    for mode, facts in MODES.items()
    if family in facts.families
    if not {mode, facts.of_file} & {crash for owner, crash in CRASHES if owner == family}
)
