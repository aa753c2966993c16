"""merge: stream a checkpoint with adapters folded in, and check the output before its final name.

W_new = round(W + Σ wᵢ·sᵢ·BᵢAᵢ) for every touched tensor; everything else byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_fx.adapter.adapter import Adapter, check_entries
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.adapter.evaluated import refuse_evaluated
from lora_fx.adapter.invocation import refuse_invocation
from lora_fx.checkpoint.companions import REPORTS, report_name
from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.merge_report import report_json, report_of
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.prove import prove
from lora_fx.checkpoint.requantise import refuse_loss
from lora_fx.checkpoint.write import Progress, write
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, NoEffectError, expect, explained, type_of
from lora_fx.files.atomic import check_output, check_space, replacing
from lora_fx.files.checkpoint import PICKLES, open_checkpoint
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.files.run_files import check_unchanged, naming_changes, remember, remembering
from lora_fx.formats.io import AdapterLike, load_adapter
from lora_fx.formats.registry import FORMATS
from lora_fx.spellings import under_either_name
from lora_fx.text import StrPath, counted, is_whole

OTHER_MODELS = (".onnx", ".pt2")
"""File suffixes of models that `merge` does not write when the base is a checkpoint."""
Adapters = AdapterLike | Iterable[AdapterLike | tuple[AdapterLike, float]]


@remembering()
def merge(
    base: StrPath,
    adapters: Adapters,
    out: StrPath,
    *,
    how: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    allow_unused: bool = False,
    untie: bool = False,
    add: bool = False,
    again: bool = False,
    allow_missing: bool = False,
    any_base: bool = False,
    other_readers: bool = False,
    trust: bool = False,
    dequantise: bool = False,
    requantise: bool = False,
    lossy: bool = False,
    max_shard_size: int | str | None = None,
    link: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Report:
    """Fold adapters into a checkpoint and write a new one of the same kind.

    Args:
        base: A Hugging Face folder, its id on the Hub (hf:ORG/NAME[@REVISION]), or a `.safetensors`
            file; it is not changed.
        adapters: Paths or Adapters; a pair (adapter, weight) multiplies its updates by weight.
        out: The folder or file to write.
        how: Several adapters: sum (exact, one rounding), cat (the same sum), linear, svd.
        rank: The rank of an svd mix.
        dtype: The dtype of changed tensors: bfloat16, float16, float32, float64; unchanged if None.
        allow_unused: Leave out updates whose tensor the base lacks, instead of raising.
        untie: Write a tied head as a separate tensor if an update is for one use only.
        add: Add whole tensors that the base lacks, such as a new head.
        again: Fold an adapter even if the base's metadata says that it is merged already.
        allow_missing: Leave layers unchanged that the adapter's config names and its file lacks.
        any_base: Fold an adapter whose metadata says that it was trained on other weights.
        other_readers: Fold an update of a weight that other operations (a norm, an index) read too.
            The update does not reach them; the merged weight does.
        trust: Read pickles, by torch's unpickler that runs no code; safetensors are written.
        dequantise: Write the weights of a quantised checkpoint as floats, in `dtype` or bfloat16;
            quantization_config goes, and the shards are new.
        requantise: Write W̃ + Δ back in the codes of a quantised checkpoint. The report says how
            much of the update is kept; less than half in all is refused.
        lossy: Do not refuse a `requantise` that keeps less than half of the update.
        max_shard_size: Bytes of the tensors in a shard of `dequantise`, or a text such as 2GB; 5 GB
            if None.
        link: Untouched shards share the base's inodes (hard links).
        force: Replace an output that exists.
        threads: How many threads run at a time; one for each core if None.
        progress: Called with bytes done and bytes in all.
        workers: The old name of threads.

    Returns:
        A Report; `details["tensors"]` has, for every touched tensor, ‖Δ‖/‖W‖ (ratio), the share
        of elements that did not move (lost) and the share of Δ that arrived (gain). Of int8 ones
        also what quantising W + Δ missed, over ‖Δ‖ (error), and what quantising W is taken to
        have missed, over ‖W‖ (own).

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: No element of the output would change.
    """
    options = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy,
        max_shard_size=max_shard_size,
    )  # fmt: skip
    threads = under_either_name("workers", workers, "threads", threads)
    check_output(out, force=force)
    plan = plan_merge(base, adapters, options)
    return run(plan, out, link=link, force=force, threads=threads, progress=progress)


def plan_merge(base: StrPath, adapters: Adapters, options: MergeOptions | None = None) -> MergePlan:
    """Plan what `merge` would do with these options; write nothing."""
    options = options or MergeOptions()
    base = local(base)
    with explained(base), trusting(options.trust):
        opened = open_checkpoint(Path(base))
        weighted = read_adapters(adapters, 2 * opened.elements, Path(base))
        return make_plan(opened, weighted, options)


@remembering()
def run(
    plan: MergePlan,
    out: StrPath,
    *,
    link: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan; see `merge`."""
    if threads is not None and (not is_whole(threads) or threads < 0):
        raise LoraFxError(f"threads is {threads!r}; expected a whole number", "leave it out")
    threads = threads or cores()
    target = Path(out)
    remember(plan.base.path, *(info.file for info in plan.base.tensors.values()))
    for adapter in plan.adapters:
        if adapter.path:
            files = (adapter.path / name for name in FORMATS.names_of_input())
            remember(adapter.path, *files)

    with explained(target):
        _check_target(plan, target, link=link)
        check_output(target, force=force, names=_output_names(plan, target))
        check_space(target.parent, plan.touched_bytes if link else plan.disk)
        with replacing(target, force=force) as stage:
            with naming_changes():
                stats = write(plan, stage, threads=threads, link=link, progress=progress)
            _check_effect(plan, stats, target)
            _prove(plan, stage, target, threads)
            report = report_of(plan, stats, target)
            name = report_name(plan)
            if stage.is_dir() and name:
                text = json.dumps(report_json(report), indent=1) + "\n"
                (stage / name).write_text(text, encoding="utf-8")
    return report


def _check_target(plan: MergePlan, target: Path, *, link: bool) -> None:
    """Raise for an output file of a kind that a merge into a checkpoint does not write."""
    if target.suffix in PICKLES:
        raise LoraFxError(
            f"{target}: lora-fx does not write pickles", "pass -o X.safetensors, or a folder"
        )
    if target.suffix in OTHER_MODELS:
        raise LoraFxError(
            f"{target}: the base {plan.base.path} is a checkpoint, and so is the output of its "
            "merge",
            "pass -o X.safetensors, or a folder",
        )
    if link and not plan.base.path.is_dir():
        raise LoraFxError(
            f"link has no effect for {plan.base.path}, a single file, which is written in full",
            "leave --link out",
        )


def _output_names(plan: MergePlan, target: Path) -> set[str]:
    """Return the output's possible file names, and those of an earlier output with other shards."""
    companions, _ = plan.base.companions()
    names = {*map(str, companions), *plan.base.shards, *REPORTS}
    if target.is_dir():
        for path in target.iterdir():
            if path.name.endswith((".safetensors", ".index.json")):
                names.add(path.name)
    return names


def _check_effect(plan: MergePlan, stats: Mapping[str, Stats], target: Path) -> None:
    """Raise if nothing has changed, or if the codes keep too little of the updates.

    Raises:
        NoEffectError: Every element of the output is what it was.
        LoraFxError: Codes that were made anew hold less than half of the update.
    """
    requantised = [sums for name, sums in stats.items() if plan.changes[name].requantised]
    if stats and not _has_effect(plan, stats):
        wider = "--dequantise" if requantised else "a wider --dtype"
        tensors = counted(len(stats), "tensor")
        raise NoEffectError(
            f"{target}: not written: no element of {tensors} would change",
            f"check that the adapter is trained and that its weight is not 0; pass {wider} to "
            "keep small updates",
        )
    if not plan.options.lossy:
        refuse_loss(requantised, target)


def _has_effect(plan: MergePlan, stats: Mapping[str, Stats]) -> bool:
    """Whether a tensor was replaced, or a fold changed at least one element."""
    for change in plan.changes.values():
        if change.fold is None and not change.scales_of:
            return True
    return any(sums.still < sums.elements and sums.delta for sums in stats.values())


def _prove(plan: MergePlan, stage: Path, target: Path, threads: int) -> None:
    """Raise if the written files differ from the plan."""
    differences = list(prove(plan, open_checkpoint(stage), threads=threads))
    if differences:
        check_unchanged()  # a base that is another one now has other numbers
        raise LoraFxError(
            f"{target}: not written: {differences[0].tensor!r} {differences[0].what}",
            "report this: it is a mistake of lora-fx",
        )


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def read_adapters(
    adapters: Adapters, most: int | None = None, base: Path | None = None
) -> list[WeightedAdapter]:
    """Read adapters as `merge` takes them; `most` and `base` are passed to load_adapter."""
    if isinstance(adapters, (str, os.PathLike, Adapter)):
        adapters = [adapters]
    wanted = "a path, an Adapter, or a list of them"
    hint = "pass [(adapter, 0.5), …] to multiply updates by weights"
    if isinstance(adapters, Mapping):  # its values are no weights here
        raise LoraFxError(f"adapters is {type_of(adapters)}, not {wanted}", hint)
    expect(adapters, Iterable, "adapters", wanted, hint)
    return [_read_adapter(item, most, base) for item in adapters]


def _read_adapter(item: object, most: int | None, base: Path | None) -> WeightedAdapter:
    """Read one adapter, given alone or as (adapter, weight)."""
    adapter = item
    weight: object = 1.0
    stated = isinstance(item, tuple) and len(item) == 2
    if isinstance(item, tuple) and len(item) == 2:
        adapter, weight = item
    if not isinstance(adapter, (str, os.PathLike, Adapter)) or not isinstance(weight, (int, float)):
        raise LoraFxError(
            f"{item!r} is not an Adapter or the path of one",
            "pass a list of paths or Adapters, or of pairs (adapter, weight)",
        )
    if isinstance(adapter, Adapter):
        check_entries(adapter)
        where = "the adapter"
        path = None
    else:
        where = str(adapter)
        path = Path(local(adapter, files=FORMATS.files_of_folders))
        adapter = load_adapter(path, most=most, base=base, resolve=False)
    refuse_invocation(adapter.invocation, where, "a merge")
    refuse_evaluated(adapter, where, "a merge")
    return WeightedAdapter(
        adapter, float(weight), where, adapter_hash(adapter), path, stated=stated
    )
