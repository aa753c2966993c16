"""The folder of a sweep's runs: an adapter and its report for each, and what a later run skips."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.strict_json import read_json

if TYPE_CHECKING:
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.train.run_facts import Facts
    from lora_fx.fx.train.train_report import TrainReport
    from lora_fx.passes.verbs.sweep import BeforeTraining

FIELDS = ("losses", "before", "best_step", "stopped", "warnings")
"""The fields of a report that are stored under their names."""


@dataclass(frozen=True)
class SavedRuns:
    """A folder of finished runs: `NAME` is the adapter of a run, `NAME.json` its report and facts.

    The report is written when the adapter is whole, so a run without one is not finished.
    """

    folder: Path

    def check(self, names: Collection[str]) -> None:
        """Raise, before any work, for a folder that cannot be made or that holds anything else.

        Args:
            names: Those of the runs that it may hold.

        Raises:
            LoraFxError: Names what is there, or the folder that it would be in.
        """
        if not self.folder.exists():
            check_output(self.folder)
            return
        if not self.folder.is_dir():
            raise LoraFxError(f"{self.folder} already exists", "choose another folder")
        own = {name for run in names for name in (run, f"{run}.json")}
        others = sorted({path.name for path in self.folder.iterdir() if path.name[0] != "."} - own)
        if others:
            raise LoraFxError(
                f"{self.folder} holds {others[0]}, which is no run of this sweep",
                "choose another folder",
            )

    def path(self, name: str) -> str:
        """Return the path of the adapter of a run."""
        return str(self.folder / name)

    def save(self, name: str, module: AdaptedModule, report: TrainReport, facts: Facts) -> None:
        """Write the adapter of a finished run, and then its report.

        Raises:
            LoraFxError: As for save_adapter.
        """
        from lora_fx.formats.io import save_adapter

        self.folder.mkdir(exist_ok=True)
        note(*save_adapter(module.adapter(), self.path(name), force=True))
        words: dict[str, Any] = {**stamp(), "facts": facts}
        words |= {field: getattr(report, field) for field in FIELDS}
        words["validation"] = {str(step): loss for step, loss in report.validation.items()}
        with replacing(self.path(f"{name}.json"), force=True) as temporary:
            temporary.write_text(json.dumps(words) + "\n", encoding="utf-8")

    def report(self, name: str, facts: Facts, start: BeforeTraining) -> TrainReport | None:
        """Return the report of a run that is finished, None if it is not.

        Args:
            name: The run.
            facts: What it has to share.
            start: What it has to compute before its first step.

        Raises:
            LoraFxError: The run in the folder has another model, other data or other settings, or
                its file is damaged.
        """
        from lora_fx.fx.train.run_facts import differences
        from lora_fx.fx.train.train_report import TrainReport

        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        words = read_json(path, hint="remove it to train this run again")
        check_format(words, str(path))
        lines = differences(words.get("facts") or {}, facts)
        if lines:
            raise _is_another(path, lines[0])
        try:
            validation = {int(step): float(loss) for step, loss in words["validation"].items()}
            fields = {field: words[field] for field in FIELDS}
            fields["before"] = None if words["before"] is None else float(words["before"])
            report = TrainReport(validation=validation, **fields)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoraFxError(
                f"{path}: damaged: {error!r}", "remove it to train this run again"
            ) from error
        if line := start.difference(report.before):
            raise _is_another(path, line)
        return report


def _is_another(path: Path, line: str) -> LoraFxError:
    """Return the error of a saved run that differs from the one of this name."""
    return LoraFxError(f"{path} is of another run: {line}", "choose another folder for these runs")
