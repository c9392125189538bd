"""The backbone against plain float64 formulas, and its invariances."""

import dataclasses
import math

import pytest
import torch

from dinoscope.models.layers import BlockDraws
from dinoscope.models.registry import ARCHS, ViTSettings
from dinoscope.models.rope import CoordsChange, RotaryEmbedding2d, rotate
from dinoscope.models.vit import DinoVisionTransformer
from naive_vit import naive_forward

SMALL = ViTSettings(32, 2, 2, 128, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16")


def build(settings: ViTSettings = SMALL, seed: int = 0) -> DinoVisionTransformer:
    """A model with all parameters random, gammas and biases included."""
    generator = torch.Generator().manual_seed(seed)
    model = DinoVisionTransformer(settings)
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
@pytest.mark.parametrize("norm_layer", ["layernorm", "layernormbf16"])
def test_equals_the_formulas_in_float64(size: tuple[int, int], norm_layer: str) -> None:
    model = build(dataclasses.replace(SMALL, norm_layer=norm_layer))
    image = images(3, *size)
    out = model.forward_features(image[None])
    tokens = torch.cat([out["cls"][:, None], out["storage"], out["patches"]], 1)[0]
    expected = torch.from_numpy(naive_forward(model, image))
    assert (tokens - expected).abs().max() < 2e-5 * expected.abs().max()


def test_names_are_those_of_the_published_files() -> None:
    settings = dataclasses.replace(SMALL, untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    names = set(DinoVisionTransformer(settings).state_dict())
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.qkv.bias_mask", "attn.proj.weight"]
    block += ["attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias"]
    block += ["mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"]
    top = ["cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    top += ["rope_embed.periods"] + [
        f"{n}.{w}" for n in ("norm", "cls_norm", "local_cls_norm") for w in ("weight", "bias")
    ]
    assert names == {*top, *(f"blocks.{i}.{name}" for i in range(2) for name in block)}


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("vit_small", 21.6), ("vit_small_plus", 28.7), ("vit_base", 85.7), ("vit_large", 303.1), ("vit_huge_plus", 840.5),
     ("vit_7b", 6716.0)],
)  # fmt: skip
def test_parameter_counts_of_published_models(arch: str, millions: float) -> None:
    from dinoscope.models.registry import settings_from_config
    from dinoscope.recipe import resolve_recipe

    student = {"arch": arch, "n_storage_tokens": 4, "qkv_bias": arch != "vit_7b"}
    settings = settings_from_config(resolve_recipe([("test", {"student": student})], "test").student)
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
    assert settings.arch == arch
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_every_arch_has_a_head_width_for_rope() -> None:
    assert all(
        arch.embed_dim % arch.num_heads == 0 and arch.embed_dim // arch.num_heads % 4 == 0 for arch in ARCHS.values()
    )


@pytest.mark.parametrize("settings", [
    SMALL,
    dataclasses.replace(SMALL, ffn_layer="swiglu", norm_layer="rmsnorm", rope_base=None, rope_min_period=1.0,
                        rope_max_period=50.0, untie_global_and_local_cls_norm=True, layerscale=None),
])  # fmt: skip
def test_initialisation_fills_everything_from_the_meta_device(settings: ViTSettings) -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    if settings.mask_k_bias:
        assert model.blocks[0].attn.qkv.bias_mask.view(3, -1).sum(1).tolist() == [32, 0, 32]


def test_crops_forwarded_together_or_one_by_one_are_the_same() -> None:
    model = build()
    big, small = images(2, 3, 64, 64), images(3, 3, 32, 32)
    together = model.forward_crops([big, small])
    for output, alone in zip(together, (big, small), strict=True):
        torch.testing.assert_close(output.patches_BPD, model.forward_crops([alone])[0].patches_BPD)


def test_masked_patches_do_not_show_their_pixels() -> None:
    model = build()
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, 2] = True
    first = images(1, 3, 32, 32)
    second = first.clone()
    second[:, :, 16:, :16] = 7.0  # patch 2
    masked = [model.forward_crops([image], [mask])[0].prenorm_BND for image in (first, second)]
    unmasked = [model.forward_crops([image])[0].prenorm_BND for image in (first, second)]
    assert torch.equal(*masked)
    assert not torch.allclose(*unmasked)


def test_key_bias_has_no_effect() -> None:
    model, image = build(), images(1, 3, 32, 32)
    before = model(image)
    model.blocks[0].attn.qkv.bias.data[32:64] += 5.0
    assert torch.equal(model(image), before)


@torch.no_grad()
def test_stochastic_depth_keeps_the_expectation() -> None:
    model, image = build(dataclasses.replace(SMALL, depth=1)), images(8, 3, 32, 32)
    full = model.forward_crops([image])[0].prenorm_BND
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in range(400):
        draws = [[BlockDraws(attn=None, ffn=torch.randperm(8, generator=generator)[:4])]]
        outputs.append(model.forward_crops([image], draws=draws)[0].prenorm_BND)
    residual = (torch.stack(outputs).mean(0) - full).abs().max()
    assert residual < 0.2 * (outputs[0] - full).abs().max()
    assert torch.equal(
        model.forward_crops([image], draws=[[BlockDraws(ffn=torch.arange(8))]])[0].prenorm_BND.round(decimals=4),
        full.round(decimals=4),
    )


def test_local_norm_acts_on_local_crops_in_training_only() -> None:
    model = build(dataclasses.replace(SMALL, untie_global_and_local_cls_norm=True))
    image = images(2, 3, 32, 32)
    as_global = model.train().forward_crops([image], local=[False])[0]
    as_local = model.forward_crops([image], local=[True])[0]
    inference = model.eval().forward_crops([image], local=[True])[0]
    assert not torch.allclose(as_global.cls_BD, as_local.cls_BD)
    torch.testing.assert_close(as_global.patches_BPD, as_local.patches_BPD)
    torch.testing.assert_close(as_global.cls_BD, inference.cls_BD)


def test_intermediate_layers() -> None:
    model, image = build(), images(2, 3, 32, 64)
    (last,) = model.get_intermediate_layers(image)
    torch.testing.assert_close(last, model.forward_features(image)["patches"])
    first, second = model.get_intermediate_layers(image, 2, reshape=True)
    assert first.shape == second.shape == (2, 32, 2, 4)
    torch.testing.assert_close(second.flatten(2).transpose(1, 2), last)
    (raw,) = model.get_intermediate_layers(image, [-1], norm=False)
    torch.testing.assert_close(model.norm(raw), last)


def test_images_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        build()(images(1, 3, 30, 32))


def test_rope_coordinate_changes_and_prefix() -> None:
    rope = RotaryEmbedding2d(16)
    rope.reset_parameters()
    change = CoordsChange(shift=torch.tensor([0.1, -0.2]), scale=torch.tensor([1.5, 0.5]))
    plain, changed = rope(3, 5), rope(3, 5, change)
    rows = 2 * (torch.arange(3) + 0.5) / 3 - 1
    angle = 2 * math.pi * (rows + 0.1) * 1.5 / rope.periods[1]  # y comes first in the head dimension
    torch.testing.assert_close(changed.sin_Pd[::5, 1], angle.sin())
    tokens = images(1, 2, 3 + 15, 16)
    turned = rotate(tokens, plain)
    assert torch.equal(turned[:, :, :3], tokens[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=-1), tokens.norm(dim=-1))
    periods = [100.0 ** (2 * i / 8) for i in range(4)]
    torch.testing.assert_close(rope.periods, torch.tensor(periods))


def test_gradients_reach_every_parameter() -> None:
    model = build(dataclasses.replace(SMALL, untie_global_and_local_cls_norm=True)).train()
    mask = torch.ones(2, 16, dtype=torch.bool)
    outputs = model.forward_crops([images(2, 3, 64, 64), images(2, 3, 32, 32)], [mask, None], local=[False, True])
    sum((o.cls_BD * images(*o.cls_BD.shape)).sum() + (o.patches_BPD**3).sum() for o in outputs).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
