"""What lora-fx train has beside its own file: the options of the loop, states, processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.common import Terminated
from lora_fx.cli.options import FROM_1, combined, first_given
from lora_fx.cli.output import note, say
from lora_fx.errors import LoraFxError
from lora_fx.text import Json

if TYPE_CHECKING:
    from lora_fx.fx.train.processes import Processes
    from lora_fx.fx.train.state import Saving, Settings

ABOVE_0 = click.FloatRange(min=0, min_open=True)
FROM_0 = click.FloatRange(min=0)
SHARE = click.FloatRange(min=0, max=1, max_open=True)


class OfLaunch(click.Option):
    """An option that `accelerate launch` always gives, by its environment: a config wins."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Nothing where the table of --config has the option."""
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


loop_options = combined(
    [
        click.option("--epochs", type=ABOVE_0, default=3.0, help="Passes over DATA."),
        click.option("--steps", type=FROM_1, metavar="N", help="Steps, instead of epochs."),
        click.option("--batch-size", type=FROM_1, default=32, help="Examples a step."),
        click.option("--lr", type=ABOVE_0, default=1e-3, help="Peak learning rate."),
        click.option(
            "--schedule",
            default="cosine",
            metavar="NAME",
            help="Of the rate: cosine, linear, constant, constant_with_warmup or inverse_sqrt.",
        ),
        click.option(
            "--optimizer",
            default="adamw_torch",
            metavar="NAME",
            help="adamw_torch, adamw_torch_fused, sgd, rmsprop or adagrad.",
        ),
        click.option("--weight-decay", type=FROM_0, default=0.01, help="Of AdamW, times the rate."),
        click.option("--warmup", type=SHARE, default=0.05, help="Share of the steps that warm up."),
        click.option(
            "--clip", type=FROM_0, default=1.0, help="Longest gradient (norm); 0 for any."
        ),
        click.option("--checks", type=FROM_1, default=10, help="Validations in the run."),
        click.option(
            "--patience", type=FROM_1, metavar="N", help="Validations in vain that end the run."
        ),
        click.option(
            "--accumulate",
            type=FROM_1,
            default=1,
            metavar="N",
            cls=OfLaunch,
            envvar="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            help="Parts that a step runs in, one after another, to save memory.",
        ),
        click.option(
            "--gradient-accumulation-steps",
            type=FROM_1,
            default=1,
            metavar="N",
            help="Batches of --batch-size that make one step.",
        ),
        click.option(
            "--activation-checkpointing", is_flag=True, help="Recompute blocks in backward."
        ),
        click.option(
            "--mixed-precision",
            type=click.Choice(["no", "bf16"]),
            default="no",
            cls=OfLaunch,
            envvar="ACCELERATE_MIXED_PRECISION",
            help="bf16: products in bfloat16; what is trained stays float32.",
        ),
        click.option("--save-state", metavar="DIR", help="Keep a state there to --resume from."),
        click.option(
            "--save-every",
            type=FROM_1,
            metavar="N",
            help="Steps between two states.  [default: one at every validation]",
        ),
        click.option(
            "--save-total-limit",
            type=FROM_1,
            metavar="N",
            help="Keep the last N states, as DIR/checkpoint-STEP.  [default: the last, as DIR]",
        ),
        click.option(
            "--resume", metavar="DIR", help="Go on from a state; it is kept current there."
        ),
    ]
)
"""Options of the loop, and those of its states."""


def settings_of(options: Json) -> Settings:
    """Takes the loop's settings out of a command's options.

    Batches that are accumulated are one larger batch that runs in as many more parts.
    """
    from lora_fx.fx.train.state import Settings

    if options["schedule"] == "constant" and first_given("warmup"):
        raise LoraFxError(
            "--warmup has no say for --schedule constant", "--schedule constant_with_warmup has one"
        )
    batches = options.pop("gradient_accumulation_steps")
    options |= {name: batches * options[name] for name in ("batch_size", "accumulate")}
    names = [f.name for f in fields(Settings) if f.name != "seed"]  # which insert takes too
    return Settings(seed=options["seed"], **{name: options.pop(name) for name in names})


def saving_of(options: Json, curve: str | None, force: bool) -> Saving:
    """Takes what says where states are out of a command's options; checks what is written."""
    from lora_fx.files.atomic import check_output
    from lora_fx.fx.train.state import Saving, check_folder

    every, limit, resume = (options.pop(n) for n in ("save_every", "save_total_limit", "resume"))
    folder = options.pop("save_state") or resume
    if curve:
        check_output(curve, force=force)
    if (every or limit) and not folder:
        option = "--save-every" if every else "--save-total-limit"
        raise LoraFxError(f"{option}, but no state is kept", "--save-state DIR")
    if folder:
        again = resume is not None and Path(folder).resolve() == Path(resume).resolve()
        check_folder(folder, force=force or again, own=again, limit=limit)
    return Saving(folder, every, resume, limit)


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes of the run, of which the first alone prints; a place for each on `device`.

    Yields (Processes, device). A process that ends because another one failed says nothing.
    """
    from lora_fx.fx.train.processes import Elsewhere, one_by_accelerate, processes

    try:
        with processes(device.startswith("cuda")) as world:
            if not world.first:
                click.get_current_context().find_root().obj["quiet"] = True
            if world.size > 1:
                note(f"{world.size} processes: each takes a share of every batch")
                device = f"cuda:{world.local}" if device == "cuda" else device
            elif one_by_accelerate():
                note(
                    "accelerate launch --cpu started one process: it starts several by MPI alone "
                    "(--mpirun_hostfile); --multi_gpu or torchrun starts them"
                )
            try:
                yield world, device
            except KeyboardInterrupt as stop:  # which came to all of them
                if world.first:
                    raise
                raise click.exceptions.Exit(143 if isinstance(stop, Terminated) else 130) from None
    except Elsewhere as e:
        raise click.exceptions.Exit(e.exit_code) from None


@contextlib.contextmanager
def stateful(saving: Saving) -> Iterator[None]:
    """What is stopped in this block says which state it leaves."""
    from lora_fx.fx.train.state import step_of

    before = None if saving.resume else _written(saving.folder)
    try:
        yield
    except (KeyboardInterrupt, LoraFxError) as stop:
        folder = saving.folder if _written(saving.folder) != before else None
        step = step_of(folder) if folder else None
        said = f"{folder} holds the state of step {step}"
        if step is not None and isinstance(stop, KeyboardInterrupt):
            stop.left = f"{said}: --resume {folder} goes on from there"  # type: ignore[attr-defined]
        elif step is not None and not saving.resume:
            say(said)
        raise


def _written(folder: str | None) -> tuple[int, int] | None:
    """Tells one state from the next; None where there is none."""
    path = Path(folder or "")
    return (path.stat().st_ino, path.stat().st_mtime_ns) if folder and path.is_dir() else None
