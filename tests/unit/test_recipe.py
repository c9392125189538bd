"""Recipes: keys, types, inheritance, cross-checks."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dinoscope.config import RunConfig
from dinoscope.errors import ConfigError
from dinoscope.recipe import flatten, load_recipe, recipe_chain

RUNS = Path(__file__).resolve().parents[2] / "config" / "runs"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).optim.epochs > 0


def test_defaults_are_the_published_ones(shared: Path) -> None:
    published = yaml.safe_load((shared / "reference/published_keys.yaml").read_text())["defaults"]
    ours = flatten(OmegaConf.structured(RunConfig))
    assert {key: ours[key] for key in published if key in ours} == {
        key: published[key] for key in published if key in ours
    }


def test_every_published_default_loads(shared: Path, tmp_path: Path) -> None:
    """A complete YAML of the published trainer's defaults is accepted, key by key."""
    published = yaml.safe_load((shared / "reference/published_keys.yaml").read_text())["defaults"]
    overrides = OmegaConf.create({})
    for key, value in published.items():
        OmegaConf.update(overrides, key, value, force_add=True)
    path = write(tmp_path, "all.yaml", OmegaConf.to_yaml(overrides))
    assert flatten(load_recipe(path)) == flatten(OmegaConf.structured(RunConfig))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {lrr: 1}", "unknown key optim.lrr; did you mean optim.lr?"),
        ("optim: {lr: high}", "optim.lr is 'high'"),
        ("optim: 3", "optim holds keys of its own, but is 3"),
        ("optm: {lr: 1}", "unknown key optm; did you mean optim?"),
        ("student: {fp8_enabled: true}", "student.fp8_enabled is True, but only False is supported"),
        ("crops: {global_crops_size: 250}", "not a multiple of the patch size 16: use 240 or 256"),
        ("crops: {local_crops_scale: [0.5, 0.1]}", "crops.local_crops_scale"),
        ("crops: {gram_teacher_crops_size: 112}", "smaller than crops.global_crops_size (224)"),
        ("gram: {use_loss: true, tokens_used: masked, img_level: true}", "needs gram.img_level: false"),
        ("gram: {use_loss: true, ema_teacher: true, ckpt: x.pth}", "gram.ema_teacher"),
        ("student: {ffn_layer: relu}", "student.ffn_layer is 'relu'; choose one of mlp"),
        ("optim: {epochs: 5}", "optim.warmup_epochs (10) is longer than optim.epochs (5)"),
        ("checkpointing: {max_to_keep: 1}", "keep at least 2"),
        ("train: {seed: 1, seed: 2}", "stands twice"),
        ("- a list", "must hold keys and values"),
        ("a: [", "not valid YAML"),
        ("extends: nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, "recipe.yaml", text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_published_key_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    load_recipe(write(tmp_path, "recipe.yaml", "train: {dataset_path: 'ImageNet:split=TRAIN', seed: 1}"))
    assert [r.getMessage() for r in caplog.records] == [
        "recipe.yaml: train.dataset_path has no effect here (the workflow's manifest is the data set)"
    ]


def test_extends_is_merged_in_order(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "optim: {lr: 1e-3, clip_grad: 1.0}\ntrain: {seed: 4}")
    write(tmp_path, "b.yaml", "extends: a.yaml\noptim: {lr: 2e-3}")
    last = write(tmp_path, "c.yaml", "extends: b.yaml\noptim: {weight_decay: 0.1}")
    config = load_recipe(last, ["train.seed=5", "optim.min_lr=1e-7"])
    assert [path.name for path in recipe_chain(last)] == ["a.yaml", "b.yaml", "c.yaml"]
    assert (config.optim.lr, config.optim.clip_grad, config.optim.weight_decay) == (2e-3, 1.0, 0.1)
    assert (config.train.seed, config.optim.min_lr) == (5, 1e-7)


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError, match="cannot extend itself"):
        load_recipe(tmp_path / "a.yaml")


def test_a_bad_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="write key=value"):
        load_recipe(RUNS / "tiny.yaml", ["train.seed"])
    with pytest.raises(ConfigError, match=r"the command line: unknown key train\.sed"):
        load_recipe(RUNS / "tiny.yaml", ["train.sed=3"])
