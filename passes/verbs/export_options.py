"""The options of an export: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.compare import Parity
from lora_fx.dtypes import long_name
from lora_fx.errors import (
    LoraFxError,
    NoSay,
    expect,
    expect_name,
)
from lora_fx.files.program_manifest import BASE_ENDING
from lora_fx.inputs import Named, expect_arrays
from lora_fx.onnx.made_for import CPU, MADE_FOR, PORTABLE, TARGETS
from lora_fx.probe.probe import FULL, KINDS
from lora_fx.targets.found import Found
from lora_fx.targets.plan import make_plan
from lora_fx.text import is_whole

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss
    from lora_fx.onnx.manifest import Manifest
    from lora_fx.onnx.output_file import Output
    from lora_fx.onnx.place import Place
from lora_fx.passes.verbs.options import (
    CaptureOptions,
    ExportAdapters,
    Selectors,
    expect_selectors,
    is_given,
)

SLOT_VARIANTS = ("lora", "dora")
"""The kinds of adapters that slots can be made for."""
MODES: Mapping[str, tuple[str, ...]] = {
    "switch": ("include", "exclude"),
    "batch": ("scales",),
    "merged": ("optimise", "precision"),
    "load": ("rank",),
    "train": ("loss", "optimizer", "weight_decay", "clip"),
}
"""Export mode → its own options; load also has switch's, train also has those of both."""


PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def adapter_ending(target: Path, made_for: str) -> str:
    """Return the ending of the adapters' files beside a switchable file."""
    needs_plain_tensors = target.suffix == ".pt2" or made_for == PORTABLE
    return ".safetensors" if needs_plain_tensors else ".onnx_adapter"


@dataclass(frozen=True)
class Companions:
    """Files that share the data of an exported file, with their parity and warnings."""

    parity: Sequence[Parity] = ()
    files: Sequence[Path] = ()
    warnings: Sequence[str] = ()


EXPORT_RULES: tuple[NoSay[ExportOptions], ...] = (
    NoSay(
        ("external_over",), lambda o: o.mode == "train",
        "in mode train: its two files share the weights of a third file",
    ),
    NoSay(
        ("external_over", "within"), lambda o: o.is_program,
        "for a .pt2 file, which holds all its weights and is checked by torch",
    ),
)  # fmt: skip
"""The rules for the options of every export; ExportOptions checks the rules of each mode."""


REWRITE_RULES: tuple[NoSay[ExportOptions], ...] = (
    NoSay(
        ("inputs", "within"),
        lambda o: o.mode == "merged" and not o.rewrites,
        "when an adapter is merged into an .onnx file: the merge compares tensors and runs nothing",
        "leave it out; only --optimise, --precision, a device as --target and lora-fx merge --run "
        "run the file",
    ),
)
"""The rules for the options of an export of an .onnx file."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `lora_fx.export`, whose docstring has the defaults and explains the fields."""

    target: Path
    adapters: ExportAdapters | None
    mode: str
    include: Selectors
    exclude: Selectors
    rank: int | None
    scales: bool
    names: Mapping[str, str] | None
    inputs: Named | None
    provider: str
    opset: int | None
    external_over: int
    capture: CaptureOptions
    force: bool
    optimise: bool
    precision: str | None
    places: Sequence[Place]
    largest: Mapping[str, int] | None = None
    variant: str | None = None
    made_for: str = CPU
    within: bool = False
    accuracy_level: int = 0
    loss: str | Loss | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    clip: float | None = None
    owner: Path | None = None
    also: Callable[[Output, Manifest], Companions] | None = None
    last: Callable[[], None] | None = None
    """Called when the file is proven, before it has its name; what it raises leaves no file."""
    tol: float | None = None
    probe: str = FULL
    also_probed: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters by name that the probe tells of, and whose files something else writes."""

    def __post_init__(self) -> None:
        """Raise for an unknown mode, and for an option that the mode would ignore.

        `precision` takes its long name.
        """
        expect_mode(self.mode)
        expect_name(self.made_for, MADE_FOR, "unknown target", TARGETS)
        expect_name(self.probe, KINDS, "unknown probe", "use full, short or none")
        self._check_modes()
        for name in ("include", "exclude"):
            expect_selectors(getattr(self, name), name)
        expect_arrays(self.inputs)
        if self.opset is not None and not is_whole(self.opset):
            raise LoraFxError(
                f"opset {self.opset!r} is not a whole number", "pass --opset 20, for example"
            )
        if self.rank is not None and (not is_whole(self.rank) or self.rank < 1):
            raise LoraFxError(
                f"rank {self.rank!r} is not a positive whole number", "pass 8 or 16, for example"
            )
        object.__setattr__(self, "precision", long_name(self.precision))
        if self.precision is not None:
            names = "use float32, bfloat16, float16 or int8"
            expect_name(self.precision, PRECISIONS, "unknown precision", names)
        if self.precision == "int8" and self.optimise:
            raise LoraFxError(
                "precision int8 starts from the exported graph: fused nodes would stay in float32",
                "leave --optimise out",
            )
        is_exact = self.mode in ("batch", "train")
        if self.accuracy_level not in (0, 4) or (self.accuracy_level and is_exact):
            raise LoraFxError(
                f"accuracy level {self.accuracy_level} is not available in mode {self.mode}",
                "use 0; or 4, which takes x as int8 for quantised weights, in mode merged, "
                "switch or load",
            )
        if self.capture.cache and self.mode == "train":
            raise LoraFxError(
                "mode train has no cache",
                "leave --cache out, or use mode merged, switch, load or batch",
            )
        if self.mode == "train":
            self._check_step()
        if self.is_program:
            self._check_program()
        if self.tol is not None:
            self._check_tol(self.tol)
        if self.made_for == PORTABLE:
            self._check_portable()
        if self.largest is not None:
            self._check_largest(self.largest)
        if self.variant is not None:
            self._check_variant(self.variant)

    def _check_modes(self) -> None:
        """Raise for an option that belongs to another mode."""
        modes = {self.mode}
        if self.mode == "load":
            modes.add("switch")
        elif self.mode == "train":
            modes.update(("switch", "load"))
        for mode, names in MODES.items():
            if mode in modes or (mode == "load" and self.is_program):
                continue
            if any(is_given(getattr(self, name)) for name in names):
                raise LoraFxError(
                    f"mode {self.mode} would ignore an option of mode {mode}: "
                    f"{' and '.join(names)}",
                    "leave it out",
                )

    def _check_variant(self, variant: str) -> None:
        """Raise for a variant that slots are not made for, and for a mode without slots."""
        expect_name(variant, SLOT_VARIANTS, "unknown variant of slots", "use lora or dora")
        if self.mode not in ("switch", "load"):
            raise LoraFxError(
                f"mode {self.mode} has no slots for adapters of a variant",
                "leave --variant out, or use mode switch or load",
            )

    def _check_largest(self, largest: Mapping[str, int]) -> None:
        """Raise for sizes that are no sizes, and for a file that has no largest ones."""
        if not self.is_program:
            raise LoraFxError(
                f"{self.target.name}: largest sizes are for .pt2 files: an .onnx file takes any",
                "leave --largest out, or write a .pt2 file",
            )
        hint = "pass largest={'batch': 8}, for example"
        expect(largest, Mapping, "largest", "sizes by name", hint)
        for name, size in largest.items():
            expect(name, str, "a name in largest", "a text", hint)
            if not is_whole(size) or size < 1:
                raise LoraFxError(
                    f"the largest {name} is {size!r}; expected 1 or more", "pass batch=8, say"
                )
        if "rank" in largest and self.rank:
            raise LoraFxError(
                "the rank is fixed, and has no largest one", "pass rank or the largest rank"
            )

    def _check_program(self) -> None:
        """Raise for a mode or option that a .pt2 file does not have."""
        name = self.target.name
        if self.mode != "switch":
            raise LoraFxError(
                f"{name}: a .pt2 file is written in mode switch, not in mode {self.mode}",
                "pass --mode switch, or write an .onnx file",
            )
        options_of_onnx = {
            "--opset": self.opset is not None,
            "--optimise": self.optimise,
            "--precision": self.precision is not None,
            "--accuracy-level": self.accuracy_level != 0,
            "--target": self.made_for != CPU,
            "--triton": bool(self.places),
            "--provider": self.provider not in ("auto", "cpu"),
        }
        for option, was_given in options_of_onnx.items():
            if was_given:
                raise LoraFxError(
                    f"{name}: {option} is for .onnx files; what runs a .pt2 file compiles it",
                    f"leave {option} out, or write an .onnx file",
                )

    def _check_portable(self) -> None:
        """Raise for what only ONNX Runtime, or not every other runtime, has."""
        if self.mode == "load":
            raise LoraFxError(
                "mode load is not portable: only ONNX Runtime exchanges the tensors of a data file "
                "when a session is made",
                "use --mode switch, whose A and B are inputs",
            )
        if self.precision == "bfloat16":
            raise LoraFxError(
                "precision bfloat16 is not portable: browsers have no arrays of it",
                "leave --precision out, or use float16 or int8",
            )
        if self.accuracy_level:
            raise _codes_not_portable("an accuracy level")

    def refuse_codes(self) -> None:
        """Raise if the file cannot have weights in codes of 4 or 8 bits."""
        if self.made_for == PORTABLE:
            raise _codes_not_portable("quantise")

    def _check_step(self) -> None:
        """Raise for an unsupported loss, optimizer or number, and for a server's folder."""
        if not callable(self.loss) and self.loss not in (None, "ce", "mse"):
            raise LoraFxError(f"unknown loss {self.loss!r}", "use ce, mse or module:function")
        if self.optimizer not in (None, "adamw", "sgd"):
            raise LoraFxError(f"unknown optimizer {self.optimizer!r}", "use adamw or sgd")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            expect(
                value or 0,
                Real,
                name,
                "a number",
                f"pass --{name.replace('_', '-')} 0.01, for example",
            )
            if value is not None and not 0 <= value < math.inf:
                raise LoraFxError(f"{name} is {value}; expected 0 or more", "pass 0 to turn it off")
        if self.places:
            raise LoraFxError(
                "mode train writes no file for a server", "use --triton with --mode switch"
            )

    def _check_tol(self, tol: float) -> None:
        """Raise for a `tol` that is not between the gate of the precision or level, and 1."""
        from lora_fx.onnx.precision import GATES  # as in output

        hint = "pass --tol 0.1 to accept a tenth of the largest output"
        expect(tol, (int, float), "tol", "a number", hint)
        rounding = self.precision or ""
        if self.accuracy_level:
            rounding = f"level {self.accuracy_level}"
        gate = GATES.get(rounding, 1.0)
        if not gate < tol < 1:
            expected = "no tol, since this export rounds nothing"
            if gate < 1:
                expected = f"more than the gate of {rounding}, {gate:g}, and less than 1"
            raise LoraFxError(
                f"tol is {tol:g}; expected {expected}",
                "leave --tol out; or pass --precision float16, int8 or --accuracy-level 4 too",
            )

    def capture_of_base(self) -> CaptureOptions:
        """Return the capture options of the base, with all that adapters replace as a whole."""
        if isinstance(self.adapters, Adapter):
            return replace(self.capture, adapter=self.adapters)
        adapters: list[Adapter] = []
        if isinstance(self.adapters, Mapping):
            adapters = [*self.adapters.values()]
        elif self.adapters:
            adapters = [*self.adapters]
        if len(adapters) == 1:
            return replace(self.capture, adapter=adapters[0])
        entries: dict[str, Entry] = {}
        for adapter in adapters:
            for key, entry in adapter.entries.items():
                if isinstance(entry, (Full, Dense, ReplacedRows)):
                    entries.setdefault(key, entry)
        return replace(self.capture, adapter=Adapter(entries) if entries else None)

    @property
    def takes_dora(self) -> bool:
        """Whether every slot takes DoRA, whatever adapters the export has."""
        return self.variant == "dora"

    @property
    def is_program(self) -> bool:
        """Whether the file is a .pt2 file."""
        return self.target.suffix == ".pt2"

    @property
    def computes_in(self) -> str:
        """The precision whose rounding decides how far two runs of the file may lie apart."""
        if self.accuracy_level:
            return "int8"
        return self.precision or "float32"

    @property
    def requires_factors(self) -> bool:
        """Whether A and B are inputs of the file that have no defaults."""
        return self.is_program or (self.mode == "switch" and self.made_for == PORTABLE)

    @property
    def adapter_ending(self) -> str:
        """The ending of the adapters' files beside a switchable file."""
        return adapter_ending(self.target, self.made_for)

    @property
    def base_file(self) -> str | None:
        """The name of the file that stands for the base, where A and B have no defaults."""
        return f"{self.target.stem}{BASE_ENDING}" if self.requires_factors else None

    @property
    def rewrites(self) -> bool:
        """Whether the graph of an .onnx file is rewritten beyond its weights, and so has to run."""
        return self.optimise or self.precision is not None or self.made_for != CPU

    def output(self) -> AbstractContextManager[Output]:
        """Open the file and its copies for writing; they get their names when the block ends."""
        from lora_fx.onnx.output_file import output

        return output(
            self.target,
            made_for=self.made_for,
            force=self.force,
            places=self.places,
            owner=self.owner,
            last=self.last,
        )

    def chosen(self, found: Found, adapters: Mapping[str, Adapter]) -> tuple[list[str], bool]:
        """Return the targets, and whether the default plan chose them, so that some may be lost."""
        keys: dict[str, None] = {}
        for adapter in adapters.values():
            keys.update(dict.fromkeys(adapter.lowrank))
        holds_tensors = any(adapter.full for adapter in adapters.values())
        if (keys or holds_tensors) and not self.include and not self.exclude:
            return list(keys), False
        plan = make_plan(found, {}, rank=1, include=self.include, exclude=self.exclude)
        return list(plan.entries), not self.include


def expect_mode(mode: str) -> None:
    """Raise for an unknown name of a mode."""
    expect_name(mode, MODES, "unknown mode", "use merged, switch, load, batch or train")


def expect_ending(path: str | PathLike[str]) -> None:
    """Raise for an output whose name does not say what it is: an .onnx or a .pt2 file."""
    name = fspath(path)
    if not name.endswith((".onnx", ".pt2")):
        raise LoraFxError(
            f"{name} does not end in .onnx, nor in .pt2",
            f"pass a name that ends in .onnx, such as {name.rstrip('/')}.onnx",
        )


def _codes_not_portable(option: str) -> LoraFxError:
    """Return the error for an option about codes, in a file for any runtime."""
    return LoraFxError(
        f"{option} is not portable: products over codes are MatMulNBits, an operator of "
        "com.microsoft that only ONNX Runtime has",
        "leave it out, or use --precision int8, whose operators are ONNX's own",
    )
