"""One label a row, and whether a model of transformers has a head that predicts one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.load.unnamed_class import PLAIN, SEQUENCE, class_names
from lora_fx.text import some

ROW_HEADS = (
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "TIME_SERIES_CLASSIFICATION", "AUDIO_XVECTOR", "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
)  # fmt: skip
"""Tables of transformers whose classes score a row."""
OTHER_HEADS = {
    "CAUSAL_LM": "scores the next token at every token",
    "MASKED_LM": "scores the vocabulary at every token",
    "SEQ_TO_SEQ_CAUSAL_LM": "scores the next token of a second text",
    "SPEECH_SEQ_2_SEQ": "scores the next token of a text",
    "IMAGE_TEXT_TO_TEXT": "scores the next token at every token",
    "CTC": "scores the vocabulary at every step of the sound",
    "TOKEN_CLASSIFICATION": "scores classes at every token",
    "QUESTION_ANSWERING": "scores where an answer begins and ends",
    "SEMANTIC_SEGMENTATION": "scores classes at every pixel",
    "PRETRAINING": "has the heads of its pretraining",
}
"""Tables of the other heads, and what their classes do."""
POSITIONS = "QUESTION_ANSWERING"
"""The one among them for which a number a row has a meaning: a token's place."""


def refuse_row_labels(table: Table, module: nn.Module, path: str, folder: Path | None) -> None:
    """Raise where a column has one label a row, and the model's class scores something else.

    Args:
        table: The examples.
        module: The model; only classes of transformers are judged.
        path: The file that the table was read from.
        folder: The model's, if it has one.

    Raises:
        LoraFxError: Names the column, some of its labels, the class, and what it does.
    """
    labels = table.columns.get(table.label)
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return
    name = type(module).__name__
    classes = class_names(transformers, module.config.model_type)
    task = _task(classes, name)
    if task is None or (task == POSITIONS and not table.words):
        return
    does = OTHER_HEADS.get(task, "has no head")
    # T5's classifier, say, needs ends of texts, which a folder of another head's may not write
    classifiers = () if module.config.is_encoder_decoder else classes.get(SEQUENCE, ())
    words = [repr(word) for word in table.words] or sorted({str(label) for label in labels})
    raise LoraFxError(
        f"{path}: {table.label!r} has one label a row ({some(words, 3)}), and {name} {does}: "
        "--label is for models with a classification head",
        _way_on(task, classifiers, folder),
    )


def _task(classes: Mapping[str, Sequence[str]], name: str) -> str | None:
    """The task of a class; empty for a plain model, None for one that may score rows."""

    def is_among(task: str) -> bool:
        return name in classes.get(f"MODEL_FOR_{task}_MAPPING_NAMES", ())

    if any(map(is_among, ROW_HEADS)):
        return None
    for task in OTHER_HEADS:
        if is_among(task):
            return task
    return "" if name in classes.get(PLAIN, ()) else None


def _way_on(task: str, classifiers: Sequence[str], folder: Path | None) -> str:
    """The hint: data for what the model does, or a head for the data."""
    hints = []
    if task == "CAUSAL_LM":
        hints.append('leave --label out, and give .jsonl with "text", or "prompt" and "completion"')
    if classifiers and folder is not None:
        architecture = f'"architectures": ["{classifiers[0]}"]'
        hints.append(f"{architecture} in {folder}/config.json gives it such a head")
    if not hints:
        hints.append("give a model with a classification head, or --loss file.py:FUNCTION")
    return "; or ".join(hints)
