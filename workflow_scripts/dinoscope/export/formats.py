"""A model file -> a folder that other tools open: Hugging Face, timm or ONNX, checked before it appears."""

import logging
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError
from dinoscope.export.exportable import FORMAT_NAMES, Exportable, as_exportable, model_of
from dinoscope.export.hugging_face import write_hugging_face
from dinoscope.export.onnx_model import write_onnx
from dinoscope.export.readme import write_readme
from dinoscope.export.timm_model import write_timm
from dinoscope.export.verify import require_library, verify
from dinoscope.files import atomic_folder, write_json
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import ModelFile, read_model_file, state_digest

__all__ = ["export_model"]

_log = logging.getLogger(__name__)
_FILES = {
    "config.json", "model.json", "model.onnx", "model.onnx.data", "model.safetensors", "preprocessor_config.json",
    "README.md", "verification.json",
}  # fmt: skip


def export_model(weights: str | Path, format: str, output: str | Path) -> dict[str, Any]:
    """Writes a model in another library's format and opens it there; the folder appears only if features agree.

    Args:
        weights: Any file or folder that `read_model_file` reads.
        format: "hf", "timm" or "onnx".
        output: Folder to write; what an earlier export has left there is replaced.

    Returns:
        The content of verification.json, which lies in the folder too.

    Raises:
        WeightsError: The format cannot express the model, or the other library gives other features.
        ConfigError: The other library is not installed, or the folder holds other things.
    """
    output = Path(output)
    _refuse_other_contents(output)
    file = read_model_file(weights)
    model = as_exportable(file, format)
    require_library(format)
    for note in model.notes:
        _log.warning("%s: %s", file.path.name, note)
    ours = _reference(file, model)
    with atomic_folder(output) as folder:
        said = _write(format, model, ours, folder)
        exported = {"format": format, **said, "weights_sha256_before": state_digest(file.backbone)}
        write_json(folder / "model.json", model.card | {"export": exported})
        write_readme(format, model, said, folder)
        if format != "onnx":
            assert state_digest(read_model_file(folder).backbone) == model.card["weights_sha256"], (
                "not what was written"
            )
        report = verify(format, folder, model, ours)
        write_json(folder / "verification.json", report)
    apart = max(entry["max_relative_difference"] for entry in report["outputs"].values())
    _log.info(
        "%s: %s, %s; %s %s differs by %.1e at most",
        output.name,
        FORMAT_NAMES[format],
        model.settings.arch,
        report["library"]["name"],
        report["library"]["version"],
        apart,
    )
    return report


def _reference(file: ModelFile, model: Exportable) -> DinoVisionTransformer:
    """Our model as the file has it, with all that is left out of the export; only RoPE periods are not rounded."""
    state = {name: tensor.float() for name, tensor in file.backbone.items()}
    state["rope_embed.periods"] = model.state["rope_embed.periods"].clone()
    return model_of(file.settings, state, file)


def _write(format: str, model: Exportable, ours: DinoVisionTransformer, folder: Path) -> dict[str, Any]:
    if format == "onnx":
        return write_onnx(model, ours, folder)
    return {"hf": write_hugging_face, "timm": write_timm}[format](model, folder)


def _refuse_other_contents(output: Path) -> None:
    """An export replaces a whole folder, so that folder must be its own."""
    if output.is_dir() and (others := sorted(entry.name for entry in output.iterdir() if entry.name not in _FILES)):
        raise ConfigError(f"{output} holds {others[0]}, which is no part of an export: give a folder of its own")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder")
