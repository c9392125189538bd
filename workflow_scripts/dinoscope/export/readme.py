"""README.md of an export: what the model is, and the lines that open it."""

from pathlib import Path
from typing import Any

from dinoscope.export.exportable import FORMAT_NAMES, Exportable
from dinoscope.files import write_text
from dinoscope.models.card import PUBLISHED_ORIGIN

__all__ = ["write_readme"]

_USE = {
    "hf": """from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{folder}")  # without torchvision, too
model = AutoModel.from_pretrained("{folder}").eval()
out = model(**processor(Image.open("tile.png").convert("RGB"), return_tensors="pt"))
cls, patches = out.pooler_output, out.last_hidden_state[:, {num_prefix}:]  # (B, {width}), (B, P, {width})""",
    "timm": """import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))  # for images of Pillow
cls = model(images)  # images (B, {channels}, H, W), prepared -> (B, {width})
patches = model.forward_features(images)[:, {num_prefix}:]  # (B, P, {width})""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
cls, patches = session.run(["cls", "patches"], {{"images": images}})
# images: float32 (B, {channels}, H, W), normalised as below -> (B, {width}), (B, P, {width})""",
}
_TAGS = {"hf": "transformers", "timm": "timm", "onnx": "onnx"}


def write_readme(format: str, model: Exportable, said: dict[str, Any], folder: Path) -> None:
    """Writes README.md into the folder of an export.

    Args:
        format: "hf", "timm" or "onnx".
        model: What is exported.
        said: What model.json says of the export.
        folder: An existing folder.
    """
    settings, card = model.settings, model.card
    use = _USE[format].format(
        folder=".", num_prefix=1 + settings.num_storage_tokens, width=settings.embed_dim, channels=settings.in_chans
    )
    license_line = "license: other\nlicense_name: dinov3-license\n" if PUBLISHED_ORIGIN in card["origin"] else ""
    name = f" (`{said['timm_name']}`)" if said.get("timm_name") and not said["timm_arguments"] else ""
    lines = [
        f"---\nlibrary_name: {_TAGS[format]}\npipeline_tag: image-feature-extraction\n{license_line}---",
        f"# {card.get('run') or settings.arch}: a DINOv3 backbone, for {FORMAT_NAMES[format]}{name}",
        f"```python\n{use}\n```",
        f"Images are RGB in 0..1, minus {card['mean']}, divided by {card['std']}; height and width are multiples of "
        f"{settings.patch_size} px. `model.json` tells how the model was made, `verification.json` how far its "
        "features are from those of dinoscope.",
        card["license_note"] or "",
        *(f"Note: {note}." for note in model.notes),
    ]
    write_text(folder / "README.md", "\n\n".join(line for line in lines if line) + "\n")
