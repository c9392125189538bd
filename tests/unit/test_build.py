"""build_backbone: a run's settings become student and teacher; and what `dinoscope` itself offers."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import dinoscope
from dinoscope.errors import ConfigError
from dinoscope.models import build, weights

LIBRARY = Path(__file__).resolve().parents[2] / "workflow_scripts"
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
    with pytest.raises(ConfigError, match=r"is a folder; .*config\.yaml"):
        dinoscope.build_backbone(tmp_path)


def test_the_config_of_a_published_run_is_enough(shared: Path, tmp_path: Path) -> None:
    """Its resolved config.yaml names every key of the published trainer; only the model's matter here."""
    defaults = yaml.safe_load((shared / "reference/published_keys.yaml").read_text())["defaults"]
    changed = {"student.arch": "vit_small", "student.n_storage_tokens": 4, "student.ffn_layer": "swiglu"}
    tree = OmegaConf.create({})
    for key, value in (defaults | changed).items():
        OmegaConf.update(tree, key, value, force_add=True)
    OmegaConf.save(tree, tmp_path / "config.yaml")
    with torch.device("meta"):
        student, teacher, width = dinoscope.build_backbone(tmp_path / "config.yaml")
    assert width == 384 and len(student.blocks) == 12
    assert student.storage_tokens.shape == (1, 4, 384)
    assert student.blocks[0].mlp.w1.weight.shape == (1024, 384)
    assert teacher.state_dict().keys() == student.state_dict().keys()


def test_torch_is_imported_when_it_is_needed(tmp_path: Path) -> None:
    code = """
import sys
from dinoscope import __version__, build_backbone, load_backbone
heavy = {"torch", "omegaconf", "numpy", "pandas"} & sys.modules.keys()
assert not heavy, heavy
try:
    load_backbone("none.pth")
except ValueError as error:
    assert "none.pth does not exist" in str(error)
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(LIBRARY)})


@pytest.mark.parametrize(("outer", "inner"), [("load_backbone", weights), ("build_backbone", build)])
def test_what_the_package_offers_takes_what_it_stands_for(outer: str, inner: object) -> None:
    given = inspect.signature(getattr(dinoscope, outer)).parameters
    wanted = inspect.signature(getattr(inner, outer)).parameters
    assert [(name, p.default) for name, p in given.items()] == [(name, p.default) for name, p in wanted.items()]
    assert set(dinoscope.__all__) <= set(vars(dinoscope))
