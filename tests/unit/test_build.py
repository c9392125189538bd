"""build_backbone: a run's settings become student and teacher."""

from pathlib import Path

import pytest
import torch

import dinoscope
from dinoscope.errors import ConfigError

TEXT = "student: {arch: vit_nano, n_storage_tokens: 3}\ncrops: {rgb_mean: [0.5, 0.5, 0.5]}\ntrain: {seed: 7}\n"


def test_student_and_teacher_start_equal(tmp_path: Path) -> None:
    recipe = tmp_path / "config.yaml"
    recipe.write_text(TEXT)
    student, teacher, width = dinoscope.build_backbone(recipe)
    image = torch.randn(2, 3, 32, 48)
    assert width == 64
    assert student.training and not teacher.training
    assert teacher.mean == (0.5, 0.5, 0.5)
    assert {p.requires_grad for p in teacher.parameters()} == {False}
    assert torch.equal(student.eval()(image), teacher(image))
    assert teacher.forward_features(image)["storage"].shape == (2, 3, 64)
    again = dinoscope.build_backbone(recipe).teacher
    assert torch.equal(again(image), teacher(image))
    recipe.write_text(TEXT.replace("seed: 7", "seed: 8"))
    assert not torch.equal(dinoscope.build_backbone(recipe).teacher(image), teacher(image))


def test_a_wrong_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("student: {arch: vit_nan}")
    with pytest.raises(ConfigError, match="choose one of"):
        dinoscope.build_backbone(tmp_path / "config.yaml")
