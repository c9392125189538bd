"""Model files of every kind, and what is refused."""

import dataclasses
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dinoscope.config import StudentConfig
from dinoscope.errors import WeightsError
from dinoscope.export.convert import write_initial_weights
from dinoscope.export.describe import describe_fit
from dinoscope.export.model_files import write_model
from dinoscope.files import read_json, write_json
from dinoscope.models.card import backbone_card
from dinoscope.models.foreign import HUGGING_FACE, to_foreign
from dinoscope.models.registry import ARCHS, ViTSettings, settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_backbone, read_model_file, state_digest
from dinoscope.recipe import load_recipe, resolve_recipe
from dinoscope.train.starting import Start

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = ViTSettings(
    64, 2, 2, 256, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16", rope_rescale=2.0
)


@pytest.fixture
def model() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(PUBLISHED)
    model.init_weights()
    return model.eval()


def flat(model: DinoVisionTransformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def exported(model: DinoVisionTransformer) -> dict[str, dict[str, torch.Tensor]]:
    heads = {"dino_head.last_layer.weight": torch.ones(3, 2), "ibot_head.last_layer.weight": torch.ones(3, 2)}
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in flat(model).items()} | heads}


def test_every_kind_of_file_gives_the_same_features(model: DinoVisionTransformer, tmp_path: Path) -> None:
    image = torch.randn(2, 3, 48, 32)
    torch.save(flat(model), tmp_path / "dinov3_vits16_pretrain.pth")
    torch.save(exported(model), tmp_path / "teacher.pth")
    save_file(flat(model), tmp_path / "model.safetensors")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "final.json", {"teacher": "../teacher.pth"})
    for name in ("dinov3_vits16_pretrain.pth", "teacher.pth", "model.safetensors", "", "run"):
        loaded = load_backbone(tmp_path / name)
        assert loaded.settings == model.settings
        assert torch.equal(loaded(image), model(image)), name
    assert set(read_model_file(tmp_path / "teacher.pth").heads) == {"dino_head", "ibot_head"}


@pytest.mark.parametrize("changes", [
    {"ffn_layer": "swiglu", "ffn_hidden": 176},
    {"qkv_bias": False, "mask_k_bias": False},
    {"num_storage_tokens": 0, "layerscale": None},
    {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    {"proj_bias": False, "ffn_bias": False, "patch_size": 8, "num_heads": 4},
])  # fmt: skip
def test_settings_are_read_off_the_tensors(changes: dict, tmp_path: Path) -> None:
    model = DinoVisionTransformer(dataclasses.replace(PUBLISHED, **changes))
    model.init_weights()
    torch.save(flat(model), tmp_path / "any_name.pth")
    assert load_backbone(tmp_path / "any_name.pth").settings == model.settings


def test_the_card_tells_what_no_tensor_can(model: DinoVisionTransformer, tmp_path: Path) -> None:
    settings = dataclasses.replace(PUBLISHED, norm_layer="layernorm", rope_normalize_coords="max", layerscale=0.1)
    torch.save(flat(model), tmp_path / "teacher.pth")
    card = {"backbone": settings.as_dict(), "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    write_json(tmp_path / "model.json", card)
    loaded = load_backbone(tmp_path / "teacher.pth")
    assert loaded.settings == settings
    assert loaded.mean == (0.1, 0.2, 0.3)
    write_json(tmp_path / "model.json", card | {"backbone": settings.as_dict() | {"depth": 7}})
    with pytest.raises(WeightsError, match=r"tensors say depth = 2, but model\.json says 7"):
        load_backbone(tmp_path / "teacher.pth")


def test_the_teacher_is_taken_of_several_networks(model: DinoVisionTransformer, tmp_path: Path) -> None:
    """As `convert_checkpoint.py --branch all` writes them."""
    teacher = exported(model)["teacher"]
    student = {name: torch.zeros_like(tensor) for name, tensor in teacher.items()}
    networks = {"teacher": teacher, "student": student, "gram_teacher": {"backbone.cls_token": torch.ones(1)}}
    flat = {f"{network}.{name}": tensor for network, state in networks.items() for name, tensor in state.items()}
    save_file(flat, tmp_path / "all.safetensors")
    torch.save(networks, tmp_path / "all.pth")
    image = torch.randn(2, 3, 48, 32)
    for name in ("all.safetensors", "all.pth"):
        file = read_model_file(tmp_path / name)
        assert torch.equal(load_backbone(tmp_path / name)(image), model(image))
        assert set(file.heads) == {"dino_head", "ibot_head"}
        assert (file.kind, file.origin) == ("teacher export", "not recorded")
    refused = {
        "half": {name: tensor for name, tensor in flat.items() if not name.startswith("teacher.ibot_head.")},
        "more": flat | {"teacher.optimizer": torch.ones(2)},
        "distilled": flat | {"model_ema.backbone.cls_token": torch.ones(1)},  # then the teacher is another model
    }
    for name, tensors in refused.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match="whole training state"):
            read_model_file(tmp_path / f"{name}.safetensors")


def test_the_origin_is_what_the_card_or_else_the_kind_tells(model: DinoVisionTransformer, tmp_path: Path) -> None:
    torch.save(exported(model), tmp_path / "teacher.pth")
    torch.save(flat(model), tmp_path / "flat.pth")
    save_file(flat(model), tmp_path / "flat.safetensors", {"format": "pt"})
    write_model(tmp_path / "ours" / "teacher.pth", {"teacher": {"backbone": flat(model)}},
                backbone_card(PUBLISHED, None, flat(model), "a seed"))  # fmt: skip
    for suffix in (".pth", ".safetensors"):
        assert read_model_file(tmp_path / "ours" / f"teacher{suffix}").origin == "a seed"
    (tmp_path / "ours" / "model.json").unlink()
    for name, origin in {
        "teacher.pth": "not recorded",
        "ours/teacher.pth": "not recorded",
        "ours/teacher.safetensors": "not recorded",
        "flat.pth": "published weights",
        "flat.safetensors": "published weights",
    }.items():
        assert read_model_file(tmp_path / name).origin == origin, name
        assert Start(tmp_path / name, None, None).origin() == origin
        assert Start(None, None, None, tmp_path / name).origin() == f"random initialisation, distilled from {origin}"


def test_starting_weights_do_not_claim_an_origin(model: DinoVisionTransformer, tmp_path: Path) -> None:
    torch.save(exported(model), tmp_path / "teacher.pth")
    student = {"arch": "vit_nano", "n_storage_tokens": 4, "mask_k_bias": True, "norm_layer": "layernormbf16"}
    made_from = {"MODEL": {"WEIGHTS": str(tmp_path / "teacher.pth")}}
    write_initial_weights(
        resolve_recipe([("test", {"student": student} | made_from)], "test"), tmp_path / "base" / "t.pth"
    )
    card = read_json(tmp_path / "base" / "model.json")
    assert card["origin"] == "not recorded"
    assert card["license_note"].startswith("If the training")


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("model.json", "", r"model\.json cannot be read as JSON"),
    ("model.json", '{"backbone": ', r"model\.json cannot be read as JSON \(Expecting value"),
    ("model.json", "[1]", r"model\.json holds JSON of type list"),
    ("model.json", '{"backbone": null}', r'model\.json: "backbone" is None; wanted: settings by name'),
    ("config.json", "{", r"config\.json cannot be read as JSON"),
    ("preprocessor_config.json", "\x00", r"preprocessor_config\.json cannot be read as JSON"),
    ("final.json", "{", r"final\.json cannot be read as JSON"),
    ("model.safetensors.index.json", "{", r"model\.safetensors\.index\.json cannot be read as JSON"),
])  # fmt: skip
def test_damaged_json_is_named(
    model: DinoVisionTransformer, tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    if "index" not in name:
        torch.save(to_foreign(flat(model), HUGGING_FACE), tmp_path / "teacher.pth")
    write_json(tmp_path / "config.json", {"model_type": "dinov3_vit"})
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=sentence):
        load_backbone(tmp_path)


def test_what_is_not_whole_is_refused(model: DinoVisionTransformer, tmp_path: Path) -> None:
    whole = flat(model)
    without = {name: tensor for name, tensor in whole.items() if name != "blocks.1.attn.proj.weight"}
    bad = {name: (tensor * float("nan") if name == "norm.weight" else tensor) for name, tensor in whole.items()}
    training_state = {f"student.backbone.{name}": tensor for name, tensor in whole.items()}
    cases = {
        "missing.pth": (without, r"lacks tensors for a vit_nano backbone: blocks\.1\.attn\.proj\.weight"),
        "extra.pth": (whole | {"lm_head": torch.ones(2)}, "has unknown tensors.*lm_head"),
        "shape.pth": (whole | {"norm.weight": torch.ones(3)}, r"wrongly shaped.*norm\.weight"),
        "nan.pth": (bad, r"norm\.weight holds values that are not finite"),
        "state.pth": (training_state, "whole training state; give the exported teacher"),
        "other.pth": ({"fc.weight": torch.ones(2)}, "holds no DINOv3 backbone"),
        "list.pth": ([torch.ones(2)], "holds an object of type list"),
    }
    for name, (content, sentence) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=sentence):
            load_backbone(tmp_path / name)


def test_files_that_cannot_be_read_are_refused(model: DinoVisionTransformer, tmp_path: Path) -> None:
    torch.save(flat(model), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    for name, sentence in {
        "cut.pth": "cannot be read",
        "empty.pth": "it is empty",
        "text.pth": "cannot be read",
        "cut.safetensors": "damaged or cut short",
        "nowhere.pth": "does not exist",
        "dcp": r"training checkpoint \(DCP\); give the exported teacher",
        "": r"neither teacher\.pth, nor model\.safetensors, nor the final\.json",
    }.items():
        with pytest.raises(WeightsError, match=sentence):
            load_backbone(tmp_path / name)


def test_half_a_model_is_refused_by_whatever_reads_it(model: DinoVisionTransformer, tmp_path: Path) -> None:
    tensors = exported(model)["teacher"]
    lost = "backbone.blocks.1.mlp.fc2.bias"
    torch.save({"teacher": {k: v for k, v in tensors.items() if k != lost}}, tmp_path / "half.pth")
    torch.save({"teacher": tensors | {"decoder.weight": torch.ones(2)}}, tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=r"lacks tensors.*: blocks\.1\.mlp\.fc2\.bias"):
        read_model_file(tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"beside the backbone that are unknown: decoder\.weight"):
        read_model_file(tmp_path / "more.pth")
    torch.save(flat(model) | {"rope_embed.periods": torch.ones(3)}, tmp_path / "periods.pth")
    with pytest.raises(WeightsError, match=r"'rope_embed\.periods' is missing or misshapen"):
        read_model_file(tmp_path / "periods.pth")


def test_rope_periods_are_read_off_the_tensors(model: DinoVisionTransformer, tmp_path: Path) -> None:
    ends = dataclasses.replace(PUBLISHED, rope_base=None, rope_min_period=0.5, rope_max_period=30.0)
    for name, settings in {"base": dataclasses.replace(PUBLISHED, rope_base=25.0), "ends": ends}.items():
        other = DinoVisionTransformer(settings)
        other.init_weights()
        torch.save(flat(other), tmp_path / f"{name}.pth")
        read = load_backbone(tmp_path / f"{name}.pth").settings
        again = DinoVisionTransformer(read)
        again.init_weights()
        torch.testing.assert_close(again.rope_embed.periods, other.rope_embed.periods)
    rounded = model.rope_embed.periods.bfloat16()
    torch.save(flat(model) | {"rope_embed.periods": rounded}, tmp_path / "rounded.pth")
    loaded = load_backbone(tmp_path / "rounded.pth")
    assert loaded.settings == PUBLISHED
    assert torch.equal(loaded.rope_embed.periods, rounded.float())
    torch.save(flat(model), tmp_path / "teacher.pth")
    write_json(tmp_path / "model.json", {"backbone": dataclasses.replace(PUBLISHED, rope_base=30.0).as_dict()})
    with pytest.raises(WeightsError, match=r"RoPE periods go from 1 to 56.*settings say base 30\.0"):
        load_backbone(tmp_path / "teacher.pth")


def test_what_had_to_be_assumed_is_said_in_one_line(
    model: DinoVisionTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(flat(model), tmp_path / "dinov3_vits16_pretrain.pth")
    with caplog.at_level(logging.WARNING):
        load_backbone(tmp_path / "dinov3_vits16_pretrain.pth")
        (message,) = caplog.messages
        assert "norm_layer (taken: layernormbf16)" in message and "mean and std of the images" in message
        assert "num_heads" not in message and "rope_base" not in message
        caplog.clear()
        write_json(tmp_path / "model.json", {"backbone": PUBLISHED.as_dict(), "mean": [0.4] * 3, "std": [0.2] * 3})
        load_backbone(tmp_path / "dinov3_vits16_pretrain.pth")
        assert caplog.messages == []


def run_check(*arguments: object) -> subprocess.CompletedProcess:
    script = REPOSITORY / "workflow_scripts" / "check_weights.py"
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def test_check_weights_says_what_a_file_is(model: DinoVisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    file = tmp_path / "named" / "teacher.pth"
    torch.save(exported(model), file)
    card = {"backbone": PUBLISHED.as_dict(), "mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    write_json(file.with_name("model.json"), card)
    said = run_check(file)
    assert said.returncode == 0, said.stderr
    rows = {tuple(line.split(maxsplit=1)) for line in said.stdout.splitlines() if len(line.split(maxsplit=1)) == 2}
    table = {name: " ".join(value.split()) for name, value in rows}
    parameters = sum(p.numel() for p in model.parameters())
    assert table["kind"] == "teacher export"
    assert table["parameters"] == f"{parameters:,}"
    assert table["heads"] == "dino_head (3 prototypes), ibot_head (3 prototypes)"
    assert table["norm_layer"] == "layernormbf16 model.json"
    assert table["depth"] == "2 tensors"
    assert state_digest(flat(model)) in said.stdout
    recipe = tmp_path / "fits.yaml"
    recipe.write_text(said.stdout.split("says:")[1])  # what it prints is a recipe
    assert list(describe_fit(read_model_file(file), load_recipe(recipe))) == []
    settings = settings_from_config(load_recipe(recipe).student)
    assert dataclasses.replace(settings, drop_path_rate=0.0) == PUBLISHED


@pytest.mark.parametrize(("changes", "sentence"), [
    ("arch: vit_micro", "depth is 2 in the file and 6 in the recipe"),
    ("n_storage_tokens: 0", "num_storage_tokens is 4 in the file and 0 in the recipe"),
    ("pos_embed_rope_base: 50", r"RoPE periods from 1 to 56.*the recipe asks for base 50"),
])  # fmt: skip
def test_a_recipe_that_contradicts_the_tensors_does_not_fit(
    changes: str, sentence: str, model: DinoVisionTransformer, tmp_path: Path
) -> None:
    torch.save(flat(model), tmp_path / "file.pth")
    student = {"arch": "vit_nano", "n_storage_tokens": 4, "mask_k_bias": True} | yaml.safe_load(changes)
    recipe = resolve_recipe([("test", {"student": student})], "test")
    with pytest.raises(WeightsError, match=sentence):
        list(describe_fit(read_model_file(tmp_path / "file.pth"), recipe))


def test_check_weights_notes_what_differs_and_fails_on_what_does_not_fit(
    model: DinoVisionTransformer, tmp_path: Path
) -> None:
    torch.save(flat(model), tmp_path / "file.pth")
    write_json(tmp_path / "model.json", {"backbone": PUBLISHED.as_dict(), "mean": [0.4] * 3, "std": [0.2] * 3})
    student = "arch: vit_nano, n_storage_tokens: 4, norm_layer: layernorm, pos_embed_rope_rescale_coords: 2"
    (tmp_path / "notes.yaml").write_text(f"student: {{{student}, mask_k_bias: true, pos_embed_rope_dtype: fp32}}\n")
    (tmp_path / "misfit.yaml").write_text(f"student: {{{student}, mask_k_bias: false}}\n")
    said = run_check(tmp_path / "file.pth", "--config", tmp_path / "notes.yaml")
    assert said.returncode == 0, said.stderr
    (last,) = (part for part in said.stdout.split("\n\n") if "fits this file" in part)
    notes = last.strip().splitlines()[1:]
    assert notes == [
        "note: student.norm_layer is layernorm in the recipe, but the weights were made with layernormbf16",
        "note: crops.rgb_mean is 0.485, 0.456, 0.406 in the recipe, but 0.4, 0.4, 0.4 was used for the weights",
        "note: crops.rgb_std is 0.229, 0.224, 0.225 in the recipe, but 0.2, 0.2, 0.2 was used for the weights",
    ]
    (tmp_path / "model.json").unlink()  # as with a published file: nothing tells
    recipe = load_recipe(tmp_path / "notes.yaml")
    assert list(describe_fit(read_model_file(tmp_path / "file.pth"), recipe)) == [
        "student.norm_layer is layernorm in the recipe, but published models have layernormbf16"
    ]
    said = run_check(tmp_path / "file.pth", "--config", tmp_path / "misfit.yaml")
    assert said.returncode == 1
    assert "mask_k_bias is True in the file and False in the recipe" in said.stderr
    assert "Traceback" not in said.stderr


def test_the_table_of_architectures_is_true() -> None:
    text = (REPOSITORY / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(vit_\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\w+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    assert [row[0] for row in rows] == list(ARCHS)
    for name, *sizes, ffn, hidden, millions in rows:
        student = StudentConfig(arch=name, n_storage_tokens=4, mask_k_bias=True, qkv_bias=name != "vit_7b")
        settings = settings_from_config(student)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DinoVisionTransformer(settings).parameters())
        assert [int(size) for size in sizes] == [settings.embed_dim, settings.depth, settings.num_heads]
        assert (int(hidden), ffn) == (settings.ffn_hidden, ARCHS[name].ffn or "any")
        assert float(millions) == round(parameters / 1e6, 1)
    published = set(re.findall(r"^\| `dinov3_\w+` \| `(\w+)` \|", text, re.MULTILINE))
    assert published <= set(ARCHS) and len(published) == 6


class Malicious:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return (exit, (3,))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"cls_token": Malicious()}))
    with pytest.raises(WeightsError, match="cannot be read"):
        load_backbone(tmp_path / "evil.pth")


def test_digest_depends_on_values_and_names_alone() -> None:
    first = {"a": torch.arange(4.0), "b": torch.ones(2)}
    assert state_digest(first) == state_digest({"b": torch.ones(2), "a": torch.arange(8.0)[:4]})
    assert state_digest(first) != state_digest({"a": torch.arange(4.0), "c": torch.ones(2)})
    assert state_digest(first) != state_digest({"a": torch.arange(4.0).reshape(2, 2), "b": torch.ones(2)})
