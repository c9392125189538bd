"""A backbone as an ONNX file: images of any number and size go in, CLS and patch features come out.

Shape suffixes: B images, P patches, D width.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoscope.export.exportable import Exportable, quiet
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["OPSET", "write_onnx"]

OPSET = 20  # of 2023: the first with a whole GELU
INPUT, OUTPUTS = "images", ("cls", "patches")
_LARGEST_IN_ONE_FILE = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB


class _ClsAndPatches(nn.Module):
    """What the file computes."""

    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, D), (B, P, D)."""
        features = self.backbone.forward_features(images)
        return features["cls"], features["patches"]


def write_onnx(model: Exportable, backbone: DinoVisionTransformer, folder: Path) -> dict[str, Any]:
    """Writes model.onnx, and model.onnx.data beside it where weights are too many for one file.

    Args:
        model: What is exported.
        backbone: The same as a module, float32, on the CPU.
        folder: An existing folder.

    Returns:
        What model.json says of the export: opset, names and shapes, how images are to be normalised.
    """
    patch = backbone.patch_size
    program = _traced(backbone)
    said = {
        "opset": OPSET,
        "input": INPUT,
        "input_shape": ["batch", backbone.settings.in_chans, f"{patch}*h", f"{patch}*w"],
        "input_values": "RGB in 0..1, minus mean, divided by std, float32",
        "outputs": {"cls": ["batch", model.settings.embed_dim], "patches": ["batch", "h*w", model.settings.embed_dim]},
        "bytes_of_weights": sum(tensor.nbytes for tensor in model.state.values()),
    }
    _describe(program.model, model, said)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(folder / "model.onnx", external_data=size > _LARGEST_IN_ONE_FILE)
    return said


def _traced(backbone: DinoVisionTransformer) -> Any:
    """The program of torch's exporter, with sizes of images as multiples of the patch size, which RoPE divides by."""
    patch = backbone.patch_size
    height, width = torch.export.Dim("h", min=1, max=4096), torch.export.Dim("w", min=1, max=4096)
    sizes = {0: torch.export.Dim("batch", min=1, max=65536), 2: patch * height, 3: patch * width}
    # neither 0 nor 1, nor two alike: the exporter takes such sizes for constants, or for the same
    example = torch.zeros(2, backbone.settings.in_chans, 3 * patch, 4 * patch)
    with quiet("onnx_ir", "onnxscript"), warnings.catch_warnings():  # the exporter tells hundreds of lines
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return torch.onnx.export(
            _ClsAndPatches(backbone).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes={INPUT: sizes},
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )


def _describe(program: Any, model: Exportable, said: dict[str, Any]) -> None:
    """Says in the file what a user must know, and removes what the exporter tells of the machine it ran on."""
    import onnx_ir

    program.graph.outputs[1].shape = onnx_ir.Shape(["batch", "h*w", model.settings.embed_dim])
    for node in program.graph.all_nodes():
        node.metadata_props.clear()  # lines of our code, with their paths
    for value in (*program.graph.inputs, *program.graph.outputs, *program.graph.initializers.values()):
        value.metadata_props.clear()
    program.graph.metadata_props.clear()
    program.metadata_props.clear()
    told = {
        "input_values": said["input_values"],
        "mean": model.card["mean"],
        "std": model.card["std"],
        "arch": model.settings.arch,
        "weights_sha256": model.card["weights_sha256"],
        "license_note": model.card["license_note"] or "",
    }
    program.metadata_props.update({key: str(value) for key, value in told.items()})
