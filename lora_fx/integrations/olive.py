"""A pass of Olive (olive-ai) that exports a model with adapters, as `lora_fx.export` does.

Olive finds passes by a package config. `python -m lora_fx.integrations.olive` prints one: that of
the installed Olive, with this pass as LoraFxExport. Facts: olive-ai 0.13.0, package_config.py,
passes/olive_pass.py and model/utils/onnx_utils.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler, PyTorchModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.export import export

NAME = "LoraFxExport"
ENTRY = {
    "module_path": f"lora_fx.integrations.olive.{NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
}
"""The pass in a package config."""


class LoraFxExport(Pass):  # type: ignore[misc]
    """Insert adapters into a PyTorch or ONNX model, and write an ONNX file that is proven equal.

    Files of adapters that the export writes beside the model are carried on to the next passes as
    the model's additional files.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "adapters": PassConfigParam(
                type_=dict[str, str] | str,
                default_value=None,
                description="Adapters by name, each a path in any format that lora-fx reads; in "
                "mode merged one path.",
            ),
            "mode": PassConfigParam(
                type_=str,
                default_value="merged",
                description="The mode of lora_fx.export: merged, switch, batch or load.",
            ),
            "options": PassConfigParam(
                type_=dict[str, Any],
                default_value=None,
                description="Other arguments of lora_fx.export by name, such as rank or target.",
            ),
        }

    def _run_for_config(
        self, model: PyTorchModelHandler | ONNXModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        """Export one model into Olive's folder."""
        path = Path(resolve_onnx_path(output_model_path))
        options = {**(config.options or {}), "mode": config.mode, "adapters": config.adapters}
        if isinstance(model, ONNXModelHandler):
            export(model.model_path, path, **options)
        elif isinstance(model, PyTorchModelHandler):
            module = model.load_model(cache_model=False).eval()
            args, kwargs = _example(model.get_dummy_inputs())
            export(module, path, args, kwargs, **options)
        else:
            raise LoraFxError(
                f"{NAME} takes a PyTorchModel or an ONNXModel of Olive, not a "
                f"{type(model).__name__}",
                "put Olive's OnnxConversion or ModelBuilder before it",
            )
        beside = [file for file in path.parent.iterdir() if file.suffix != ".data" and file != path]
        attributes = {**(model.model_attributes or {})}
        known = attributes.get("additional_files") or []
        attributes["additional_files"] = sorted({*known, *map(str, beside)})
        return ONNXModelHandler(
            model_path=str(path.parent), onnx_file_name=path.name, model_attributes=attributes
        )


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of the example inputs in the forms that Olive has them."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def package_config() -> dict[str, Any]:
    """Return the package config of the installed Olive with this pass."""
    text = Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    config["passes"][NAME] = ENTRY
    return config


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=1))
