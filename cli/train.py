"""lora-fx train: insert, train on a data file, keep the best, save only the adapter."""

from __future__ import annotations

import math
from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note, say


@click.command(
    "train", cls=ReportCommand, no_say=(*shared.PLANNED, *shared.TRAINED, *shared.PROGRAM)
)
@click.argument("model")
@click.argument("data")
@shared.output_option("ADAPTER", "Folder or .safetensors.")
@shared.label_option("Column to predict.")
@click.option("--loss", default="ce", help="ce, mse or module:function.")
@click.option("--validation", type=float, default=0.1, help="Share held out.")
@shared.text_option("--eval-data", "FILE", "Held-out examples, instead of a share of DATA.")
@shared.max_length_option
@shared.text_option("--curve", "FILE.csv", "Write the losses: step, loss, validation.")
@click.option("--device", default="cpu", help="cpu or cuda.")
@shared.loop_options
@shared.target_options
@shared.model_options
@shared.force_option
def command(model: str, data: str, output: str, force: bool, **options: Any) -> None:
    r"""Insert branches into MODEL, train them on DATA, and save only the adapter.

    DATA is .npz or .jsonl (keys are the model's argument names), .csv with --label, or
    file.py:loader (no arguments; returns columns by name). Columns of text go through the model
    folder's tokenizer. For the folder of a causal language model DATA is .jsonl with "text",
    "prompt" and "completion", or "messages". A tenth is held out, and the adapter with the best
    validation loss is kept.

    \b
    lora-fx train ./my-bert reviews.csv --label stars -o adapter --also-train classifier
    lora-fx train model.py:build data.npz -o adapter --rank 16 --steps 500
    lora-fx train ./my-llama chat.jsonl -o adapter --eval-data held-out.jsonl --lr 2e-4
    """
    from lora_fx.adapter.variant import OF_DATA
    from lora_fx.files.atomic import check_output, replacing
    from lora_fx.files.read import inputs_are_in_memory
    from lora_fx.formats.io import FORMATS, check_real, save_adapter
    from lora_fx.fx.load.models import check_device
    from lora_fx.fx.train.loop import fit
    from lora_fx.passes.proofs.recorded import prove_as_it_is
    from lora_fx.passes.verbs.adapt import insert

    with shared.together(options.pop("device")) as (world, device):
        check_output(output, force=force, names=FORMATS.default.folder_files)
        check_device(device)
        curve = options.pop("curve")
        settings, saving = shared.settings_of(options), shared.saving_of(options, curve, force)
        loaded, cap = shared.captured(model, options)
        training, validation = shared.tables_of(data, loaded, cap, options)
        loss = shared.loss_of(options.pop("loss"))
        chosen = shared.only_given(options)
        if options["init"] in OF_DATA:
            size = math.ceil(settings.batch_size / (settings.accumulate * world.size))
            batches = shared.batches_of(training, rows=min(shared.BATCH, size))
            chosen |= {"data": batches}
        if options["init"] == "lora-ga":
            chosen |= {"loss": loss}
        recompute = options["activation_checkpointing"]
        chosen.pop("activation_checkpointing", None)
        module = shared.held(cap) if cap.adapter is not None else insert(cap, **chosen)
        check_real(module.updates)  # before the training, and not at the file after it
        module = module.to(device)
        if recompute:
            module.activation_checkpointing_enable()

        inputs_are_in_memory()

        def progress(step: int, steps: int, value: float) -> None:
            if step == steps or step % max(1, steps // 10) == 0:
                say(f"step {step}/{steps}: loss {value:.4f}")

        with shared.stateful(saving):
            report = fit(
                module, training, validation, loss, settings, progress, saving=saving, world=world
            )
        if not world.first:
            return
        note(*report.warnings, *prove_as_it_is(module), warns=True)
        note(*save_adapter(module.adapter(), output, force=force))
        outputs = [output, curve] if curve else [output]
        if curve:
            with replacing(curve, force=force) as temporary:
                temporary.write_text(report.to_csv(), encoding="utf-8")
        made = module.report()
        examples = {"training": len(training), "validation": len(validation)}
        fields = {"inputs": cap.inputs.to_json(), "outputs": outputs, **made.to_json()}
        fields |= {"examples": examples, **report.to_json()}
        said = f"{made}\n{report}\nwrote {' and '.join(outputs)}"
        emit(said, warnings=made.notes, **fields)
