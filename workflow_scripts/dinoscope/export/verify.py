"""Whether an export gives our features when the library that it is meant for opens it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import ConfigError, WeightsError
from dinoscope.export.exportable import FORMAT_NAMES, Exportable, quiet
from dinoscope.files import read_json
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["TOLERANCES", "require_library", "verify"]

# Largest difference over the largest value of our output.
TOLERANCES = {"hf": 1e-5, "timm": 1e-5, "onnx": 1e-4}
SEED = 0
# Images, patches downwards, patches across: square and not, several at once and one.
_SIZES = ((1, 14, 14), (2, 6, 6), (2, 10, 4), (3, 3, 7))
_LIBRARIES = {"hf": ("transformers",), "timm": ("timm",), "onnx": ("onnxscript", "onnxruntime")}

Features = dict[str, Tensor]


@dataclass(frozen=True)
class _Opened:
    """An export as another library opened it."""

    library: str
    version: str
    features: Callable[[Tensor], Features]


def require_library(format: str) -> None:
    """Raises ConfigError where what checks the format is not installed; before anything is written."""
    for name in _LIBRARIES[format]:
        _imported(name, format)


def verify(format: str, folder: Path, model: Exportable, ours: DinoVisionTransformer) -> dict[str, Any]:
    """Compares an export's features of seeded random images with ours.

    Args:
        format: "hf", "timm" or "onnx".
        folder: The export.
        model: What was exported.
        ours: Our model with the very weights and settings of the file, but for rounded RoPE periods.

    Returns:
        The content of verification.json.

    Raises:
        WeightsError: A difference is beyond the tolerance.
    """
    images = _images(ours)
    expected = [_our_features(ours, batch) for batch in images]
    opened = _OPENERS[format](folder, model)
    found = [opened.features(batch) for batch in images]
    outputs = _differences(found, expected)
    tolerance = TOLERANCES[format]
    beyond = [name for name, entry in outputs.items() if not entry["max_relative_difference"] <= tolerance]
    if beyond:
        shown = ", ".join(f"{name} by {outputs[name]['max_relative_difference']:.2g}" for name in beyond)
        raise WeightsError(
            f"the {FORMAT_NAMES[format]} export does not give our features: {opened.library} {opened.version} differs "
            f"in {shown} of the largest value, allowed are {tolerance:g}; nothing was written"
        )
    report = {
        "format": format,
        "weights_sha256": model.card["weights_sha256"],
        "library": {"name": opened.library, "version": opened.version},
        "torch": torch.__version__,
        "seed": SEED,
        "inputs": [list(batch.shape) for batch in images],
        "outputs": outputs,
        "tolerance": tolerance,
        "passed": True,
        "notes": list(model.notes),
    }
    if format == "hf":
        report["images"] = _check_images(folder, model)
    if model.rounded_periods is not None:
        report["by_rounded_rope_periods"] = _by_rounding(ours, model.rounded_periods, images, expected)
    return report


def _images(ours: DinoVisionTransformer) -> list[Tensor]:
    """Batches (B, C, H, W) of normal noise, as normalised images are."""
    generator, patch = torch.Generator().manual_seed(SEED), ours.patch_size
    sizes = [(batch, ours.settings.in_chans, rows * patch, columns * patch) for batch, rows, columns in _SIZES]
    return [torch.randn(size, generator=generator) for size in sizes]


@torch.inference_mode()
def _our_features(ours: DinoVisionTransformer, images: Tensor) -> Features:
    return ours.forward_features(images)


def _differences(found: list[Features], expected: list[Features]) -> dict[str, dict[str, float]]:
    """The largest absolute difference of each output over all batches, and its share of the largest value."""
    report = {}
    for name in found[0]:
        apart, largest = 0.0, 0.0
        for theirs, ours in zip(found, expected, strict=True):
            if theirs[name].shape != ours[name].shape:
                shapes = f"{list(theirs[name].shape)} in place of {list(ours[name].shape)}"
                raise WeightsError(f"the export does not give our features: {name} has shape {shapes}")
            if ours[name].numel():  # storage tokens may be none
                difference = (theirs[name].double() - ours[name].double()).abs().max().item()
                apart = max(apart, float("inf") if difference != difference else difference)
                largest = max(largest, ours[name].abs().max().item())
        report[name] = {"max_abs_difference": apart, "max_relative_difference": apart / max(largest, 1e-30)}
    return report


def _by_rounding(
    ours: DinoVisionTransformer, periods: Tensor, images: list[Tensor], exact: list[Features]
) -> dict[str, dict[str, float]]:
    """How far our own features are from the export's by the rounding of the RoPE periods alone."""
    kept = ours.rope_embed.periods.clone()
    ours.rope_embed.periods.copy_(periods)
    rounded = [_our_features(ours, batch) for batch in images]
    ours.rope_embed.periods.copy_(kept)
    return _differences(exact, rounded)


def _open_hugging_face(folder: Path, model: Exportable) -> _Opened:
    library = _imported("transformers", "hf")
    library.utils.logging.disable_progress_bar()
    theirs, loading = library.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if odd := [f"{kind}: {names}" for kind, names in loading.items() if names]:
        raise WeightsError(f"transformers {library.__version__} does not take the export as it is: {'; '.join(odd)}")
    num_prefix = 1 + model.settings.num_storage_tokens

    @torch.inference_mode()
    def features(images: Tensor) -> Features:
        output = theirs(images)
        tokens = output.last_hidden_state
        return {"cls": output.pooler_output, "storage": tokens[:, 1:num_prefix], "patches": tokens[:, num_prefix:]}

    theirs.eval()
    return _Opened("transformers", library.__version__, features)


def _open_timm(folder: Path, model: Exportable) -> _Opened:
    from safetensors.torch import load_file

    library = _imported("timm", "timm")
    with quiet("timm"):
        theirs = library.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    num_prefix = 1 + model.settings.num_storage_tokens

    @torch.inference_mode()
    def features(images: Tensor) -> Features:
        tokens = theirs.forward_features(images)
        parts = {"storage": tokens[:, 1:num_prefix], "patches": tokens[:, num_prefix:]}
        return {"cls": theirs(images), **parts}  # with its pooling

    return _Opened("timm", library.__version__, features)


def _open_onnx(folder: Path, model: Exportable) -> _Opened:
    library = _imported("onnxruntime", "onnx")
    session = library.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (images_name,) = (given.name for given in session.get_inputs())

    def features(images: Tensor) -> Features:
        arrays = session.run(names, {images_name: images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return _Opened("onnxruntime", library.__version__, features)


def _check_images(folder: Path, model: Exportable) -> dict[str, Any]:
    """Compares what AutoImageProcessor makes of a tile, without torchvision, with our normalisation."""
    import numpy as np
    from PIL import Image

    side = read_json(folder / "preprocessor_config.json")["size"]["height"]
    if model.settings.in_chans != 3:
        return {"checked": False}
    tile = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), dtype=np.uint8)
    library = _imported("transformers", "hf")
    processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    found = processor(Image.fromarray(tile), return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    expected = (torch.from_numpy(tile) / 255 - torch.tensor(model.card["mean"])) / torch.tensor(model.card["std"])
    apart = (found - expected).abs().max().item()
    if found.shape != expected.shape or not apart < 1e-5:
        raise WeightsError(
            f"{type(processor).__name__} of transformers normalises images otherwise: by up to {apart:.2g}"
        )
    return {"checked": True, "processor": type(processor).__name__, "max_abs_difference": apart}


def _imported(name: str, format: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
        if name == "transformers":
            _ = module.AutoModel, module.AutoImageProcessor  # they are imported when they are asked for
    except (ImportError, RuntimeError, OSError) as error:  # the last two: libraries that do not fit each other
        raise ConfigError(
            f"exporting to {format} needs {name}, which cannot be imported here ({str(error).splitlines()[0]}): "
            'pip install "dinoscope[export]", or take the environment envs/export.yaml'
        ) from None
    return module


_OPENERS = {"hf": _open_hugging_face, "timm": _open_timm, "onnx": _open_onnx}
