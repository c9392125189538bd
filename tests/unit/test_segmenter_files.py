"""Segmentation models on disk: of ours, and those that dinov2-finetune saves, the real one included."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from dinoscope.errors import WeightsError
from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.encoder_parts import patch_maps
from dinoscope.segment.files import load_segmenter, make_card, read_card, save_segmenter
from dinoscope.segment.model import Segmenter
from other_libraries import random_backbone
from tiny_segmenter import own_encoder, some_images, trained, write_dinov2, write_own_encoder

REAL = "data/weights/dinov2-finetune_dinov3_large_voc_lora.pt"
CLASSES, PALETTE = ("nothing", "nucleus", "gland"), ((0, 0, 0), (255, 0, 10), (0, 90, 181))


def saved(folder, segmenter, **about):
    card = make_card(segmenter, CLASSES, PALETTE, **about)
    save_segmenter(folder, segmenter, card)
    return card


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
@pytest.mark.parametrize("kind", ["own", "registers"])
def test_what_is_loaded_is_what_was_saved(tmp_path, kind, decoder):
    source = write_own_encoder(tmp_path / "a.pth") if kind == "own" else write_dinov2(tmp_path / "hf", registers=4)
    settings = LoraSettings(2, 3.0, ("q", "k", "proj"), (1, 3))
    segmenter = trained(Segmenter(load_encoder(source), 3, decoder, settings)).eval()
    card = saved(tmp_path / "model", segmenter, img_dim=(32, 48), mpp=0.5, measures={"miou": 0.25})
    assert sorted(path.name for path in tmp_path.joinpath("model").iterdir()) == [
        "segmenter.json",
        "segmenter.safetensors",
    ]
    loaded = load_segmenter(tmp_path / "model", source)
    images = some_images(4 * loaded.patch_size, 3 * loaded.patch_size)
    assert torch.equal(loaded(images), segmenter(images))
    assert loaded.card == card == read_card(tmp_path / "model")
    assert (card.classes, card.palette, card.lora, card.img_dim, card.mpp) == (
        CLASSES,
        PALETTE,
        settings,
        (32, 48),
        0.5,
    )
    assert (card.mean, card.measures, card.decoder) == (segmenter.mean, {"miou": 0.25}, decoder)
    assert not loaded.training


@pytest.mark.parametrize(("trainable", "last_n"), [("decoder", 1), ("last_n", 2), ("full", 1)])
def test_all_that_was_trained_is_stored_and_no_more(tmp_path, trainable, last_n):
    source = write_own_encoder(tmp_path / "a.pth")
    segmenter = trained(Segmenter(load_encoder(source), 3, trainable=trainable, last_n=last_n)).eval()
    saved(tmp_path / "model", segmenter)
    images = some_images(32, 48)
    assert torch.equal(load_segmenter(tmp_path / "model", source)(images), segmenter(images))
    size = (tmp_path / "model/segmenter.safetensors").stat().st_size
    numbers = sum(parameter.numel() for parameter in segmenter.trainable_parameters())
    assert size < 4 * numbers + 10_000


def test_another_encoder_is_refused_in_one_sentence(tmp_path):
    first, other = (write_own_encoder(tmp_path / f"{seed}.pth", seed) for seed in (0, 1))
    saved(tmp_path / "model", Segmenter(load_encoder(first), 3, "linear", LoraSettings()))
    with pytest.raises(
        WeightsError, match=r"was trained on another encoder \(backbone .* than the one given .*; give that one"
    ) as told:
        load_segmenter(tmp_path / "model", other)
    assert "\n" not in str(told.value)


def test_damaged_folders_are_refused_in_a_sentence(tmp_path):
    source = write_own_encoder(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        load_segmenter(tmp_path / "none", source)
    with pytest.raises(WeightsError, match=r"is no segmentation model: it has no segmenter\.json"):
        load_segmenter(write_dinov2(tmp_path / "hf"), source)
    with pytest.raises(WeightsError, match=r"is no segmentation model: it has neither classifier\.weight"):
        load_segmenter(source, source)
    saved(tmp_path / "one", trained(Segmenter(load_encoder(source), 3)))
    saved(tmp_path / "two", Segmenter(load_encoder(source), 3))
    card = json.loads((tmp_path / "one/segmenter.json").read_text())
    (tmp_path / "one/segmenter.json").write_text(json.dumps(card | {"palette": 3}))
    with pytest.raises(WeightsError, match="no whole card"):
        load_segmenter(tmp_path / "one", source)
    (tmp_path / "two/segmenter.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match=r"is not the file that segmenter\.json describes"):
        load_segmenter(tmp_path / "two", source)


def test_a_model_takes_the_place_of_an_earlier_one(tmp_path):
    source = write_own_encoder(tmp_path / "a.pth")
    saved(tmp_path / "model", Segmenter(load_encoder(source), 3, "fpn", LoraSettings()))
    segmenter = Segmenter(load_encoder(source), 3)
    saved(tmp_path / "model", segmenter)
    assert load_segmenter(tmp_path / "model", source).decoder_name == "linear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "model"]


@pytest.mark.parametrize(
    ("count", "last"), [(21, "tv monitor"), (150, "flag"), (7, "class 6")], ids=["voc", "ade20k", "other"]
)
def test_classes_of_public_files_are_those_of_the_set_with_as_many(tmp_path, count, last):
    public_file(tmp_path / "a.pt", own_encoder(), classes=count)
    card = load_segmenter(tmp_path / "a.pt", own_encoder()).card
    assert len(card.classes) == count and card.classes[-1] == last
    assert len(set(card.palette)) == count


def public_file(path, encoder, *, rank=3, classes=4, pyramid=False, lora=True, seed=9):
    """A file as that tool writes it, of numbers that matter."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1] if len(shape) > 1 else 1)

    width, depth = encoder.model.embed_dim, 4
    state = {}
    if lora:
        state |= {f"w_a_{number:03d}": drawn(rank, width) for number in range(2 * depth)}
        state |= {f"w_b_{number:03d}": drawn(width, rank) for number in range(2 * depth)}
    if not pyramid:
        state |= {"classifier.weight": drawn(classes, width, 1, 1), "classifier.bias": drawn(classes)}
    widths = [width, 128, 64, 32, 21, classes]
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        if not pyramid:
            break
        state[f"conv{number}.0.weight"] = drawn(after, before, 3, 3) / 3
        state |= {f"conv{number}.1.{name}": drawn(after) for name in ("weight", "bias", "running_mean")}
        state[f"conv{number}.1.running_var"] = drawn(after).square() + 0.5
        state[f"conv{number}.1.num_batches_tracked"] = torch.tensor(7)
        if number < 4:
            state |= {f"inter_conv{number}.weight": drawn(widths[number + 1], width, 1, 1)}
            state |= {f"inter_conv{number}.bias": drawn(widths[number + 1])}
    torch.save(state, path)
    return state


def with_deltas(model: DinoVisionTransformer, state: dict[str, torch.Tensor]) -> DinoVisionTransformer:
    """The plain encoder with B A added to queries and values by hand."""
    width = model.embed_dim
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            for number, rows in ((2 * index, slice(0, width)), (2 * index + 1, slice(2 * width, None))):
                block.attn.qkv.weight[rows] += state[f"w_b_{number:03d}"] @ state[f"w_a_{number:03d}"]
    return model


@pytest.mark.parametrize("lora", [True, False])
def test_a_public_file_with_a_linear_decoder_is_placed_as_it_was_trained(tmp_path, lora):
    state = public_file(tmp_path / "a.pt", own_encoder(), lora=lora)
    segmenter = load_segmenter(tmp_path / "a.pt", own_encoder())
    images = some_images(48, 64)
    plain = with_deltas(own_encoder().model, state) if lora else own_encoder().model
    patches = plain.forward_features(images)["patches"]
    coarse = (patches @ state["classifier.weight"][:, :, 0, 0].T + state["classifier.bias"]).transpose(1, 2)
    wanted = F.interpolate(coarse.unflatten(2, (3, 4)), (48, 64), mode="bilinear")
    torch.testing.assert_close(segmenter(images), wanted, rtol=1e-4, atol=1e-4)
    assert segmenter.card.classes == ("class 0", "class 1", "class 2", "class 3")
    assert segmenter.trainable == ("lora" if lora else "decoder")


@pytest.mark.parametrize("registers", [0, 4])
def test_a_public_file_of_dinov2_is_placed_on_separate_layers(tmp_path, registers):
    encoder = load_encoder(write_dinov2(tmp_path / "hf", registers=registers))
    state = public_file(tmp_path / "a.pt", encoder)
    plain = load_encoder(tmp_path / "hf").model
    with torch.no_grad():
        for index, layer in enumerate(plain.model.encoder.layer):
            query, value = (
                next(module for name, module in layer.named_modules() if name.endswith(names))
                for names in (("q_proj", "query"), ("v_proj", "value"))
            )
            query.weight += state[f"w_b_{2 * index:03d}"] @ state[f"w_a_{2 * index:03d}"]
            value.weight += state[f"w_b_{2 * index + 1:03d}"] @ state[f"w_a_{2 * index + 1:03d}"]
    segmenter = load_segmenter(tmp_path / "a.pt", encoder)
    images = some_images(42, 56)
    found, wanted = (model.forward_features(images)["patches"] for model in (segmenter.encoder, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(segmenter.decoder.classifier.weight, state["classifier.weight"])


@pytest.mark.parametrize("doublings", [2, 3])
def test_a_public_pyramid_computes_what_was_trained(tmp_path, doublings):
    """Step by step, in float64, from the tensors of the file."""
    state = public_file(tmp_path / "a.pt", own_encoder(), pyramid=True)
    segmenter = load_segmenter(tmp_path / "a.pt", own_encoder(), doublings=doublings)
    images = some_images(160, 192)
    maps = [one.double() for one in patch_maps(with_deltas(own_encoder().model, state), images, 4)]
    exact = {name: tensor.double() for name, tensor in state.items()}

    def convolved(x, name):
        x = F.conv2d(x, exact[f"{name}.0.weight"])
        shape = (1, -1, 1, 1)
        x = (x - exact[f"{name}.1.running_mean"].view(shape)) / (
            exact[f"{name}.1.running_var"].view(shape) + 1e-5
        ).sqrt()
        return (x * exact[f"{name}.1.weight"].view(shape) + exact[f"{name}.1.bias"].view(shape)).clamp(min=0)

    def with_lateral(x, number):
        lateral = F.conv2d(maps[number - 1], exact[f"inter_conv{number}.weight"], exact[f"inter_conv{number}.bias"])
        rows, columns = (
            torch.arange(wanted) * given // wanted for wanted, given in zip(x.shape[2:], lateral.shape[2:], strict=True)
        )
        return x + lateral[:, :, rows][:, :, :, columns]

    def doubled(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = doubled(convolved(convolved(maps[3], "conv1"), "conv2"))
    x = doubled(convolved(with_lateral(x, 1), "conv3"))
    x = convolved(with_lateral(x, 2), "conv4")
    x = doubled(x) if doublings == 3 else x
    wanted = F.interpolate(convolved(with_lateral(x, 3), "conv5"), (160, 192), mode="bilinear")
    torch.testing.assert_close(segmenter(images).double(), wanted, rtol=1e-3, atol=1e-3)
    assert wanted.std() > 0.01


def test_what_has_no_place_is_listed(tmp_path):
    state = public_file(tmp_path / "a.pt", own_encoder())
    torch.save(state | {"head.weight": torch.zeros(1), "w_c_000": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=r"2 have no place.*: head\.weight, w_c_000"):
        load_segmenter(tmp_path / "more.pt", own_encoder())
    torch.save({name: tensor for name, tensor in state.items() if name != "w_b_003"}, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match=r"lacks tensors.*adapters\.blocks\.1\.v\.b"):
        load_segmenter(tmp_path / "less.pt", own_encoder())
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("7")}, tmp_path / "short.pt")
    with pytest.raises(WeightsError, match=r"3\.5 blocks.*has 4"):
        load_segmenter(tmp_path / "short.pt", own_encoder())
    torch.save(state | {"w_a_002": torch.zeros(5, 48)}, tmp_path / "ranks.pt")
    with pytest.raises(WeightsError, match="not all of rank 3: w_a_002"):
        load_segmenter(tmp_path / "ranks.pt", own_encoder())
    wide = own_encoder(settings=ViTSettings(64, 4, 2, 96, num_storage_tokens=3, layerscale=0.5))
    with pytest.raises(WeightsError, match=r"w_a_000 is of shape \(3, 48\), but wanted is \(rank, 64\)"):
        load_segmenter(tmp_path / "a.pt", wide)
    public_file(tmp_path / "b.pt", own_encoder(), lora=False)
    with pytest.raises(WeightsError, match=r"classifier\.weight is of shape \(4, 48, 1, 1\)"):
        load_segmenter(tmp_path / "b.pt", wide)


def test_a_public_file_becomes_one_of_ours(tmp_path):
    public_file(tmp_path / "a.pt", own_encoder(), pyramid=True)
    segmenter = load_segmenter(tmp_path / "a.pt", own_encoder(), doublings=3)
    save_segmenter(tmp_path / "model", segmenter, segmenter.card)
    again = load_segmenter(tmp_path / "model", own_encoder())
    images = some_images(160, 160)
    assert torch.equal(again(images), segmenter(images))


def test_the_real_file_is_placed_wholly_on_a_large_encoder(shared):
    """W x + B A x of every block against the tensors of the file: queries in the first third, values in the last."""
    state = torch.load(shared / REAL, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = DinoVisionTransformer(ViTSettings(1024, 24, 16, 4096, num_storage_tokens=4, mask_k_bias=True))
    assert model.settings.arch == "vit_large"
    model.to_empty(device="cpu").init_weights()
    plain = [block.attn.qkv.weight.clone() for block in model.blocks]
    segmenter = load_segmenter(shared / REAL, LoadedEncoder(model.eval().requires_grad_(False), "0", "random"))
    assert segmenter.num_classes == 21
    assert len(segmenter.trainable_state()) == len(state) == 98
    tokens = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0))
    for index, block in enumerate(segmenter.encoder.blocks):
        found = block.attn.qkv(tokens) - block.attn.qkv.effective_bias()
        wanted = (tokens.double() @ plain[index].double().T).chunk(3, 1)
        q, v = (
            tokens.double() @ state[f"w_a_{number:03d}"].double().T @ state[f"w_b_{number:03d}"].double().T
            for number in (2 * index, 2 * index + 1)
        )
        for part, low_rank, exact in zip(found.chunk(3, 1), (q, torch.zeros_like(q), v), wanted, strict=True):
            torch.testing.assert_close(part.double(), exact + low_rank, rtol=1e-4, atol=1e-4)
        assert min(q.abs().max(), v.abs().max()) > 1e-3
    assert torch.equal(segmenter.decoder.classifier.weight, state["classifier.weight"])
    assert torch.equal(segmenter.decoder.classifier.bias, state["classifier.bias"])


def test_the_real_file_is_refused_on_a_smaller_encoder(shared):
    with pytest.raises(WeightsError, match=r"adapters for 24 blocks \(w_a_000 to w_a_047\).*has 4"):
        load_segmenter(shared / REAL, LoadedEncoder(random_backbone(ViTSettings(48, 4, 3, 96)), "0", "small"))
