"""A larger, frozen teacher that a smaller student learns from in place of its own EMA (`distillation.*`).

The teacher's heads say which prototypes a token belongs to, and the student's have as many. An exported teacher has
heads of its own; for a file that has none, as published ones, they are made (teacher_heads.py). The EMA of the student
goes on beside it and is what is exported (DINOv3, arXiv:2508.10104, section 5.2).
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dinoscope.errors import ConfigError
from dinoscope.models.heads import HeadShape
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import ModelFile, read_model_file

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = [
    "TeacherShape",
    "build_teacher",
    "check_teacher",
    "read_teacher",
    "sealed_teacher",
    "teacher_parts",
    "teacher_shape",
]

_HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class TeacherShape:
    """All that a teacher is built from before its weights are there.

    Attributes:
        settings: Of its backbone.
        heads: Of its heads, by name.
        made: Names of the heads that no file has, and that are made from features.
    """

    settings: ViTSettings
    heads: dict[str, HeadShape]
    made: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the seal of a run."""
        heads = {name: dataclasses.asdict(shape) for name, shape in self.heads.items()}
        return {"backbone": self.settings.as_dict(), "heads": heads, "made": list(self.made)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TeacherShape":
        """The inverse of as_dict."""
        heads = {name: HeadShape(**shape) for name, shape in values["heads"].items()}
        return cls(ViTSettings.from_dict(values["backbone"]), heads, tuple(values["made"]))


@functools.lru_cache(maxsize=1)  # a start asks for it several times; `read_teacher.cache_clear` gives its memory back
def read_teacher(path: str | Path) -> ModelFile:
    """Reads a teacher, with its heads if it has any.

    Raises:
        WeightsError: It cannot be read.
    """
    return read_model_file(path)


def teacher_shape(file: ModelFile, config: "RunConfig") -> TeacherShape:
    """What a file's tensors are the weights of; heads that it lacks have the recipe's bottleneck and prototypes."""
    heads = {}
    for name in _HEADS:
        section = config[name.removesuffix("_head")]
        bottleneck = section.head_bottleneck_dim
        made = HeadShape(section.head_n_prototypes, bottleneck, bottleneck, 1)
        heads[name] = HeadShape.of(file.heads[name]) if name in file.heads else made
    return TeacherShape(file.settings, heads, tuple(name for name in _HEADS if name not in file.heads))


def sealed_teacher(seal: dict[str, Any]) -> TeacherShape | None:
    """What the teacher that a run distils is built from, as its seal says; None where it distils none."""
    return TeacherShape.from_dict(seal["distilled"]) if seal.get("distilled") else None


def build_teacher(shape: TeacherShape) -> nn.ModuleDict:
    """Backbone and heads, empty."""
    heads = {name: head.build(shape.settings.embed_dim) for name, head in shape.heads.items()}
    return nn.ModuleDict({"backbone": DinoVisionTransformer(shape.settings), **heads})


def teacher_parts(file: ModelFile) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of `build_teacher`'s parts, as far as the file has them."""
    parts = {"backbone": file.backbone, **{name: file.heads[name] for name in _HEADS if name in file.heads}}
    return {part: {name: tensor.float() for name, tensor in state.items()} for part, state in parts.items()}


def check_teacher(file: ModelFile, config: "RunConfig") -> None:
    """Compares a teacher with the recipe of its student.

    Raises:
        ConfigError: They have other patches, numbers of prototypes or colours; names the key and both values.
    """
    shape = teacher_shape(file, config)
    pairs = [("student.patch_size", config.student.patch_size, shape.settings.patch_size)]
    pairs += [
        (f"{key}.head_n_prototypes", config[key].head_n_prototypes, shape.heads[f"{key}_head"].num_prototypes)
        for key in ("dino", "ibot")
    ]
    for key, of_card in (("crops.rgb_mean", "mean"), ("crops.rgb_std", "std")):
        if of_card in file.card:
            pairs.append((key, list(config.crops[key.removeprefix("crops.")]), list(file.card[of_card])))
    differing = [f"{key} is {ours}, the teacher's is {theirs}" for key, ours, theirs in pairs if ours != theirs]
    if differing:
        raise ConfigError(
            f"distillation.checkpoint_path {file.path.name}: {'; '.join(differing)}; set the recipe to the same"
        )
