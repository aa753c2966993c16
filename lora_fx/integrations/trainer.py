"""A callback of Hugging Face's Trainer that exports and verifies what was trained.

It works in every subclass of Trainer, those of TRL among them.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, expect, expect_path, type_of
from lora_fx.files.atomic import check_output
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.fx.attach.attachment import is_attached
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.inputs import Named
from lora_fx.onnx.made_for import CPU
from lora_fx.passes.verbs.attach import detach
from lora_fx.passes.verbs.export import export
from lora_fx.passes.verbs.export_files import ONLY
from lora_fx.passes.verbs.export_options import adapter_ending, expect_ending, expect_mode
from lora_fx.passes.verbs.modes import options_of_mode
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.verify import verify
from lora_fx.text import StrPath, near


class ExportAtEnd(TrainerCallback):  # type: ignore[misc]
    """Write an ONNX file when training ends, and compare the file with the trained model.

    The model is what insert returned, one that attach changed, or a PeftModel. Of an attached model
    and of a PeftModel a copy is exported, so the model that was trained stays as it is.

    Attributes:
        exported: The report of the export; None before the end of training.
        verified: The report of the verification; None before it.
    """

    def __init__(
        self,
        path: StrPath,
        args: Sequence[object] = (),
        kwargs: Named | None = None,
        *,
        adapter: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Prepare the export.

        Args:
            path: The file to write.
            args: Example inputs; none are needed for a model that insert returned.
            kwargs: Example inputs by keyword.
            adapter: A folder to write the adapter to as well, before anything is exported.
            options: Of lora_fx.export: mode, target, dynamic, force …

        Raises:
            LoraFxError: No path of an .onnx or .pt2 file, an unknown mode, or no such option.
        """
        expect_path(path, "path", "call ExportAtEnd(path, (x,))")
        expect_ending(path)
        expect(args, (tuple, list), "args", "a tuple", "call ExportAtEnd(path, (x,))")
        known_options = inspect.signature(export).parameters
        for name in options:
            if name not in known_options:
                raise LoraFxError(
                    f"lora_fx.export has no argument {name!r}", near(name, known_options)
                )
        self.mode, _ = options_of_mode(options.get("mode", "merged"), {})
        expect_mode(self.mode)
        self.path = Path(path)
        self.args = args
        self.kwargs = kwargs
        self.adapter = adapter
        self.options = options
        self.exported: Report | None = None
        self.verified: Report | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse before training what could not be exported after it.

        Raises:
            LoraFxError: An output exists, the model holds no adapter, or it needs example inputs.
        """
        model = kwargs["model"]
        _check_holds_adapter(model)
        if not isinstance(model, AdaptedModule) and not self.args and not self.kwargs:
            raise LoraFxError(
                f"example inputs of the {type(model).__name__} are missing, with which it is "
                "captured at the end",
                "pass them to ExportAtEnd: ExportAtEnd(path, (x,)), or kwargs={'input_ids': ids}",
            )
        for output in self._outputs():
            check_output(output, force=self._force)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write and verify; every process takes part in gathering the adapter, and one writes.

        Raises:
            LoraFxError: The model cannot be exported, or the file differs.
        """
        model = kwargs["model"]
        adapter = _adapter_of(model)
        if not state.is_world_process_zero:
            return
        if self.adapter is not None:
            save_adapter(adapter, self.adapter, force=self._force)
        self._export(model, adapter)

    def _outputs(self) -> list[Path]:
        """Return every file and folder that is written at the end."""
        outputs = [self.path]
        if self.adapter is not None:
            outputs.append(Path(self.adapter))
        if self.mode in ("switch", "load"):
            ending = adapter_ending(self.path, self.options.get("target", CPU))
            outputs.append(self.path.with_name(f"{ONLY}{ending}"))
        return outputs

    @property
    def _force(self) -> bool:
        """Whether existing outputs are replaced."""
        return bool(self.options.get("force"))

    def _export(self, model: nn.Module, adapter: Adapter) -> None:
        """Export the model and compare the file with it."""
        options = dict(self.options)
        merged = self.mode == "merged"
        source: object = model
        if not isinstance(model, AdaptedModule):
            device = next(model.parameters()).device
            args = [_on(device, value) for value in self.args]
            kwargs = {name: _on(device, value) for name, value in (self.kwargs or {}).items()}
            base = _without_adapter(model).eval()
            source = capture(base, args, kwargs, dynamic=options.pop("dynamic", None))
            options["adapters"] = adapter
        elif not merged:
            options["adapters"] = adapter
        self.exported = export(source, self.path, **options)

        if not merged:  # the base and the adapter, on the input that the file holds
            self.verified = verify(self.path)
        elif source is model:
            self.verified = verify(self.path, source)
        else:
            self.verified = verify(self.path, source, adapter=adapter)
        if not self.verified:
            raise LoraFxError(
                f"{self.path}: the file does not compute what was trained: {self.verified}",
                "keep the adapter, and report this with the file",
            )
        text = str(self.verified).splitlines()[0]
        if self.verified.parity:
            largest = max(row.rel for row in self.verified.parity)
            text = f"{text}, within {largest:.1e} of the trained model"
        print(f"{self.path}: exported; {text}")


def _on(device: torch.device, value: object) -> object:
    """Return a tensor on the device; other values as they are."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _is_of_peft(model: nn.Module) -> bool:
    """Whether this is a PeftModel, found without an import of PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "unload")


def _holds_ours(model: nn.Module) -> bool:
    """Whether insert returned the model, or attach changed it."""
    return isinstance(model, AdaptedModule) or is_attached(model)


def _check_holds_adapter(model: nn.Module) -> None:
    """Raise for a model that holds no adapter."""
    if not _holds_ours(model) and not _is_of_peft(model):
        raise LoraFxError(
            f"{type_of(model)} holds no adapter of lora-fx or PEFT",
            "pass Trainer a model that lora_fx.insert or lora_fx.attach returned, or a PeftModel",
        )


def _adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter that was trained."""
    if _holds_ours(model):
        adapter: Adapter = cast(Any, model).adapter()
        return adapter
    with tempfile.TemporaryDirectory() as folder:
        cast(Any, model).save_pretrained(folder)
        return load_adapter(folder)


def _without_adapter(model: nn.Module) -> nn.Module:
    """Return a copy of an attached model or of a PeftModel, as it was before the adapter."""
    copied = copy.deepcopy(model)
    base = copied
    if is_attached(model):
        detach(copied)
    else:
        base = cast(Any, copied).unload()
    # TRL (1.16, trainer/utils.py) and accelerate put a forward of their own on the object, which
    # calls the method of the model that was copied.
    base.__dict__.pop("forward", None)
    return base
