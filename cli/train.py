"""lora-fx train: insert, train on a data file, keep the best, save only the adapter."""

from __future__ import annotations

from dataclasses import replace

import click

from lora_fx.cli.branch_options import PLANNED, TargetOptions
from lora_fx.cli.data_arguments import loss_of, tables_of
from lora_fx.cli.interrupted_state import stateful
from lora_fx.cli.invocation_option import check_examples, invocation_of
from lora_fx.cli.model_argument import (
    captured,
    is_causal_folder,
    module_with_adapter,
    trace_example,
)
from lora_fx.cli.model_options import PROGRAM, ModelOptions
from lora_fx.cli.model_page import show_data
from lora_fx.cli.options import force_option, option_group, output_option
from lora_fx.cli.output import emit, note, say
from lora_fx.cli.parallel_run import together
from lora_fx.cli.run_page import RunCommand, page_of_run
from lora_fx.cli.step_lines import StepLines
from lora_fx.cli.train_options import TRAINED, ExampleOptions, defaults_taken, with_checks
from lora_fx.cli.train_sweep import (
    OF_A_SWEEP,
    SweepJob,
    SweepOptions,
    check_runs,
    planned_runs,
    rows_of_start,
    start_options,
)
from lora_fx.errors import expect_name
from lora_fx.run_defaults import CAUSAL, OTHERS


@click.command("train", cls=RunCommand, no_say=(*PLANNED, *TRAINED, *OF_A_SWEEP, *PROGRAM))
@click.argument("model")
@click.argument("data")
@output_option("ADAPTER", "Write an adapter folder or a .safetensors file.")
@option_group("examples", ExampleOptions)
@option_group("loop", SweepOptions)
@option_group("targets", TargetOptions)
@option_group("capture", ModelOptions)
@force_option
def command(
    model: str,
    data: str,
    output: str,
    examples: ExampleOptions,
    loop: SweepOptions,
    targets: TargetOptions,
    capture: ModelOptions,
    force: bool,
) -> None:
    r"""Insert branches into MODEL, train them on DATA, and save only the adapter.

    DATA is an .npz or .jsonl file whose keys are the arguments of the model, a .csv file (see
    --label), or file.py:loader, a function without arguments that returns columns by name. The
    tokenizer in the folder of the model encodes columns of text. For a causal language model DATA
    is a .jsonl file with "text", with "prompt" and "completion", or with "messages".

    A tenth of DATA is held out for validation. The adapter with the best validation loss is saved;
    with --sweep or --seeds, which train several over one base, it is the best one of all.

    \b
    lora-fx train ./my-bert reviews.csv --label stars -o adapter --also-train classifier
    lora-fx train model.py:build data.npz -o adapter --rank 16 --steps 500
    lora-fx train ./my-llama chat.jsonl -o adapter --eval-data held-out.jsonl --lr 2e-4
    lora-fx train model.py:build data.npz -o best --sweep rank=4,8,16 --sweep lr=1e-4,3e-4 --seeds 4
    """
    runs = planned_runs(loop, targets, examples)  # before torch, which takes seconds

    from lora_fx.files.atomic import check_output
    from lora_fx.files.run_files import inputs_are_in_memory
    from lora_fx.formats.io import FORMATS, check_real, save_adapter
    from lora_fx.fx.device_memory import check_move
    from lora_fx.fx.load.models import check_device
    from lora_fx.fx.pt2.captured import FileCaptured
    from lora_fx.fx.train.labelled_example import label_example
    from lora_fx.fx.train.loop import fit
    from lora_fx.fx.train.state_folder import last_state
    from lora_fx.passes.proofs.recorded_capture import prove_as_it_is
    from lora_fx.passes.verbs.adapt import insert_into
    from lora_fx.passes.verbs.probe_adapter import add_to_adapter
    from lora_fx.probe.probe import KINDS

    expect_name(loop.probe, KINDS, "unknown probe", "use full, short or none")
    with together(loop.device) as (world, device):
        check_output(output, force=force, names=FORMATS.default.folder_files)
        check_device(device)
        examples.check(loop.patience)
        loop.settings(targets.seed)  # which refuses a name that is not known, before any work
        check_runs(runs, world.size)
        saving = loop.saving(force=force)
        if saving.resume:
            last_state(saving.resume)  # which refuses a folder that is none
        cap = captured(model, capture, later=True)
        defaults = OTHERS
        if is_causal_folder(model, cap):
            defaults = CAUSAL
            note(*defaults_taken(examples, loop))
        split_seed = targets.seed if examples.split_seed is None else examples.split_seed
        training, validation = tables_of(data, cap, examples, split_seed, defaults)
        show_data(data, training, validation)
        loss = loss_of(examples.loss)
        if not isinstance(cap, FileCaptured):
            label_example(cap, training, loss)
        trace_example(cap)
        tokens = invocation_of(targets.invocation, cap)
        if runs:
            job = SweepJob(cap, training, validation, loss, defaults, targets, device, tokens)
            finished = job.run(runs, loop)
            module, report = finished.best_run()
            check_examples(training, module)
        else:
            settings = loop.settings(targets.seed, defaults)
            settings, notes = with_checks(settings, loop, defaults, training, len(validation))
            note(*notes)
            if cap.adapter is not None:
                module = module_with_adapter(cap)
            else:
                rows = rows_of_start(settings, world.size)
                options = start_options(targets, training, loss, rows, tokens)
                module = insert_into(cap, options, targets.quantise)
            check_examples(training, module)
            check_real(module.updates)  # before the training, and not at the file after it
            check_move(module, check_device(device))
            module = module.to(device)
            if loop.activation_checkpointing:
                module.activation_checkpointing_enable()

            inputs_are_in_memory()
            lines = StepLines(say)
            saving = replace(saving, watch=page_of_run(module))
            with stateful(saving):
                report = fit(
                    module, training, validation, loss, settings, lines, saving=saving, world=world
                )
        if not world.first:
            return
        note(*report.warnings, *prove_as_it_is(module), warns=True)
        note(*save_adapter(module.adapter(), output, force=force))
        of_probe, notes_on_probe = add_to_adapter(output, module, loop.probe)
        note(*notes_on_probe)
        outputs = [output]
        if loop.curve:
            outputs.append(loop.curve)
        if loop.save_runs:
            outputs.append(loop.save_runs)
        made = module.report()
        counts = {"training": len(training), "validation": len(validation)}
        fields = {"inputs": cap.inputs.to_json(), "outputs": outputs, **made.to_json()}
        fields |= {"examples": counts, **report.to_json(), **of_probe}
        said = f"{made}\n{report}\nwrote {' and '.join(outputs)}"
        if runs:
            fields |= finished.to_json()
            said = f"{finished.table()}\n{said}"
        emit(said, warnings=made.notes, **fields)
