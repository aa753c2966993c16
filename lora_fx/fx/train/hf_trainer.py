"""Checkpoints of Hugging Face's Trainer that hold the adapter, as those of PEFT do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.errors import LoraFxError, type_of
from lora_fx.formats.io import load_adapter
from lora_fx.formats.peft import file as peft

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments


class AdapterCheckpoints:
    """A mixin for Trainer and its subclasses: `class Mine(AdapterCheckpoints, Trainer)`.

    The model is what insert returned, or one that attach changed. Every checkpoint is an adapter
    folder in PEFT's format beside Trainer's own files, and resuming and `load_best_model_at_end`
    read it. (Trainer itself writes the state dict, frozen tensors and all, and fails where two of
    them share their storage, as tied embeddings do.)
    """

    accelerator: Accelerator
    args: TrainingArguments
    model: nn.Module
    processing_class: PreTrainedTokenizerBase | None
    state: TrainerState

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        adapter = self._adapted().adapter()  # gathers what is sharded: every process takes part
        if not self.args.should_save:
            return
        peft.write(adapter, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        adapted = self._adapted(model)
        before = [id(p) for p in adapted.parameters()]
        adapted.load_adapter(load_adapter(resume_from_checkpoint))
        if [id(p) for p in adapted.parameters()] != before:
            raise LoraFxError(
                f"{resume_from_checkpoint} holds other targets or ranks than the model, whose "
                "tensors the optimizer already has",
                "make the model with insert(…, adapter=load_adapter(checkpoint)) before you make "
                "the Trainer",
            )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _adapted(self, model: nn.Module | None = None) -> Any:
        found = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        if not hasattr(found, "load_adapter") or not hasattr(found, "report"):
            raise LoraFxError(
                f"{type_of(found)} holds no adapter of lora-fx",
                "pass Trainer a model that lora_fx.insert or lora_fx.attach returned",
            )
        return found
