"""A model file -> a folder that other tools open: Hugging Face, timm or ONNX, checked before it appears."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dinoscope.errors import ConfigError, WeightsError
from dinoscope.export.exportable import FORMAT_NAMES, Exportable, as_exportable, model_of
from dinoscope.export.hugging_face import write_hugging_face
from dinoscope.export.onnx_model import write_onnx
from dinoscope.export.readme import SIGNATURE, write_readme
from dinoscope.export.timm_model import write_timm
from dinoscope.export.verify import require_library, verify
from dinoscope.files import atomic_folder, read_json, write_json, writing
from dinoscope.models.tensor_files import find_weights
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import ModelFile, read_model_file, state_digest

__all__ = ["export_model"]

_log = logging.getLogger(__name__)
_FILES = {
    "config.json", "model.json", "model.onnx", "model.onnx.data", "model.safetensors", "preprocessor_config.json",
    "README.md", "verification.json",
}  # fmt: skip
_LEFT_BY_DESKTOPS = {".DS_Store", "Thumbs.db", "desktop.ini"}


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
        ConfigError: The other library is not installed, the folder holds other things or the weights themselves, or it
            cannot be written.
    """
    output = Path(output)
    with writing(output, ConfigError, SafetensorError):
        _refuse_other_contents(output)
    _refuse_the_weights(output, find_weights(Path(weights).expanduser()))
    file = read_model_file(weights)
    model = as_exportable(file, format)
    require_library(format)
    for note in model.notes:
        _log.warning("%s: %s", file.path.name, note)
    ours = _reference(file, model)
    with writing(output, ConfigError, SafetensorError), atomic_folder(output) as folder:
        said = _write(format, model, ours, folder)
        exported = {"format": format, **said, "weights_sha256_before": state_digest(file.backbone)}
        write_json(folder / "model.json", model.card | {"export": exported})
        write_readme(format, model, said, folder)
        if format != "onnx" and state_digest(read_model_file(folder).backbone) != model.card["weights_sha256"]:
            raise WeightsError(f"{output}: the tensors read back are not those that were written; nothing was changed")
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
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder")
    names = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    names = [name for name in names if name not in _LEFT_BY_DESKTOPS and not name.startswith("._")]
    if others := [name for name in names if name not in _FILES]:
        raise ConfigError(f"{output} holds {others[0]}, which is no part of an export: give a folder of its own")
    if names and not _is_export(output):
        raise ConfigError(f"{output} holds {names[0]}, which no export has left there: give a folder of its own")


def _is_export(folder: Path) -> bool:
    """Whether an export made it; of one that is to be made again, Snakemake leaves README.md alone."""
    for name, key in (("verification.json", "weights_sha256"), ("model.json", "export")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if key in read_json(folder / name):
                return True
    readme = folder / "README.md"
    return readme.is_file() and SIGNATURE in readme.read_text(encoding="utf-8", errors="replace")


def _refuse_the_weights(output: Path, weights: Path) -> None:
    """What is read must outlive the export: the file, and where it is a link, what it points to."""
    for path in (weights.parent.resolve() / weights.name, weights.resolve()):
        if output.resolve() in path.parents:
            raise ConfigError(f"{output} holds the weights {weights} and would be replaced: give another folder")
