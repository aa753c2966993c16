"""The tokenizer of a Hugging Face folder, loaded offline and without running its code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.data import Tokenizer
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.load.config_gate import check_tokenizer_config
from lora_fx.fx.load.sealed_libraries import sealed_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from lora_fx.fx.load.huggingface import quiet_transformers


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's own tokenizer; nothing is downloaded, and no code of the folder is run.

    Raises:
        LoraFxError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    check_tokenizer_config(folder)
    what = f"{folder}: reading its tokenizer"
    try:
        with quiet_transformers(), sealed_libraries(what, folder):
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except LoraFxError:
        raise
    except Exception as e:  # tokenizers raise whatever their files make them raise
        raise LoraFxError(
            f"{folder}: its tokenizer cannot be read: {one_line(f'{type(e).__name__}: {e}', 200)}",
            "copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from e


def tokenizer_of(folder: Path, max_length: int) -> Tokenizer:
    """A folder's own tokenizer, padding to the longest text; nothing is downloaded."""
    tokenizer = read_tokenizer(folder)

    def run(texts: list[str]) -> dict[str, Array]:
        encoded = tokenizer(
            texts, truncation=True, max_length=max_length, padding=True, return_tensors="np"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}

    return run
