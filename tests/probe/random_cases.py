"""Random probes and runs: every verdict occurs, and the numbers are those of no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_fx.dtypes import Array

NAMES = ("de", "fr", "10", "2")
GROUPS = ("q, first third", "up", "7")
MODES = ("merged", "switch", "load", "batch")


def random_case(seed: int) -> dict[str, Any]:
    """Return a case, as `Reader.judge` takes it."""
    return _Draw(seed).case()


def huge_case(seed: int) -> dict[str, Any]:
    """Return a case whose outputs are so large that differences of them overflow."""
    case = random_case(seed)
    probe = json.loads(case["text"])
    lists = [probe["base"]] if "base" in probe else []
    for adapter in probe["adapters"].values():
        lists += [adapter[key] for key in ("values", "half", "double") if key in adapter]
        lists += adapter.get("groups", {}).values()
    runs = case["runs"]
    lists += [run for run in (runs["base"], *(of[1] for of in runs["adapters"])) if run is not None]
    for numbers in lists:
        numbers[:] = [None if number is None else number * 1e306 for number in numbers]
    return {"text": json.dumps(probe), "runs": runs}


class _Draw:
    """The drawing of one case."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.count = int(self.rng.integers(1, 15))
        self.largest = self.rng.choice([0.5, 1.0, 30.0], self.count)
        self.tolerance = self.rng.choice([1e-5, 1e-3], self.count)
        self.precisions: dict[str, float] = {}
        if self.chance(0.7):
            self.precisions = {"bfloat16": 0.02, "tf32": 2e-3}  # in no order

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def case(self) -> dict[str, Any]:
        """Return a probe and a run of its base and adapters."""
        mode = str(self.rng.choice(MODES))
        most = 1 if mode == "merged" else len(NAMES)
        names = list(self.rng.permutation(NAMES)[: self.rng.integers(0, most + 1)])
        base = self.numbers()
        lists: dict[str, list[Array]] = {}
        probe: dict[str, Any] = {
            "format": 1,
            "mode": mode,
            "inputs": {},
            "outputs": {
                f"y{i}": {"shape": [3], "largest": self.largest[i], "tolerance": self.tolerance[i]}
                for i in range(self.count)
            },
            "points": [[f"y{i}", i % 3] for i in range(self.count)],
            "adapters": {},
        }
        if self.precisions:
            probe["precisions"] = self.precisions
        if self.chance(0.8) or not names:
            probe["base"] = base.tolist()
        for number, name in enumerate(names, 1):
            fields, lists[name] = self.adapter(base, [known[0] for known in lists.values()])
            probe["adapters"][str(name)] = {**fields, "id": number, "file": f"{name}.onnx_adapter"}

        values = [known[0] for known in lists.values()]
        runs: dict[str, Any] = {"base": None, "adapters": [], "beyond_ids": None}
        if mode != "merged" or not names:
            runs["base"] = self.run([base, base, base, base, *values])
        for name in names:
            runs["adapters"].append([str(name), self.run([*lists[name], base, *values])])
        if self.chance(0.5):
            runs["beyond_ids"] = self.run([base, np.full(self.count, np.nan)])
        return {"text": json.dumps(probe), "runs": runs}

    def numbers(self) -> Array:
        """Return an output at the points."""
        return self.rng.uniform(-1, 1, self.count) * self.largest

    def adapter(self, base: Array, others: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        """Return an adapter of a probe, and what a run of it may give, the right outputs first."""
        effect = self.rng.choice([1e-6, 0.01, 0.3, 1.0])
        values = base + effect * self.numbers()
        if others and self.chance(0.15):
            values = others[0]
        change = values - base
        bend = 0.2 * effect * self.numbers()
        half, double = base + 0.5 * change + bend, base + 2 * change - bend
        lists = [values, values]
        fields: dict[str, Any] = {"values": values.tolist()}
        if self.chance(0.8):
            fields["half"], fields["double"] = half.tolist(), double.tolist()
            s = float(self.rng.integers(10, 301)) / 100
            at = _cubic(base, half, values, double)
            lists += [half, double, at(s), base + 1.04 * change]
        groups = self.rng.permutation(GROUPS)[: self.rng.integers(0, len(GROUPS) + 1)]
        if len(groups):
            fields["groups"] = {}
        for group in groups:
            without = base if self.chance(0.2) else base + self.rng.uniform(0, 1) * change
            fields["groups"][str(group)] = without.tolist()
            lists.append(without)
        return fields, lists

    def run(self, lists: list[Array]) -> list[float | None]:
        """Return one of the lists, moved by a share of a tolerance or of a precision."""
        if self.chance(0.1):
            lists = [self.numbers()]
        chosen = lists[int(self.rng.integers(len(lists)))]
        most = self.rng.choice([0.0, 0.9 * self.tolerance.min(), 3e-5, 1.5e-3, 0.015])
        found = chosen + most * self.rng.uniform(-1, 1, self.count) * self.largest
        if self.chance(0.03):
            found[0] = np.nan
        return [float(number) if np.isfinite(number) else None for number in found]


def _cubic(base: Array, half: Array, values: Array, double: Array) -> Callable[[float], Array]:
    """Return the cubic function through the outputs at the scales 0, 0.5, 1 and 2."""
    powers = np.vander([0.0, 0.5, 1.0, 2.0], 4)
    coefficients = np.linalg.solve(powers, np.stack([base, half, values, double]))

    def at(scale: float) -> Array:
        return np.asarray(np.polyval(coefficients, scale))

    return at
