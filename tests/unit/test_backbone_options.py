"""Options of the backbone that no library has, against the plain float64 formulas of naive_vit.py."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dinoscope.models.registry import ViTSettings, settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import resolve_recipe
from naive_vit import naive_forward
from other_libraries import random_backbone, relative_error, tokens_of

BOUND = 1e-5  # of float32, relative to the largest value: that of the parity with other libraries
BASE = ViTSettings(48, 2, 3, 96, num_storage_tokens=4, norm_layer="layernormbf16")
OPTIONS = {
    "mask_k_bias": {"mask_k_bias": True},
    "key bias": {"mask_k_bias": False},
    "layernorm": {"norm_layer": "layernorm"},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "untied patch norm": {"untie_cls_and_patch_norms": True},
    "untied local norm": {"untie_global_and_local_cls_norm": True},
    "both untied": {
        "untie_cls_and_patch_norms": True,
        "untie_global_and_local_cls_norm": True,
        "norm_layer": "rmsnorm",
    },
    "RoPE periods by ends": {"rope_base": None, "rope_min_period": 0.7, "rope_max_period": 40.0},
    "RoPE base": {"rope_base": 17.0},
    "longer side": {"rope_normalize_coords": "max"},
    "shorter side": {"rope_normalize_coords": "min"},
    "swiglu": {"ffn_layer": "swiglu", "ffn_hidden": 128},
    "no qkv bias": {"qkv_bias": False, "mask_k_bias": False},
    "no output bias": {"proj_bias": False},
    "no FFN bias": {"ffn_bias": False},
    "no FFN bias, swiglu": {"ffn_layer": "swiglu", "ffn_bias": False},
    "no storage tokens": {"num_storage_tokens": 0},
    "no LayerScale": {"layerscale": None},
    "patch 8": {"patch_size": 8},
}


ARITHMETIC = ("mask_k_bias", "layernorm", "untied local norm", "RoPE periods by ends", "RoPE base", "longer side",
              "shorter side")  # fmt: skip


def build(name: str) -> DinoVisionTransformer:
    """A model with the option; its tokens start so small that the norms' eps counts."""
    model = random_backbone(dataclasses.replace(BASE, **OPTIONS[name]))
    for parameter in (model.cls_token, *model.patch_embed.parameters()):
        parameter.data *= 0.01
    return model


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(64, 64), (32, 80)], ids=["square", "wide"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_equals_the_formulas(name: str, size: tuple[int, int]) -> None:
    model, pixels = build(name), image(*size)
    expected = torch.from_numpy(naive_forward(model, pixels))
    assert relative_error(tokens_of(model, pixels[None])[0], expected) < BOUND


@pytest.mark.parametrize("name", ARITHMETIC)
def test_the_comparison_would_see_an_option_without_effect(name: str) -> None:
    model, pixels = build(name), image(32, 80)
    without = SimpleNamespace(settings=BASE, state_dict=model.state_dict)
    local = name == "untied local norm"
    with_option, plain = (torch.from_numpy(naive_forward(m, pixels, local=local)) for m in (model, without))
    assert relative_error(plain, with_option) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", ["untied local norm", "both untied"])
def test_norm_of_local_crops_in_training(name: str, local: bool) -> None:
    model, pixels = build(name).train(), image(32, 48)
    output = model.forward_crops([pixels[None]], local=[local])[0]
    tokens = torch.cat([output.cls_BD[:, None], output.storage_BRD, output.patches_BPD], 1)[0]
    assert relative_error(tokens, torch.from_numpy(naive_forward(model, pixels, local=local))) < BOUND


@pytest.mark.parametrize(
    ("kind", "hidden"), [("swiglu", 176), ("swiglu32", 192), ("swiglu64", 192), ("swiglu128", 256)]
)
def test_width_of_a_gated_ffn(kind: str, hidden: int) -> None:
    """Two thirds of 4·64 are 170, rounded up to the multiple."""
    student = {"arch": "vit_nano", "ffn_layer": kind, "n_storage_tokens": 4, "pos_embed_rope_dtype": "fp32"}
    model = random_backbone(settings_from_config(resolve_recipe([("test", {"student": student})], "test").student))
    assert model.blocks[0].mlp.w1.weight.shape == (hidden, 64)
    pixels = image(32, 48)
    expected = torch.from_numpy(naive_forward(model, pixels))
    assert relative_error(tokens_of(model, pixels[None])[0], expected) < BOUND
