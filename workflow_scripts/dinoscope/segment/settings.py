"""What a training of a segmenter is told: all that changes its weights, sealed in its folder. Nothing imports torch.

A training that was begun keeps to its settings, its encoder and its data: anything else is refused, at planning time
already (rules/segment.smk), in a sentence that names the key.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError, SealError
from dinoscope.files import read_json, write_json

__all__ = [
    "FINAL_NAME",
    "SEAL_NAME",
    "STATE_NAME",
    "TrainSettings",
    "check_segment_seal",
    "default_views",
    "multiples_in_words",
    "nearest_multiples",
    "rounded_img_dim",
    "seal_segmenter",
    "variant_name",
]

SEAL_NAME, STATE_NAME, FINAL_NAME = "run_config.json", "state.pt", "final.json"
DECODERS, TRAINABLE, INFERENCE = (
    ("linear", "fpn", "public_fpn", "public_fpn3"),
    ("lora", "decoder", "last_n", "full"),
    ("slide", "resize"),
)
# Options of annotated slides that are places on disk: what lies there is sealed, and results tell nothing of it.
_PLACES = ("slides", "annotations")
_WAY_OUT = "give the task a new name, or delete this folder to start over"


@dataclass(frozen=True)
class TrainSettings:
    """All that the weights of a segmenter depend on, besides its encoder and the pixels of its data.

    Attributes:
        dataset: voc, ade20k, folder or slides.
        data: Options of the data set that say which images and classes it has (no places on disk).
        trainable: What is trained beside the decoder: lora (adapters), decoder (nothing), last_n (the
            last blocks), full (the whole encoder).
        decoder: linear or fpn.
        last_n: Blocks that last_n trains.
        rank: Of the adapters.
        alpha: They are scaled by alpha / rank; None: by 1.
        targets: Projections that are adapted.
        blocks: Blocks that are adapted; None: all.
        img_dim: Height and width of a training view and of a window, px of the image.
        epochs: Passes over the training images.
        batch_size: Images a step, over all processes.
        lr: Highest learning rate.
        decoder_lr: That of the decoder; None: lr.
        min_lr: Lowest learning rate, a share of the highest.
        weight_decay: Of AdamW; vectors (biases, scales) have none.
        warmup_epochs: Epochs in which the rate rises from zero.
        clip_grad: Largest norm of the gradient; 0: none.
        dice_weight: Weight of the Dice term beside cross-entropy.
        class_weights: None, "balanced" (by the inverse of each class's pixels), or a number a class.
        views: How training views are drawn: photographs or pathology (segment/transforms.py).
        augmentation: What differs from that.
        inference: slide (windows over the image at its own size) or resize (the whole image brought to img_dim).
        overlap: Share of a window that the next one covers again.
        eval_epochs: Epochs between two validations.
        precision: auto, float32 or bfloat16.
        seed: Of the decoder, the adapters and all draws.
    """

    dataset: str = "folder"
    data: Mapping[str, Any] = field(default_factory=dict)
    trainable: str = "lora"
    decoder: str = "linear"
    last_n: int = 1
    rank: int = 3
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None
    img_dim: tuple[int, int] = (224, 224)
    epochs: int = 50
    batch_size: int = 12
    lr: float = 1e-3
    decoder_lr: float | None = None
    min_lr: float = 0.0
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    clip_grad: float = 1.0
    dice_weight: float = 0.0
    class_weights: str | tuple[float, ...] | None = None
    views: str = "pathology"
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    inference: str = "slide"
    overlap: float = 1 / 3
    eval_epochs: int = 1
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        for name, known in (("decoder", DECODERS), ("trainable", TRAINABLE), ("inference", INFERENCE)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} is {value!r}; choose from {', '.join(known)}")
        for name in ("epochs", "batch_size", "rank", "last_n", "eval_epochs"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value}; at least 1 is wanted")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap is {self.overlap}; a share of a window from 0 to below 1 is wanted")
        if self.lr <= 0 or (self.decoder_lr is not None and self.decoder_lr <= 0):
            raise ConfigError(f"lr is {self.lr} and decoder_lr {self.decoder_lr}; give rates above 0")
        for name in ("min_lr", "weight_decay", "warmup_epochs", "clip_grad", "dice_weight"):
            if not (value := getattr(self, name)) >= 0:
                raise ConfigError(f"{name} is {value}; 0 or more is wanted")
        if self.min_lr > 1:
            raise ConfigError(f"min_lr is {self.min_lr}; it is a share of lr, from 0 to 1")
        weights = self.class_weights
        if (
            weights
            and not isinstance(weights, str)
            and not (min(weights) >= 0 and math.isfinite(sum(weights)) and sum(weights))
        ):
            raise ConfigError(f"class_weights is {list(weights)}; give numbers of 0 or more, not all of them 0")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ConfigError(f"class_weights is {self.class_weights!r}; give balanced, a number a class, or nothing")

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it. What only adapters need is left out where there are none, and where data lie, always."""
        values = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        values["data"] = {key: value for key, value in values["data"].items() if key not in _PLACES}
        if self.trainable != "lora":
            for name in ("rank", "alpha", "targets", "blocks"):
                del values[name]
        if self.trainable != "last_n":
            del values["last_n"]
        return values


def variant_name(trainable: str, decoder: str, seed: int) -> str:
    """The folder of one way to train, in the workflow's results."""
    return f"{trainable}_{decoder}_seed{seed}"


def default_views(dataset: str) -> str:
    """How views of a kind of data set are drawn where nothing is said."""
    return "photographs" if dataset in ("voc", "ade20k") else "pathology"


def nearest_multiples(size: int, patch: int) -> tuple[int, int]:
    """The multiples of a patch below and above a size, the lower one at least one patch."""
    below = max(patch, size // patch * patch)
    return below, max(below, -(-size // patch) * patch)


def multiples_in_words(size: int, patch: int) -> str:
    """The same for messages: 304 or 320."""
    return " or ".join(str(each) for each in dict.fromkeys(nearest_multiples(size, patch)))


def rounded_img_dim(img_dim: tuple[int, int], patch: int) -> tuple[tuple[int, int], str | None]:
    """The nearest size of whole patches, and a sentence about it where it is another.

    A ViT that cuts patches by a strided convolution drops what is left over, so that 308 px in patches of 16 px are
    304 px to it; the public tool's example is of that kind.
    """
    nearest = tuple(min(nearest_multiples(size, patch), key=lambda found: abs(found - size)) for size in img_dim)
    if nearest == tuple(img_dim):
        return nearest, None
    named = ", ".join(dict.fromkeys(multiples_in_words(size, patch) for size in img_dim if size % patch))
    return nearest, (
        f"img_dim {img_dim[0]} {img_dim[1]} is no multiple of the encoder's patches of {patch} px; the nearest are "
        f"{named}: {nearest[0]} {nearest[1]} is taken"
    )


def seal_segmenter(
    run_dir: Path, settings: TrainSettings, encoder_sha256: str, data_sha256: str, start_sha256: str | None = None
) -> None:
    """Seals a training that begins, or refuses to go on with one that was begun in another way.

    Args:
        run_dir: Its folder.
        settings: What is sealed.
        encoder_sha256: Of the encoder.
        data_sha256: Of images and masks.
        start_sha256: Of the weights of the segmenter that it begins with, if any.

    Raises:
        SealError: Settings, encoder, data or first weights differ from those of the start.
    """
    inputs = {"encoder": encoder_sha256, "data": data_sha256, "start": start_sha256}
    if (run_dir / STATE_NAME).is_file() or (run_dir / FINAL_NAME).is_file():
        check_segment_seal(run_dir, settings)
        sealed = read_json(run_dir / SEAL_NAME)["inputs"]
        words = {"encoder": "another encoder", "data": "other images or masks", "start": "other first weights"}
        for name, now in inputs.items():
            if (was := sealed.get(name)) != now:
                raise SealError(
                    f"segmenter {_name(run_dir)} was begun with {words[name]} ({(was or 'none')[:8]}, now "
                    f"{(now or 'none')[:8]}); put them back, {_WAY_OUT}"
                )
        return
    write_json(run_dir / SEAL_NAME, {"version": 1, "inputs": inputs, "settings": settings.as_dict()})


def check_segment_seal(run_dir: Path, settings: TrainSettings) -> None:
    """Compares settings with those that a training was begun with; one that has saved nothing yet passes.

    Raises:
        SealError: Names the key, the old and the new value, and the way out.
    """
    if not ((run_dir / STATE_NAME).is_file() or (run_dir / FINAL_NAME).is_file()):
        return
    if not (run_dir / SEAL_NAME).is_file():
        raise SealError(f"segmenter {_name(run_dir)} was begun, but its {SEAL_NAME} is gone; put it back, {_WAY_OUT}")
    old, new = read_json(run_dir / SEAL_NAME)["settings"], settings.as_dict()
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:3])
        more = f", and {len(changed) - 3} more keys" if len(changed) > 3 else ""
        raise SealError(
            f"segmenter {_name(run_dir)} was begun with other settings: {shown}{more}; change them back, {_WAY_OUT}"
        )


def _name(run_dir: Path) -> str:
    return "/".join(run_dir.parts[-3:])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
