"""Weights with the names of Hugging Face and timm, as those libraries write them: all of it is taken, or nothing."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoscope.errors import WeightsError
from dinoscope.files import read_json, write_json
from dinoscope.models.foreign import HUGGING_FACE, TIMM, Dialect, detect_dialect, from_foreign, to_foreign
from dinoscope.models.registry import ViTSettings
from dinoscope.models.weights import load_backbone, read_model_file, state_digest
from other_libraries import random_backbone, require, save_transformers, timm_model, tokens_of, transformers_model

SMALL = ViTSettings(64, 2, 2, 256, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16", rope_rescale=2.0)
IMAGES = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A folder as transformers writes it."""
    require("transformers")
    save_transformers(transformers_model("vit_nano"), tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def test_a_hugging_face_folder_in_every_form(hugging_face: Path, tmp_path: Path) -> None:
    expected = load_backbone(hugging_face)
    assert expected.settings == SMALL
    model = require("transformers").DINOv3ViTModel.from_pretrained(hugging_face)
    save_transformers(model, tmp_path / "shards", max_shard_size="150KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tensors = {
        name.replace("layer.", "model.layer."): t for name, t in load_file(hugging_face / "model.safetensors").items()
    }
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "config.json").write_bytes((hugging_face / "config.json").read_bytes())
    torch.save(tensors, tmp_path / "memory" / "any_name.pth")  # names as in memory
    for path in (hugging_face / "model.safetensors", tmp_path / "shards", tmp_path / "memory" / "any_name.pth"):
        loaded = load_backbone(path)
        assert loaded.settings == SMALL
        assert torch.equal(tokens_of(loaded, IMAGES), tokens_of(expected, IMAGES))


def test_a_missing_shard_is_named(hugging_face: Path, tmp_path: Path) -> None:
    model = require("transformers").DINOv3ViTModel.from_pretrained(hugging_face)
    save_transformers(model, tmp_path / "shards", max_shard_size="150KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=rf"{re.escape(shard.name)}, which is not beside it"):
        load_backbone(tmp_path / "shards")


def test_the_config_tells_what_no_tensor_can(hugging_face: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]}
    write_json(hugging_face / "preprocessor_config.json", images)
    change_config(hugging_face, rope_theta=25.0, layer_norm_eps=1e-6, pos_embed_rescale=None, num_attention_heads=4)
    with caplog.at_level(logging.WARNING):
        loaded = load_backbone(hugging_face)
    assert caplog.messages == []  # nothing had to be assumed
    wanted = {"rope_base": 25.0, "norm_layer": "layernorm", "rope_rescale": None, "num_heads": 4}
    assert loaded.settings == dataclasses.replace(SMALL, **wanted)
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    torch.testing.assert_close(loaded.rope_embed.periods, 25.0 ** (torch.arange(4) / 4))


def test_without_a_config_the_assumptions_are_said_in_one_line(
    hugging_face: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (hugging_face / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert load_backbone(hugging_face).settings == SMALL
    (message,) = caplog.messages
    for part in ("num_heads (taken: 2", "rope_base (taken: 100.0)", "layernormbf16", "mean and std of the images"):
        assert part in message
    assert "mask_token" not in message


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"num_hidden_layers": 3}, r"tensors say depth = 2, but config\.json says 3"),
    ({"intermediate_size": 128}, r"tensors say ffn_hidden = 256, but config\.json says 128"),
    ({"num_register_tokens": 0}, "num_storage_tokens = 4"),
    ({"layer_norm_eps": 1e-3}, r"layer_norm_eps is 0\.001"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"use_gated_mlp": True}, "hidden_act is 'gelu'"),
    ({"model_type": "dinov2"}, "model of type 'dinov2'"),
    ({"num_attention_heads": 5}, "5 cannot be it at width 64"),
])  # fmt: skip
def test_a_config_of_another_model_is_refused(hugging_face: Path, changes: dict, sentence: str) -> None:
    change_config(hugging_face, **changes)
    with pytest.raises(WeightsError, match=sentence):
        load_backbone(hugging_face)


@pytest.mark.parametrize(("lost", "sentence"), [
    ("layer.1.mlp.up_proj.weight", r"lacks tensors of a Hugging Face.*: layer\.1\.mlp\.up_proj\.weight"),
    ("layer.0.attention.q_proj.bias", r"lacks tensors.*: layer\.0\.attention\.q_proj\.bias"),
    ("layer.1.attention.k_proj.weight", r"lacks tensors.*: layer\.1\.attention\.k_proj\.weight"),
    ("layer.*.attention.v_proj.bias", r"lacks.*layer\.0\.attention\.v_proj\.bias, layer\.1\.attention\.v_proj\.bias"),
    ("layer.*.norm1.weight", r"lacks tensors for a vit_nano backbone: blocks\.0\.norm1\.weight"),
    ("norm.bias", r"lacks tensors for a vit_nano backbone: norm\.bias"),
    ("embeddings.patch_embeddings.weight", r"no complete DINOv3 backbone: 'patch_embed\.proj\.weight'"),
    ("layer.1.*", r"tensors say depth = 1, but config\.json says 2"),
    ("layer.0.*", r"lacks tensors of a Hugging Face.*: layer\.0\."),
])  # fmt: skip
def test_half_a_model_is_refused(hugging_face: Path, lost: str, sentence: str) -> None:
    tensors = load_file(hugging_face / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not Path(name).match(lost)}
    assert len(kept) < len(tensors)
    save_file(kept, hugging_face / "model.safetensors")
    with pytest.raises(WeightsError, match=sentence):
        load_backbone(hugging_face)


def test_tensors_of_another_kind_are_refused_by_name(hugging_face: Path) -> None:
    tensors = load_file(hugging_face / "model.safetensors")
    save_file(tensors | {"classifier.weight": torch.ones(2)}, hugging_face / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unknown tensors for a Hugging Face DINOv3 backbone: classifier\.weight"):
        load_backbone(hugging_face)


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    """A state dict as torch.save writes it."""
    require("timm")
    torch.save(timm_model("vit_small", depth=2).state_dict(), tmp_path / "any_name.pth")
    return tmp_path / "any_name.pth"


def test_timm_state_dict(timm_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_backbone(timm_file)
    (message,) = caplog.messages
    for part in ("num_heads (taken: 6", "mask_token (taken: zeros)", "rope_base (taken: 100.0)", "layernormbf16"):
        assert part in message
    assert (loaded.settings.num_heads, loaded.settings.qkv_bias) == (6, False)
    assert not loaded.mask_token.any()
    save_file(torch.load(timm_file), timm_file.with_name("model.safetensors"))  # a folder as on timm's hub
    trained_with = {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    write_json(timm_file.with_name("config.json"), {"architecture": "x", "pretrained_cfg": trained_with})
    again = load_backbone(timm_file.parent)
    assert again.mean == (0.43, 0.411, 0.296)
    assert torch.equal(tokens_of(again, IMAGES), tokens_of(loaded, IMAGES))


def test_timm_models_that_are_no_dinov3_are_refused(timm_file: Path, tmp_path: Path) -> None:
    state = torch.load(timm_file)
    torch.save(state | {"pos_embed": torch.ones(1, 5, 384)}, tmp_path / "dinov2.pth")
    torch.save({k: v for k, v in state.items() if k != "blocks.1.gamma_2"}, tmp_path / "half.pth")
    width = {k: torch.ones([24 if n == 384 else n for n in v.shape]) for k, v in state.items()}
    torch.save(width, tmp_path / "width.pth")
    for name, sentence in {
        "dinov2.pth": "unknown tensors for a timm DINOv3 backbone: pos_embed",
        "half.pth": r"lacks tensors of a timm DINOv3 backbone: blocks\.1\.gamma_2",
        "width.pth": "no tensor of a timm backbone tells the number of heads",
    }.items():
        with pytest.raises(WeightsError, match=sentence):
            load_backbone(tmp_path / name)


def test_a_model_json_beside_a_timm_file_tells_what_it_does_not(timm_file: Path) -> None:
    told = {"backbone": {"num_heads": 12, "norm_layer": "layernorm"}, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    write_json(timm_file.with_name("model.json"), told)
    loaded = load_backbone(timm_file)
    assert (loaded.settings.num_heads, loaded.settings.norm_layer, loaded.mean) == (12, "layernorm", (0.1, 0.2, 0.3))
    assert loaded.rope_embed.periods.shape == (8,)


@pytest.mark.parametrize("dialect", [HUGGING_FACE, TIMM], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("changes", [
    {},
    {"ffn_layer": "swiglu", "ffn_hidden": 176},
    {"qkv_bias": False, "mask_k_bias": False, "proj_bias": False, "ffn_bias": False},
    {"num_storage_tokens": 0},
], ids=["mlp", "swiglu", "no biases", "no storage tokens"])  # fmt: skip
def test_there_and_back(dialect: Dialect, changes: dict) -> None:
    state = random_backbone(dataclasses.replace(SMALL, **changes)).state_dict()
    foreign = to_foreign(state, dialect)
    assert detect_dialect(foreign) is dialect
    assert detect_dialect(state) is None
    back = from_foreign(foreign, dialect, "test")
    lost = state.keys() - back.keys()
    assert lost == ({"rope_embed.periods"} | ({"mask_token"} if dialect is TIMM else set()))
    assert back.keys() <= state.keys()
    for name, tensor in back.items():
        expected = state[name]
        if name.endswith("qkv.bias"):
            expected = expected * state[f"{name}_mask"]
        assert torch.equal(tensor, expected), name


def test_what_the_other_side_cannot_hold_is_refused() -> None:
    unmasked = random_backbone(dataclasses.replace(SMALL, mask_k_bias=False)).state_dict()
    assert "layer.0.attention.k_proj.bias" in to_foreign(unmasked, HUGGING_FACE)
    with pytest.raises(WeightsError, match="timm has no place for the key bias"):
        to_foreign(unmasked, TIMM)
    untied = random_backbone(dataclasses.replace(SMALL, untie_cls_and_patch_norms=True)).state_dict()
    for dialect in (HUGGING_FACE, TIMM):
        with pytest.raises(WeightsError, match=r"has no names for cls_norm\.bias, cls_norm\.weight"):
            to_foreign(untied, dialect)
    local = random_backbone(dataclasses.replace(SMALL, untie_global_and_local_cls_norm=True)).state_dict()
    assert not [name for name in to_foreign(local, TIMM) if "local" in name]  # without effect at inference


def test_the_same_weights_have_the_same_digest_in_every_form(tmp_path: Path) -> None:
    model = random_backbone(SMALL)
    for block in model.blocks:
        block.attn.qkv.bias.data[64:128] = 0  # of the keys: what is masked is not stored elsewhere
    torch.save(model.state_dict(), tmp_path / "published.pth")
    torch.save(to_foreign(model.state_dict(), HUGGING_FACE), tmp_path / "hf.pth")
    digests = {state_digest(read_model_file(tmp_path / name).backbone) for name in ("published.pth", "hf.pth")}
    assert len(digests) == 1
