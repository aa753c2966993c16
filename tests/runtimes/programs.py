"""A .pt2 file in a runtime that compiles it: the sample, every size and adapter, and a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lora_fx
from tests.runtimes import environments, models, switch_files
from tests.runtimes.consumers import Row

MEASURE = Path(__file__).parent / "in_programs.py"
LARGEST = {
    "text": {"batch": 4, "length": 40, "rank": 16},
    "vision": {"batch": 32, "rank": 16},
    "decoder": {"batch": 4, "past": 64, "length": 16, "rank": 16},
}
"""The largest sizes of each model, for runtimes that plan memory."""


@dataclass(frozen=True)
class Runtime:
    """A runtime of the table.

    Attributes:
        name: What the table calls it.
        environment: The name of its environment.
        package: The package whose pinned version the table shows.
        suffix: That of a compiled file.
    """

    name: str
    environment: str
    package: str
    suffix: str

    @property
    def sample(self) -> Path:
        """The program that a reader copies."""
        return environments.ROOT / "samples" / "runtimes" / f"{self.environment}_switch.py"

    @property
    def version(self) -> str:
        """The version that the requirements pin."""
        pinned = environments.requirements_of(self.environment).splitlines()
        versions = dict(line.split("==") for line in pinned)
        return versions[self.package]


@dataclass(frozen=True)
class Program:
    """An exported model of the table, and where it is compiled to."""

    subject: models.Subject
    folder: Path
    runtime: Runtime

    @property
    def compiled(self) -> Path:
        """The compiled file."""
        return self.folder / f"{self.subject.name}{self.runtime.suffix}"

    def run_sample(self, size: int = 0) -> None:
        """Run the sample at one of the sizes; compare the base and both adapters."""
        name = self.subject.name
        arrays = switch_files.stored(self.folder, name)[size]
        inputs, outputs = self.folder / "inputs.npz", self.folder / "outputs.npz"
        np.savez(inputs, **{key.replace(".", "_"): array for key, array in arrays["in"].items()})
        kinds = ("base", "a", "b")
        environments.run_in(
            self.runtime.environment, self.runtime.sample, self.folder / f"{name}.pt2",
            self.compiled, inputs, outputs,
            *[self.folder / f"{name}.{kind}.safetensors" for kind in kinds],
        )  # fmt: skip
        with np.load(outputs) as ours:
            for kind in kinds:
                for number, expected in enumerate(arrays[kind].values()):
                    array = ours[f"{name}.{kind}/{number}"]
                    assert switch_files.worst({"": array}, {"": expected}) <= models.GATE, kind

    def measured(self) -> dict[str, Any]:
        """What in_programs.py prints, in a process that only loads the compiled file."""
        table = ":".join(map(str, self.subject.table or ()))
        printed = environments.run_in(
            self.runtime.environment, MEASURE, self.runtime.sample, self.compiled, self.folder,
            self.subject.name, table,
        )  # fmt: skip
        return json.loads(printed)

    def row(self, result: dict[str, Any], swap: str, **cells: Any) -> Row:
        """The row of the table."""
        errors = result["errors"]

        def equal(kind: str) -> bool:
            return errors[f"0/{kind}"] <= models.GATE

        expected = {f"{i}/{k}" for i in range(len(self.subject.sizes)) for k in ("base", "a", "b")}
        assert {*errors} == expected
        return Row(
            runtime=self.runtime.name, version=self.runtime.version, file="pt2", mode="switch",
            model=self.subject.name, loads=True, base=equal("base"), adapter_a=equal("a"),
            adapter_b=equal("b"), swap=swap,
            ids_out_of_range=result.get("out_of_range", "no ids"),
            figures={**result["figures"], "error": errors["0/b"]}, **cells,
        )  # fmt: skip


def exported(name: str, folder: Path, runtime: Runtime, mode: lora_fx.Switch) -> Program:
    """Export a model of the table, with its adapters and what torch gives, into a folder."""
    environments.environment(runtime.environment)
    subject = models.SUBJECTS[name]()
    switch_files.write(
        folder, name, subject.model, subject.adapters, subject.sizes, subject.outputs,
        suffix=".pt2", mode=mode, args=subject.args, kwargs=subject.kwargs or None,
        **subject.options,
    )  # fmt: skip
    return Program(subject, folder, runtime)
