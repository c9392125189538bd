"""Low-rank adapters against formulas in float64."""

import copy

import pytest
import torch

from dinoscope.errors import ConfigError
from dinoscope.models.lora import LORA_TARGETS, Adapter, add_lora, fresh_adapters, is_adapter, merge_lora
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer

EVERYTHING = ("qkv", "proj", "ffn")
SETTINGS = {
    "mlp": ViTSettings(32, 3, 2, 64, mask_k_bias=True, num_storage_tokens=2, layerscale=0.5),
    "swiglu": ViTSettings(32, 3, 2, 48, ffn_layer="swiglu", qkv_bias=False, layerscale=None, num_storage_tokens=1),
}


def backbone(kind: str = "mlp") -> DinoVisionTransformer:
    """A backbone with random biases and gammas too."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(SETTINGS[kind])
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(kind: str = "mlp", targets: tuple[str, ...] = EVERYTHING, alpha: float | None = 6.0, **options):
    """A backbone whose adapters do something."""
    model = backbone(kind)
    add_lora(model, 4, alpha, targets, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora.b" in name:
                parameter.normal_(std=0.2)
    return model


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SETTINGS)
def test_new_adapters_change_nothing_at_all(kind: str) -> None:
    plain, model = backbone(kind), backbone(kind)
    add_lora(model, 4, 8.0, EVERYTHING)
    for key, wanted in plain.forward_features(images()).items():
        assert torch.equal(model.forward_features(images())[key], wanted), key


def test_a_fused_projection_equals_the_formula_third_by_third() -> None:
    model = adapted(targets=("v", "q"))
    qkv = model.blocks[1].attn.qkv
    tokens = torch.randn(5, 7, 32)
    found = qkv(tokens)
    state = {name: tensor.double() for name, tensor in qkv.state_dict().items()}
    wanted = tokens.double() @ state["weight"].T + state["bias"] * state["bias_mask"]
    for third, start in (("q", 0), ("v", 64)):
        low = tokens.double() @ state[f"lora.a_{third}"].T @ state[f"lora.b_{third}"].T
        wanted[..., start : start + 32] += 6 / 4 * low
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[..., 32:64], backbone().blocks[1].attn.qkv(tokens)[..., 32:64])  # keys, untouched
    assert "lora.a_k" not in state


def test_other_layers_equal_the_formula_and_alpha_null_scales_by_one() -> None:
    model = adapted("swiglu", ("ffn", "proj"), alpha=None)
    tokens = torch.randn(5, 32)
    for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.w2):
        state = {name: tensor.double() for name, tensor in layer.state_dict().items()}
        weight = state["weight"] + state["lora.b"] @ state["lora.a"]
        wanted = tokens.double() @ weight.T + state["bias"]
        torch.testing.assert_close(layer(tokens).double(), wanted, rtol=1e-5, atol=1e-6)
    assert model.blocks[0].attn.qkv.lora is None
    assert {name for name, child in model.blocks[0].mlp.named_children() if child.lora is not None} == {
        "w1",
        "w2",
        "w3",
    }


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("qkv",), ("proj",), ("ffn",), EVERYTHING])
@pytest.mark.parametrize("kind", SETTINGS)
def test_merging_gives_the_plain_backbone_with_the_same_output(kind: str, targets: tuple[str, ...]) -> None:
    model = adapted(kind, targets)
    merged = merge_lora(model.state_dict())
    plain = backbone(kind)
    before = plain.state_dict()
    assert list(merged) == list(before)
    assert {key: t.dtype for key, t in merged.items()} == {key: t.dtype for key, t in before.items()}
    plain.load_state_dict(merged, strict=True)
    exact, exact_plain = copy.deepcopy(model).double(), plain.double()
    for key, wanted in exact.forward_features(images().double()).items():
        found = exact_plain.forward_features(images().double())[key]
        assert (found - wanted).norm() / wanted.norm() < 1e-6, key
        untouched = backbone(kind).double().forward_features(images().double())[key]
        assert (untouched - wanted).norm() / wanted.norm() > 1e-3, key


def test_merged_weights_are_rounded_once() -> None:
    model = adapted(alpha=4 / 3)
    state, merged = model.state_dict(), merge_lora({f"backbone.{k}": v for k, v in model.state_dict().items()})
    prefix = "blocks.2.mlp.fc1"
    scale = state[f"{prefix}.lora.scale"].double()
    low = state[f"{prefix}.lora.b"].double() @ state[f"{prefix}.lora.a"].double()
    exact = state[f"{prefix}.weight"].double() + scale * low
    assert torch.equal(merged[f"backbone.{prefix}.weight"], exact.float())
    assert not torch.equal(exact.float(), state[f"{prefix}.weight"])
    assert torch.equal(state[f"{prefix}.weight"], backbone().state_dict()[f"{prefix}.weight"])  # input left alone


def test_names_and_the_blocks_that_are_adapted() -> None:
    model = adapted(targets=("q", "v", "proj"), blocks=[0, 2])
    added = model.state_dict().keys() - backbone().state_dict().keys()
    parts = {"a_q", "b_q", "a_v", "b_v", "scale"}
    wanted = {f"blocks.{i}.attn.qkv.lora.{part}" for i in (0, 2) for part in parts}
    wanted |= {f"blocks.{i}.attn.proj.lora.{part}" for i in (0, 2) for part in ("a", "b", "scale")}
    assert added == wanted
    assert all(map(is_adapter, wanted))
    assert not any(map(is_adapter, backbone().state_dict()))


def test_on_the_meta_device_nothing_is_forgotten() -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(SETTINGS["mlp"])
        add_lora(model, 4, 8.0, EVERYTHING)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert ".lora.b" not in name or not tensor.any(), name
        assert "lora.scale" not in name or tensor == 2, name


def test_each_a_is_uniform_as_a_linear_layer_starts() -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(SETTINGS["mlp"])
        add_lora(model, 400, None, ("ffn",))
    random = torch.get_rng_state()
    first, second, other = fresh_adapters(model, 3), fresh_adapters(model, 3), fresh_adapters(model, 4)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name for name in model.state_dict() if is_adapter(name)} == first.keys()
    a = first["blocks.1.mlp.fc2.lora.a"]
    assert torch.equal(a, second["blocks.1.mlp.fc2.lora.a"])
    assert not torch.equal(a, other["blocks.1.mlp.fc2.lora.a"])
    assert not torch.equal(a, first["blocks.2.mlp.fc2.lora.a"])
    bound = 64**-0.5
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert all(p.is_meta for p in model.parameters())


def test_gradients_equal_finite_differences() -> None:
    layer = adapted(targets=("q", "v")).double().blocks[0].attn.qkv
    tokens = torch.randn(3, 32, dtype=torch.float64)
    for name in ("a_q", "b_v"):
        parameter = getattr(layer.lora, name)

        def output(value: torch.Tensor, name: str = name) -> torch.Tensor:
            return torch.func.functional_call(layer, {f"lora.{name}": value}, tokens)

        assert torch.autograd.gradcheck(output, parameter.detach().clone().requires_grad_())


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own doings
def test_compiled_blocks_change_nothing_beyond_rounding() -> None:
    model = adapted()
    wanted = model.forward_features(images())["patches"]
    for block in model.blocks:
        block.compile()
    found = model.forward_features(images())["patches"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_scale_stays_exact_and_the_type_is_kept() -> None:
    layer = adapted(alpha=1.0).blocks[0].mlp.fc1
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    assert layer(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    assert layer.lora.scale == 0.25


@pytest.mark.parametrize(("arguments", "told"), [((4, None, ["qk"]), "'qk' is unknown"), ((0,), "is 0; at least 1")])
def test_what_makes_no_sense_is_refused(arguments: tuple, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        add_lora(backbone(), *arguments)


def test_default_targets_are_queries_and_values() -> None:
    model = backbone()
    add_lora(model, 2)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert [adapter.thirds for adapter in adapters] == [("q", "v")] * 3
    assert set(LORA_TARGETS) == {"q", "k", "v", "qkv", "proj", "ffn"}
