"""Recipes: keys, types, inheritance, cross-checks."""

import contextlib
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from dinoscope.config import LinearCosineConfig, RunConfig, SchedulesConfig
from dinoscope.errors import ConfigError
from dinoscope.recipe import flatten, load_recipe, recipe_chain, require_weights
from dinoscope.recipe_checks import check_processes
from dinoscope.recipe_keys import IGNORED_KEYS, ONLY_VALUES, REPLACED_BY_SCHEDULES

RUNS = Path(__file__).resolve().parents[2] / "config" / "runs"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).optim.epochs > 0


def published_keys(shared: Path) -> dict[str, dict]:
    return yaml.safe_load((shared / "reference/published_keys.yaml").read_text())


def nested(keys: dict) -> DictConfig:
    tree = OmegaConf.create({})
    for key, value in keys.items():
        OmegaConf.update(tree, key, value, force_add=True)
    return tree


def test_defaults_are_the_published_ones(shared: Path) -> None:
    published = published_keys(shared)["defaults"]
    ours = flatten(OmegaConf.structured(RunConfig))
    common = published.keys() & ours.keys() - {"train.dataset_path"}  # ours names no data set of the published trainer
    assert {key: ours[key] for key in common} == {key: published[key] for key in common}


def test_every_published_default_loads(shared: Path, tmp_path: Path) -> None:
    """A complete YAML of the published trainer's defaults is accepted, key by key."""
    path = write(tmp_path, "all.yaml", OmegaConf.to_yaml(nested(published_keys(shared)["defaults"])))
    assert flatten(load_recipe(path)) == flatten(OmegaConf.structured(RunConfig))


def test_keys_of_published_recipes_load(shared: Path, tmp_path: Path) -> None:
    """With a section `schedules`, published recipes leave the keys that it replaces null."""
    keys = published_keys(shared)
    replaced = dict.fromkeys(REPLACED_BY_SCHEDULES)
    tree = nested(keys["defaults"] | {"gram.loss_weight_schedule": {}} | keys["only_in_recipes"] | replaced)
    config = load_recipe(write(tmp_path, "all.yaml", OmegaConf.to_yaml(tree)), ["optim.epochs=2000"])
    assert config.schedules.lr.end == 5e-5
    assert config.gram.loss_weight_schedule.warmup_epochs == 1000


def test_every_published_key_is_honoured_or_accounted_for_once(shared: Path) -> None:
    keys = published_keys(shared)
    ours = set(flatten(OmegaConf.structured(RunConfig)))
    schedules = flatten({"schedules": OmegaConf.to_container(OmegaConf.structured(SchedulesConfig))})
    gram = {f"gram.loss_weight_schedule.{field}" for field in flatten(OmegaConf.structured(LinearCosineConfig))}
    honoured = ours | set(schedules) | gram
    accounted = set(ONLY_VALUES) | set(IGNORED_KEYS)
    assert honoured.isdisjoint(accounted)
    assert set(ONLY_VALUES).isdisjoint(IGNORED_KEYS)
    for key in (*keys["defaults"], *keys["only_in_recipes"]):
        assert key in honoured | accounted or key.startswith("evaluation.config_files."), key
    for key in accounted - {"evaluation.config_files"}:
        assert key in keys["defaults"] | keys["only_in_recipes"], f"{key} is no published key"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {lrr: 1}", "unknown key optim.lrr; did you mean optim.lr?"),
        ("optim: {learning_rate: 1e-4}", "unknown key optim.learning_rate; optim has epochs, optimizer, adamw_beta1"),
        ("optim: {lr: high}", "optim.lr is 'high'; wanted is a number"),
        ("optim: {epochs: 2.5}", "optim.epochs is 2.5; wanted is a whole number"),
        ("train: {compile: maybe}", "train.compile is 'maybe'; wanted is true or false"),
        ("crops: {rgb_mean: [a, b, c]}", "crops.rgb_mean is ['a', 'b', 'c']; wanted is a list, each a number"),
        ("augmentation: {blur_p: much}", "augmentation.blur_p is 'much'; wanted is a list, each a number or null"),
        ("optim: {lr: null}", "optim.lr is null, but there is no section `schedules` to replace it"),
        ("student: {pretrained_weights: x.pth}", "only '' is supported: name the file as MODEL.WEIGHTS"),
        ("student: {arch: vit_smal}", "student.arch is 'vit_smal'; choose one of"),
        ("student: {trainable: some}", "student.trainable is 'some'; choose one of full, last_n, lora, norms"),
        ("student: {trainable: last_n}", "needs student.unfrozen_blocks, at least 1"),
        ("student: {unfrozen_blocks: 2}", "which student.trainable: full does not use"),
        ("student: {trainable: lora, unfrozen_blocks: 25}", "25, but vit_large has 24 blocks"),
        ("student: {trainable: lora, lora_targets: [q, values]}", "choose from q, k, v, qkv, proj, ffn"),
        ("dino: {kde_loss_weight: 0.05}", "both set; set one of them to 0"),
        ("dino: {koleo_topk: 3}", "act on distributed KoLeo alone"),
        ("dino: {koleo_loss_distributed: true, koleo_topk: 4, koleo_distributed_loss_group_size: 4}", "must be below"),
        ("train: {batch_size_per_gpu: 1}", "set it to at least 2, or dino.koleo_loss_distributed to true"),
        ("optim: {freeze_backbone_epochs: 95}", "(warm-up 10) are longer than optim.epochs (100)"),
        (
            "gram: {use_loss: true, loss_weight_schedule: {warmup_epochs: 200}}",
            "gram.loss_weight_schedule lasts longer",
        ),
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
    text = "train: {dataset_path: 'ImageNet:split=TRAIN', seed: 1}\nevaluation: {config_files: {high_freq: a}}"
    config = load_recipe(write(tmp_path, "recipe.yaml", text))
    assert config.train.dataset_path is None
    assert [r.getMessage() for r in caplog.records] == [
        "recipe.yaml: train.dataset_path ImageNet:split=TRAIN has no effect here (it names a data set of the published "
        "trainer)",
        "recipe.yaml: evaluation.config_files has no effect here (evaluation belongs to the workflow)",
    ]


@pytest.mark.parametrize(
    ("text", "processes", "sentence"),
    [
        ("koleo_loss_distributed: true, koleo_distributed_loss_group_size: 24", 2, "do not fill groups"),
        ("koleo_loss_distributed: true, koleo_topk: 32", 2, "fewer neighbours than dino.koleo_topk 32"),
        ("koleo_loss_weight: 0, kde_loss_weight: 0.1, kde_loss_distributed: true", 1, None),
        ("koleo_loss_distributed: true, koleo_distributed_loss_group_size: 32", 2, None),
    ],
)
def test_groups_must_fit_the_batch_of_all_processes(
    tmp_path: Path, text: str, processes: int, sentence: str | None
) -> None:
    recipe = f"train: {{batch_size_per_gpu: 16}}\ndino: {{{text}}}"
    config = load_recipe(write(tmp_path, "recipe.yaml", recipe))
    with pytest.raises(ConfigError, match=sentence) if sentence else contextlib.nullcontext():
        check_processes(config, processes)


def test_recipes_for_published_weights_never_start_from_scratch(tmp_path: Path) -> None:
    write(tmp_path, "small_lvd.yaml", "train: {seed: 1}")
    mine = write(tmp_path, "mine.yaml", "extends: small_lvd.yaml")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty: set it to the file"):
        require_weights(mine, load_recipe(mine))
    require_weights(mine, load_recipe(mine, ["MODEL.WEIGHTS=some.pth"]))
    plain = write(tmp_path, "plain.yaml", "train: {seed: 1}")
    require_weights(plain, load_recipe(plain))


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
