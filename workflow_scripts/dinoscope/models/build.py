"""Empty-handed start: the backbones that a run's settings describe, for a notebook."""

from pathlib import Path
from typing import NamedTuple

import torch

from dinoscope.models.registry import settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import load_recipe

__all__ = ["BuiltBackbone", "build_backbone"]


class BuiltBackbone(NamedTuple):
    """Student and teacher with equal weights, and their width D."""

    student: DinoVisionTransformer
    teacher: DinoVisionTransformer
    embed_dim: int


def build_backbone(config: str | Path) -> BuiltBackbone:
    """Backbones at random initialisation, drawn from the recipe's `train.seed`.

    Args:
        config: A recipe, or config.yaml in the folder of a run.

    Returns:
        The student in training mode, the teacher in eval mode and without gradients, and the width of their features.

    Raises:
        ConfigError: The recipe is wrong.
    """
    recipe = load_recipe(config)
    settings = settings_from_config(recipe.student)
    student, teacher = DinoVisionTransformer(settings), DinoVisionTransformer(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        student.init_weights()
    teacher.load_state_dict(student.state_dict())
    for model in (student, teacher):
        model.mean, model.std = tuple(recipe.crops.rgb_mean), tuple(recipe.crops.rgb_std)
    return BuiltBackbone(student, teacher.eval().requires_grad_(False), settings.embed_dim)
