"""The page of `train --report` while the training goes on, and after it has stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.result_page import RunSoFar, page_of_command
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.train.settings import Watch
    from lora_fx.fx.train.train_report import TrainReport


class RunCommand(ReportCommand):
    """A command with --resume, which replaces the page of the run that it resumes."""

    def may_replace_page(self, params: JsonView) -> bool:
        """Whether the page may go: with --force, or if it is of the state that is resumed."""
        if super().may_replace_page(params):
            return True
        return is_page_of_state(params["report"], params.get("resume"))


def page_of_run(module: AdaptedModule) -> Watch | None:
    """Return what writes the page of --report at each validation; None without --report.

    Args:
        module: What is trained.
    """
    from lora_fx.fx.train.state_folder import run_digest

    page_file = page_of_command()
    if page_file is None:
        return None
    targets = module.report().to_json()

    def watch(report: TrainReport, steps: int, facts: JsonView) -> None:
        digest = run_digest(facts) if facts else None
        page_file.write_running(RunSoFar(targets, report, steps, digest))

    return watch


def is_page_of_state(page: str, state: str | None) -> bool:
    """Whether a page is that of a stopped training, whose saved state this is.

    A page of a finished training is its result, which is kept. A training without states leaves
    no digest on its page.

    Args:
        page: The path of a page.
        state: The folder of --resume; None without the option.
    """
    if state is None or not Path(page).is_file():
        return False
    from lora_fx.fx.train.state_folder import run_of_state
    from lora_fx.report.page import data_of_page

    added = data_of_page(Path(page).read_text("utf-8", "replace")).get("page")
    run = added.get("run") if isinstance(added, dict) else None
    digest = run.get("digest") if isinstance(run, dict) else None
    return digest is not None and digest == run_of_state(state)
