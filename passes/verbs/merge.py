"""merge: fold adapters into a file of weights or into an ONNX graph; neither needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING

from lora_fx.checkpoint.merge import Adapters, plan_merge
from lora_fx.checkpoint.merge import run as merge_checkpoint
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.write import Progress
from lora_fx.compare import Report
from lora_fx.errors import (
    LoraFxError,
    expect_path,
    given_options,
)
from lora_fx.files.atomic import check_output
from lora_fx.files.run_files import remembering
from lora_fx.inputs import Named, expect_arrays
from lora_fx.spellings import under_either_name
from lora_fx.text import StrPath

if TYPE_CHECKING:
    from lora_fx.onnx.place import Place


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
    names: Mapping[str, str] | None = None,
    external_over: int | None = None,
    places: Sequence[Place] = (),
    delta: bool = False,
    run: bool = False,
    inputs: Named | None = None,
    provider: str | None = None,
    workers: int | None = None,
) -> Report:
    """Fold adapters into `base` and write `out`, a file of the same kind.

    Args:
        base: A Hugging Face folder, a `.safetensors` or an `.onnx` file; it is not changed.
        adapters: Paths or Adapters; a pair (adapter, weight) multiplies its updates by weight.
        out: The folder or file to write.
        how: Several adapters: sum (exact, one rounding), cat (the same sum), linear, svd.
        rank: The rank of an svd mix.
        dtype: What touched tensors are stored in: bfloat16, float16, float32, float64; as they
            were where None.
        allow_unused: Leave out entries whose tensor the base lacks, instead of refusing.
        untie: Write a tied head as a tensor of its own where an update means one use only.
        add: Add whole tensors that the base lacks, such as a new head.
        again: Fold an adapter that the base's metadata says is in it already.
        allow_missing: Leave layers as they are that the adapter's config adapts and its file lacks.
        any_base: Fold an adapter that says it was trained on other weights than these.
        other_readers: Fold an update of a weight that more than its products read.
        trust: Read pickles, by torch's unpickler that runs no code.
        dequantise: Write the weights of a quantised checkpoint as floats.
        requantise: Write them back in its codes.
        lossy: Do not refuse what codes lose of the update.
        max_shard_size: Bytes of a shard of what was dequantised, or a text such as 2GB.
        link: Untouched shards share the base's inodes (hard links).
        force: Replace an output that exists.
        threads: How many work at a time; as many as there are cores where None.
        progress: Called with bytes done and bytes in all.
        names: Of `.onnx`: adapter key → tensor of the file, where the names do not tell.
        external_over: Of `.onnx`: bytes of weights above which they go to a file of their own.
        places: Of `.onnx`: where copies go.
        delta: Of `.onnx`: write what changes, and share the rest with the base's data file.
        run: Of `.onnx`: run it too, beside the base with branches, at three sizes.
        inputs: Of `run`: arrays by input name, instead of sampled ones.
        provider: Of `run`: auto, cpu, cuda or webgpu; cpu where None.
        workers: The old name of threads.

    `lora_fx.checkpoint.merge.merge` and `OnnxMergeOptions` say more about each.

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    for name, path in (("base", base), ("out", out)):
        expect_path(path, name, "call merge(base, adapters, out)")
    expect_arrays(inputs)
    threads = under_either_name("workers", workers, "threads", threads)
    of_onnx_files = {
        "names": names, "external_over": external_over, "places": places, "delta": delta,
        "run": run, "inputs": inputs, "provider": provider,
    }  # fmt: skip
    if is_onnx(base):
        from lora_fx.passes.verbs.merge_onnx import merge_onnx  # checkpoints need no onnx

        refuse_other_kind(base, out)
        of_checkpoints = {
            "dtype": dtype, "allow_unused": allow_unused, "untie": untie, "add": add,
            "allow_missing": allow_missing, "any_base": any_base, "other_readers": other_readers,
            "dequantise": dequantise, "requantise": requantise, "lossy": lossy,
            "max_shard_size": max_shard_size, "link": link, "threads": threads,
            "progress": progress,
        }  # fmt: skip
        of_both = {"how": how, "rank": rank, "again": again, "trust": trust, "force": force}
        return merge_onnx(base, adapters, out, **of_both, **of_checkpoints, **of_onnx_files)

    for name in given_options(of_onnx_files):
        if name != "places" or places:
            raise LoraFxError(
                f"{name} is an option for .onnx files, not for checkpoints", "leave it out"
            )
    options = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy, max_shard_size=max_shard_size,
    )  # fmt: skip
    check_output(out, force=force)
    plan = plan_merge(base, adapters, options)
    return merge_checkpoint(plan, out, link=link, force=force, threads=threads, progress=progress)


def refuse_other_kind(base: StrPath, out: StrPath) -> None:
    """Raise if the output of a merge into an .onnx file is not named as an ONNX file."""
    if not is_onnx(out):
        raise LoraFxError(
            f"{fspath(out)} does not end in .onnx, but {fspath(base)} does",
            "give the output a name that ends in .onnx: -o OUT.onnx",
        )


def is_onnx(path: StrPath) -> bool:
    """True if a path has the name of an ONNX file."""
    return fspath(path).endswith(".onnx")
