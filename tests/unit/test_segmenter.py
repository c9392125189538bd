"""Segmentation models against formulas and against the plain encoders, called as their own documentation says."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dinoscope.errors import ConfigError, WeightsError
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.features.foreign_encoders import ForeignEncoder
from dinoscope.segment.adapters import LoraSettings, adapter_parameters, add_adapters, merge_adapters
from dinoscope.segment.decoders import DECODERS, build_decoder
from dinoscope.segment.encoder_parts import linear_places, patch_maps
from dinoscope.segment.model import Segmenter
from tiny_segmenter import encoder_of, own_encoder, some_images, trained

KINDS = ("own", "dinov2", "registers")
EVERYTHING = LoraSettings(4, 6.0, ("qkv", "proj", "ffn"))


def sides(encoder: LoadedEncoder) -> tuple[int, int]:
    """An image that is no square, and no size that positions were learned for."""
    return 3 * encoder.model.patch_size, 4 * encoder.model.patch_size


def small_images(encoder: LoadedEncoder) -> torch.Tensor:
    return some_images(*sides(encoder))


@pytest.mark.parametrize("settings", [LoraSettings(), EVERYTHING])
@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_no_bit_on_any_encoder(tmp_path, kind, settings):
    encoder = encoder_of(kind, tmp_path)
    images = small_images(encoder)
    before = patch_maps(encoder.model, images, 4)
    add_adapters(encoder.model, settings, seed=0)
    assert all(torch.equal(*pair) for pair in zip(before, patch_maps(encoder.model, images, 4), strict=True))
    assert len(adapter_parameters(encoder.model)) == 4 * 2 * (2 if settings.rank == 3 else 6)


@pytest.mark.parametrize("settings", [LoraSettings(2), LoraSettings(3, 1.5, ("k", "ffn"), (0, 3)), EVERYTHING])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_exact_on_any_encoder(tmp_path, kind, settings):
    encoder = encoder_of(kind, tmp_path)
    images = small_images(encoder)
    untouched = encoder.model.forward_features(images)["patches"]
    add_adapters(encoder.model, settings, seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(encoder.model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    exact = copy.deepcopy(encoder.model).double().forward_features(images.double())["patches"]
    merge_adapters(encoder.model)
    assert not [name for name in encoder.model.state_dict() if "lora" in name]
    found = encoder.model.double().forward_features(images.double())["patches"]
    assert (found - exact).norm() / exact.norm() < 1e-6
    assert (untouched - exact).norm() / exact.norm() > 1e-3


@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_an_adapted_layer_of_hugging_face_equals_the_formula(tmp_path, kind):
    model = encoder_of(kind, tmp_path).model
    plain = copy.deepcopy(model)
    add_adapters(model, LoraSettings(3, 6.0), seed=0)
    places = {(place.block, place.name): place.path for place in linear_places(plain)}
    assert len(places) == 4 * 6
    tokens = torch.randn(5, 48)
    parameters = adapter_parameters(model)
    assert set(parameters) == {f"blocks.{i}.{name}.{letter}" for i in range(4) for name in "qv" for letter in "ab"}
    for (block, name), path in places.items():
        layer, found = plain.get_submodule(path), model.get_submodule(path)
        assert found.weight.equal(layer.weight)
        assert found.bias.equal(layer.bias)
        if name not in ("q", "v"):
            assert type(found) is type(layer)
            continue
        a, b = (parameters[f"blocks.{block}.{name}.{letter}"] for letter in "ab")
        with torch.no_grad():
            b.normal_()
        wanted = (
            tokens.double() @ layer.weight.double().T + layer.bias + 2 * (tokens.double() @ a.double().T) @ b.double().T
        )
        torch.testing.assert_close(found(tokens).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_which_layer_of_hugging_face_is_which(tmp_path, kind):
    """A change of one projection of the first block, found by what attention does with it."""
    model = encoder_of(kind, tmp_path).model.model
    places = {
        (place.block, place.name): place.path.removeprefix("model.")
        for place in linear_places(encoder_of(kind, tmp_path / "again").model)
    }
    block = model.encoder.layer[0]
    tokens = torch.randn(1, 7, 48)
    query, key, value, proj = (model.get_submodule(places[0, name]) for name in ("q", "k", "v", "proj"))
    heads = [layer(tokens).unflatten(2, (3, 16)).transpose(1, 2) for layer in (query, key, value)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / math.sqrt(16)).softmax(-1)
    wanted = proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    found = block.attention(tokens)
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_the_last_blocks_are_what_hooks_see_after_the_final_norm(tmp_path, kind):
    encoder = encoder_of(kind, tmp_path).model
    images = some_images(3 * encoder.patch_size, 4 * encoder.patch_size)
    blocks, norm = (
        (encoder.blocks, encoder.norm) if kind == "own" else (encoder.model.encoder.layer, encoder.model.layernorm)
    )
    seen = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, given, out: seen.append(out[0] if isinstance(out, tuple | list) else out)
        )
    found = patch_maps(encoder, images, 3)
    assert len(seen) == 4
    for tokens, one in zip(seen[1:], found, strict=True):
        wanted = norm(tokens)[:, 1 + encoder.num_storage_tokens :].reshape(2, 3, 4, 48).permute(0, 3, 1, 2)
        assert torch.equal(one, wanted)
    assert torch.equal(found[-1].flatten(2).transpose(1, 2), encoder.forward_features(images)["patches"])
    assert torch.equal(patch_maps(encoder, images, 1)[0], found[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_linear_logits_are_a_product_upsampled(tmp_path, kind):
    segmenter = trained(Segmenter(encoder_of(kind, tmp_path), 5)).eval()
    height, width = 3 * segmenter.patch_size, 4 * segmenter.patch_size
    images = some_images(height, width)
    found = segmenter(images)
    patches = segmenter.encoder.forward_features(images)["patches"].double()
    weight, bias = segmenter.decoder.classifier.weight[:, :, 0, 0].double(), segmenter.decoder.classifier.bias
    coarse = (patches @ weight.T + bias).transpose(1, 2).reshape(2, 5, 3, 4)
    assert found.shape == (2, 5, height, width)
    torch.testing.assert_close(found.double(), bilinear(coarse, height, width), rtol=1e-5, atol=1e-5)


def bilinear(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """By matrices of weights: pixel centres lie on pixel centres, what is beyond the rim is the rim."""
    matrices = []
    for wanted, given in ((height, maps.shape[2]), (width, maps.shape[3])):
        at = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5).clamp(0, given - 1)
        matrix = torch.clamp(1 - (at[:, None] - torch.arange(given)).abs(), min=0)
        matrices.append(matrix)
    return matrices[0] @ maps @ matrices[1].T


def test_the_pyramid_keeps_logits_where_the_image_is():
    """Mirrored images give mirrored logits, and a patch far away matters less than the one below."""
    decoder = build_decoder("fpn", 48, 3, seed=0)
    maps = [torch.randn(1, 48, 6, 9) for _ in range(4)]
    for convolution in decoder.smoothing:
        with torch.no_grad():
            convolution[0].weight.copy_((convolution[0].weight + convolution[0].weight.flip(3)) / 2)
    mirrored = decoder([one.flip(3) for one in maps])
    torch.testing.assert_close(mirrored.flip(3), decoder(maps), rtol=1e-4, atol=1e-5)
    assert decoder(maps).shape == (1, 3, 24, 36)


def test_the_pyramid_uses_every_block_and_gives_an_image_the_same_in_any_batch():
    decoder = build_decoder("fpn", 48, 3, seed=0).train()
    maps = [torch.randn(3, 48, 5, 7) for _ in range(4)]
    found = decoder(maps)
    assert found.shape == (3, 3, 20, 28)
    torch.testing.assert_close(decoder([one[1:2] for one in maps]), found[1:2], rtol=1e-4, atol=1e-5)
    for index in range(4):
        changed = [one + (number == index) for number, one in enumerate(maps)]
        assert (decoder(changed) - found).abs().max() > 1e-5, index


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_adapters_and_decoder_alone(tmp_path, kind, decoder):
    encoder = encoder_of(kind, tmp_path)
    plain = copy.deepcopy(encoder.model.state_dict())
    segmenter = trained(Segmenter(encoder, 3, decoder, LoraSettings(2))).train()  # while B is zero, A has no gradient
    side = 12 * segmenter.patch_size
    optimizer = torch.optim.SGD(segmenter.trainable_parameters(), lr=5)
    before = {name: tensor.clone() for name, tensor in segmenter.trainable_state().items()}
    labels = torch.arange(3).repeat(side)[:side].expand(2, side, side)
    F.cross_entropy(segmenter(some_images(side, side)), labels).backward()
    optimizer.step()
    assert not segmenter.encoder.training
    assert segmenter.decoder.training
    state = segmenter.encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    same = [name for name, tensor in segmenter.trainable_state().items() if torch.equal(tensor, before[name])]
    # batch norm takes away what these add to every pixel
    without_effect = {f"decoder.inter_conv{number}.bias" for number in (1, 2, 3) if decoder.startswith("public")}
    assert set(same) <= without_effect
    count = sum(parameter.numel() for parameter in segmenter.trainable_parameters())
    adapters = 4 * 2 * 2 * 2 * 48
    assert count == adapters + sum(parameter.numel() for parameter in segmenter.decoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_choice_trains(tmp_path, kind):
    images = small_images(encoder_of(kind, tmp_path))
    path = ".blocks." if kind == "own" else ".layer."
    for trainable, last_n in (("decoder", 1), ("last_n", 2), ("full", 1)):
        encoder = encoder_of(kind, tmp_path / f"{trainable}")
        segmenter = Segmenter(encoder, 3, trainable=trainable, last_n=last_n).train()
        assert segmenter.encoder.training == (trainable != "decoder")
        segmenter(images).sum().backward()
        assert all(parameter.grad is not None for parameter in segmenter.trainable_parameters()), trainable
        names = {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}
        blocks = {name.split(path)[1].split(".")[0] for name in names if path in name}
        assert blocks == {"decoder": set(), "last_n": {"2", "3"}, "full": {"0", "1", "2", "3"}}[trainable]
        assert any("patch_embed" in name for name in names) == (trainable == "full")
        stored = {name for name in segmenter.trainable_state() if not name.startswith("decoder.")}
        assert stored == names - {name for name in names if name.startswith("decoder.")}


def test_the_state_goes_from_one_model_to_another():
    first = trained(Segmenter(own_encoder(), 3, "fpn", LoraSettings(2), seed=1)).eval()
    second = Segmenter(own_encoder(), 3, "fpn", LoraSettings(2), seed=2).eval()
    images = some_images(32, 48)
    assert not torch.allclose(first(images), second(images), atol=1e-3)
    second.load_trainable(first.trainable_state())
    assert torch.equal(first(images), second(images))


def test_a_merged_model_has_the_same_logits():
    segmenter = trained(Segmenter(own_encoder(), 3, "linear", LoraSettings(2))).double().eval()
    images = some_images(32, 48).double()
    before = segmenter(images)
    segmenter.merge()
    assert set(segmenter.trainable_state()) == {"decoder.classifier.weight", "decoder.classifier.bias"}
    assert (segmenter(images) - before).norm() / before.norm() < 1e-12


def test_seeds_decide_the_first_weights_and_nothing_else_is_drawn():
    encoders = [own_encoder() for _ in range(3)]
    random = torch.get_rng_state()
    models = [
        Segmenter(encoder, 3, "fpn", LoraSettings(2), seed=seed)
        for encoder, seed in zip(encoders, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), random)
    one, two, three = (model.trainable_state() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    drawn = ("decoder.classifier.weight", "adapters.blocks.2.v.a", "decoder.laterals.0.0.weight")
    assert not any(torch.equal(one[name], three[name]) for name in drawn)


def test_normalisation_is_that_of_the_encoder():
    segmenter = Segmenter(own_encoder(), 3)
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    found = segmenter.normalised(pixels)
    for channel, (mean, std) in enumerate(zip((0.7, 0.5, 0.6), (0.2, 0.25, 0.15), strict=True)):
        torch.testing.assert_close(found[:, channel], (pixels[..., channel] / 255 - mean) / std)


def test_bfloat16_gives_float_logits_close_to_those_of_float32():
    segmenter = trained(Segmenter(own_encoder(), 3, "fpn", LoraSettings(2))).eval()
    images = some_images(32, 48)
    wanted = segmenter(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = segmenter(images)
    assert found.dtype == torch.float32
    assert 1e-6 < (found - wanted).norm() / wanted.norm() < 0.1


class Grey(torch.nn.Module):
    """An encoder of somebody's own: mean colours of patches of 8 px."""

    def forward(self, images):
        cells = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return {"cls": cells.mean(1), "patches": cells}


def unknown_encoder(cls_only: bool = False) -> LoadedEncoder:
    module = Grey()
    module.unused = torch.nn.Parameter(torch.zeros(1))
    names = ("cls",) if cls_only else ("cls", "patches")

    def tokens(model, images):
        return {name: model(images)[name] for name in names}

    return LoadedEncoder(ForeignEncoder(module, tokens, (0, 0, 0), (1, 1, 1), 64), "0" * 64, "function own")


def test_any_encoder_with_patches_is_segmented_with_by_the_linear_decoder():
    segmenter = Segmenter(unknown_encoder(), 4).eval()
    assert segmenter(some_images(16, 24)).shape == (2, 4, 16, 24)


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((own_encoder(), 3, "fnp"), {}, "decoder 'fnp' is unknown.*did you mean fpn"),
        ((own_encoder(), 1), {}, "1 classes; at least 2"),
        ((own_encoder(), 3), {"trainable": "lora"}, "'lora' is to be trained, but no adapters"),
        ((own_encoder(), 3, "linear", LoraSettings()), {"trainable": "full"}, "'full' is to be trained, but adapters"),
        ((own_encoder(), 3), {"trainable": "al"}, "'al' is nothing that can be trained"),
        ((own_encoder(), 3), {"trainable": "last_n", "last_n": 5}, "the last 5 blocks"),
        ((own_encoder(), 3, "linear", LoraSettings(0)), {}, "rank of LoRA adapters is 0"),
        ((own_encoder(), 3, "linear", LoraSettings(3, blocks=(1, 4))), {}, "block 4 is to be adapted.* 0 to 3"),
        ((own_encoder(), 3, "linear", LoraSettings(3, targets=("qv",))), {}, "'qv' is unknown"),
        ((own_encoder(), 3, "linear", LoraSettings(3, targets=())), {}, "adapts nothing"),
        ((unknown_encoder(), 3, "fpn"), {}, "blocks of an encoder of type Grey are not known"),
        ((unknown_encoder(), 3, "linear", LoraSettings()), {}, "blocks of an encoder of type Grey are not known"),
        ((unknown_encoder(cls_only=True), 3), {}, "gives no patch tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(arguments, options, told):
    with pytest.raises(ConfigError, match=told):
        Segmenter(*arguments, **options)


def test_dinov2_refuses_unknown_targets_and_ranks_too(tmp_path):
    encoder = encoder_of("dinov2", tmp_path)
    with pytest.raises(ConfigError, match="'w' is unknown"):
        add_adapters(encoder.model, LoraSettings(3, targets=("w",)), 0)
    with pytest.raises(ConfigError, match="is -1; at least 1"):
        add_adapters(encoder.model, LoraSettings(-1), 0)


@pytest.mark.parametrize(
    ("kind", "told"),
    [("own", "100 x 64 px.*16 px: 96 or 112 x 64"), ("dinov2", "14 px: 98 or 112 x 56 or 70")],
)
def test_other_sizes_are_refused_with_the_nearest_that_fit(tmp_path, kind, told):
    with pytest.raises(ConfigError, match=told):
        Segmenter(encoder_of(kind, tmp_path), 3)(some_images(100, 64))


def test_a_state_that_does_not_fit_is_refused_by_name():
    segmenter = Segmenter(own_encoder(), 3, "linear", LoraSettings(2))
    state = segmenter.trainable_state()
    with pytest.raises(WeightsError, match=r"lacks tensors.*blocks.1.q.a"):
        segmenter.load_trainable({name: tensor for name, tensor in state.items() if name != "adapters.blocks.1.q.a"})
    with pytest.raises(WeightsError, match=r"no place.*decoder.more"):
        segmenter.load_trainable(state | {"decoder.more": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"wrongly shaped.*decoder.classifier.bias"):
        segmenter.load_trainable(state | {"decoder.classifier.bias": torch.zeros(4)})
