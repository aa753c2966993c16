"""The settings beside an adapter of MLX-LM: its kind, its rank, and the scale of its updates.

MLX-LM multiplies (x·lora_a)·lora_b by a scale, for which each release reads adapter_config.json in
its way. Read in tuner/lora.py, tuner/utils.py and lora.py of the releases on PyPI:

===============  ================================  ======================================
releases         adapter_config.json               scale
===============  ================================  ======================================
0.0.10 – 0.5.0   none; adapters.npz                10 · 16 / 8 = 20, if not set otherwise
0.6.0 – 0.13.0   lora_layers                       scale · alpha / rank
0.13.1 – 0.14.1  lora_layers, use_dora             scale · alpha / rank
0.14.2 – 0.18.2  lora_layers, use_dora             scale; alpha is written and not read
since 0.19.0     num_layers, fine_tune_type        scale; alpha is written until 0.22, not read
===============  ================================  ======================================

The third and the fourth row cannot be told apart if alpha is not the rank: such a file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.files.strict_json import read_json
from lora_fx.formats.checked_file import File
from lora_fx.text import JsonView, is_number, is_whole

CONFIG = "adapter_config.json"
_SCALE_WITHOUT_CONFIG = 20.0
_FULL_HINT = (
    "write the tuned model with mlx_lm.fuse, then pass it to lora-fx extract BASE TUNED -o ADAPTER"
)


@dataclass(frozen=True)
class MlxSettings:
    """The facts of an adapter that its tensors do not have.

    Attributes:
        scale: The factor before lora_a·lora_b.
        dora: Whether the updates are DoRA, with a length `m` each.
        rank: The rank of all updates; 0 where no config says it.
        dropout: The dropout in training.
        base: The path or name of the model that it was trained on; empty where it is not known.
    """

    scale: float
    dora: bool = False
    rank: int = 0
    dropout: float = 0.0
    base: str = ""


def settings_beside(path: Path, file: File) -> MlxSettings:
    """Read the settings beside a file of tensors.

    Raises:
        LoraFxError: There is none beside a safetensors file, a number is missing, the releases of
            MLX-LM read it in different ways, or the file has whole weights.
    """
    config_path = path.parent / CONFIG
    if config_path.is_file():
        return _settings(read_json(config_path), str(config_path))
    if path.suffix == ".npz":
        file.notes.append(
            f"{path}: no {CONFIG} next to it; the scale is taken as {_SCALE_WITHOUT_CONFIG:g}, the "
            "default of MLX-LM when it wrote .npz files. If another was set in training, write "
            f'{{"num_layers": -1, "lora_parameters": {{"rank": R, "scale": S}}}} into {CONFIG}'
        )
        return MlxSettings(_SCALE_WITHOUT_CONFIG)
    raise LoraFxError(
        f"{path}: no {CONFIG} next to it; expected one with lora_parameters, which gives the scale "
        "of the updates",
        f"copy the adapter's {CONFIG} next to the file",
    )


def _settings(config: JsonView, where: str) -> MlxSettings:
    """Return the settings in adapter_config.json."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise LoraFxError(
            f"{where}: fine_tune_type is 'full': the file has whole weights of the model, and no "
            "low-rank updates",
            _FULL_HINT,
        )
    if kind not in ("lora", "dora"):
        raise LoraFxError(
            f"{where}: fine_tune_type is {kind!r}; expected lora or dora",
            "fuse it into its model with mlx_lm.fuse",
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise LoraFxError(
            f"{where}: no lora_parameters; expected an object with rank and scale, as MLX-LM "
            "writes it",
            "copy the adapter_config.json that belongs to the file",
        )
    rank = parameters.get("rank")
    if not is_whole(rank) or rank < 1:
        raise LoraFxError(
            f"{where}: rank of lora_parameters is {rank!r}; expected a whole number above 0",
            "correct the file",
        )
    dropout = parameters.get("dropout")
    base = config.get("model")
    return MlxSettings(
        scale=_scale(config, parameters, rank, where),
        dora=kind == "dora" or config.get("use_dora") is True,
        rank=rank,
        dropout=float(dropout) if is_number(dropout) else 0.0,
        base=base if isinstance(base, str) else "",
    )


def _scale(config: JsonView, parameters: JsonView, rank: int, where: str) -> float:
    """Return the scale of the updates, by the release that wrote the config; see above."""
    scale = _number(parameters, "scale", where)
    if "num_layers" in config or "alpha" not in parameters:
        return scale
    alpha = _number(parameters, "alpha", where)
    if alpha == rank:
        return scale
    if "lora_layers" in config and "use_dora" not in config:
        return scale * alpha / rank
    raise LoraFxError(
        f"{where}: lora_parameters has scale {scale:g} and alpha {alpha:g}, which mean the scale "
        f"{scale * alpha / rank:g} to MLX-LM until 0.14.1 and {scale:g} to later releases",
        "if MLX-LM 0.14.2 or later trained the adapter, remove alpha from the file; else replace "
        f"both by scale {scale * alpha / rank:g}",
    )


def _number(parameters: JsonView, name: str, where: str) -> float:
    """Return a number of lora_parameters that is not 0."""
    value = parameters.get(name)
    if not is_number(value) or value == 0:
        raise LoraFxError(
            f"{where}: {name} of lora_parameters is {value!r}; expected a number that is not 0",
            "correct the file",
        )
    return float(value)
