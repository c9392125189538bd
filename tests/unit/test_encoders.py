"""Encoders of all kinds against the libraries that they come from, called as their own documentation says."""

import json
import shutil
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscope.errors import FeaturesError, WeightsError
from dinoscope.features.embedding import Embedder, choose_precision
from dinoscope.features.encoders import load_encoder
from dinoscope.features.foreign_encoders import ForeignEncoder
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_backbone
from dinoscope.visualize.patches import dense_features, load_patch_encoder
from other_libraries import randomize, require, save_transformers, timm_model, transformers_model

CPU = torch.device("cpu")
MEAN, STD = (0.6, 0.5, 0.4), (0.2, 0.3, 0.25)
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


def hugging_face(folder, kind, *, seed=0, **preprocessor):
    """A folder with random weights of a small model, and the model."""
    library = require("transformers")
    names = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
    settings = TINY | {"image_size": 70 if "dinov2" in kind else 64, "patch_size": 14 if "dinov2" in kind else 16}
    if kind == "dinov2_with_registers":
        settings["num_register_tokens"] = 4
    config = getattr(library, f"{names[kind]}Config")(**settings)
    options = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    model = randomize(getattr(library, f"{names[kind]}Model")(config, **options), seed)
    save_transformers(model, folder)
    if preprocessor:
        about = {"image_mean": MEAN, "image_std": STD, "do_normalize": True} | preprocessor
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


def tiles(side, count=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8))


def normalised(images, mean=MEAN, std=STD):
    pixels = images.permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def features(source, images, pooling="cls", **options):
    encoder = load_encoder(source, architecture=options.pop("architecture", None))
    return Embedder(encoder.model, "other", pooling, CPU, **options).embed(images)


@pytest.mark.parametrize(
    ("kind", "side", "storage"), [("vit", 64, 0), ("deit", 64, 1), ("dinov2", 56, 0), ("dinov2_with_registers", 56, 4)]
)
def test_a_hugging_face_folder_gives_what_transformers_gives(tmp_path, kind, side, storage):
    theirs = hugging_face(tmp_path, kind, size={"height": side, "width": side})
    images = tiles(side)
    with torch.inference_mode():
        tokens = theirs(pixel_values=normalised(images)).last_hidden_state
    found, dense = features(tmp_path, images, "cls+mean", dense=True)
    torch.testing.assert_close(found[:, :48], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 48:], tokens[:, 1 + storage :].mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(dense.flatten(1, 2).float(), tokens[:, 1 + storage :], atol=5e-3, rtol=0)
    if storage:
        found, _ = features(tmp_path, images, "cls+storage")
        torch.testing.assert_close(found, tokens[:, : 1 + storage].flatten(1), atol=1e-5, rtol=0)


def test_tiles_are_resized_to_the_input_of_the_folder_as_its_own_processor_does(tmp_path):
    theirs = hugging_face(tmp_path, "dinov2", crop_size={"height": 56, "width": 56}, size={"shortest_edge": 64},
                          do_center_crop=True)  # fmt: skip
    encoder = load_encoder(tmp_path)
    assert (encoder.image_px, encoder.model.patch_size, encoder.model.embed_dim) == (56, 14, 48)
    smooth = [np.asarray(Image.fromarray(image.numpy()).resize((100, 100), Image.BICUBIC)) for image in tiles(12)]
    images = torch.from_numpy(np.stack(smooth))
    shrunk = [np.asarray(Image.fromarray(image).resize((56, 56), Image.BICUBIC)) for image in smooth]
    with torch.inference_mode():
        expected = theirs(pixel_values=normalised(torch.from_numpy(np.stack(shrunk)))).last_hidden_state[:, 0]
    found, _ = features(tmp_path, images)
    assert (found - expected).abs().max() < 0.05 * expected.std()  # PIL rounds to whole grey levels


def test_dinov3_folders_and_our_files_are_read_as_backbones(tmp_path):
    save_transformers(transformers_model("vit_nano"), tmp_path / "hf")
    encoder = load_encoder(tmp_path / "hf")
    assert encoder.image_px is None
    images = tiles(64)
    with torch.inference_mode():
        expected = load_backbone(tmp_path / "hf")(normalised(images, encoder.model.mean, encoder.model.std))
    torch.testing.assert_close(features(tmp_path / "hf", images)[0], expected, atol=1e-6, rtol=0)


TIMM = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 5}


def timm_vit():
    model = require("timm").create_model("vit_tiny_patch16_224", pretrained=False, **TIMM)
    return randomize(model)


def save_timm(model, folder):
    """timm's local format: config.json with architecture, arguments and pretrained_cfg, and the tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    about = {"input_size": [3, 64, 64], "mean": MEAN, "std": STD, "num_classes": 5, "classifier": "head"}
    arguments = {key: value for key, value in TIMM.items() if key != "num_classes"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": about}))
    save_file(model.state_dict(), folder / "model.safetensors")


def test_a_timm_folder_gives_what_timm_gives(tmp_path):
    theirs = timm_vit()
    save_timm(theirs, tmp_path / "timm")
    images = tiles(64)
    with torch.inference_mode():
        tokens = theirs.forward_features(normalised(images))
    found, dense = features(tmp_path / "timm", images, "cls+mean", dense=True)
    torch.testing.assert_close(found, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5, rtol=0)
    assert dense.shape == (3, 4, 4, 48)
    with pytest.raises(FeaturesError, match="has no storage tokens"):
        features(tmp_path / "timm", images, "cls+storage")


def test_a_timm_file_needs_its_architecture(tmp_path):
    theirs = require("timm").create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save({"state_dict": randomize(theirs).state_dict()}, tmp_path / "vit.bin")
    images = tiles(224, 1)
    mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    with torch.inference_mode():
        expected = theirs.forward_features(normalised(images, mean, std))[:, 0]
    found, _ = features(tmp_path / "vit.bin", images, architecture="vit_tiny_patch16_224")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(WeightsError, match="a timm file with the name of its architecture"):
        load_encoder(tmp_path / "vit.bin")
    with pytest.raises(WeightsError, match=r"vit\.bin cannot be read by timm: .*Unknown model"):
        load_encoder(tmp_path / "vit.bin", architecture="vit_tyni")
    with pytest.raises(WeightsError, match=r"vit\.bin cannot be read by timm: .*size mismatch"):
        load_encoder(tmp_path / "vit.bin", architecture="vit_small_patch16_224")


def test_timms_dinov3_is_one_of_our_backbones(tmp_path):
    theirs = timm_model("vit_small", suffix="_qkvb", depth=1)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    images = tiles(64)
    encoder = load_encoder(tmp_path / "timm.pth")
    with torch.inference_mode():
        expected = theirs.forward_features(normalised(images, encoder.model.mean, encoder.model.std))[:, 0]
    torch.testing.assert_close(features(tmp_path / "timm.pth", images)[0], expected, atol=1e-5, rtol=0)


FUNCTIONS = """
    import torch
    from torch import nn
    from helper_beside import SCALE

    class Mean(nn.Module):
        image_px, mean, std, version = 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "1"
        def forward(self, images):
            return SCALE * images.flatten(2).mean(2)

    class Patches(Mean):
        def forward(self, images):
            patches = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5))
            return {"cls": images.mean((2, 3)), "patches": patches.flatten(2).transpose(1, 2)}

    class Wrong(Mean):
        def forward(self, images):
            return images

    def broken():
        raise OSError("the weights are gone")

    def number():
        return 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / "helper_beside.py").write_text("SCALE = 2.0")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FUNCTIONS))
    return name


def test_a_function_of_ones_own_is_an_encoder(tmp_path, functions):
    images = tiles(8)
    expected = 2 * images.double().div(255).mean((1, 2))
    for source in (f"{functions}:Mean", f"{functions}.py:Mean", f"{tmp_path / functions}.py:Mean"):
        torch.testing.assert_close(features(source, images)[0].double(), expected, atol=1e-6, rtol=0)
    pooled, dense = features(f"{functions}:Patches", images, "mean", dense=True)
    torch.testing.assert_close(pooled.double(), expected / 2, atol=1e-6, rtol=0)
    corner = images[:, :4, 4:].double().div(255).mean((1, 2))
    torch.testing.assert_close(dense[:, 0, 1].double(), corner, atol=1e-3, rtol=0)
    for options in ({"dense": True}, {"pooling": "mean"}):
        with pytest.raises(FeaturesError, match="gives no patch tokens"):
            features(f"{functions}:Mean", images, **options)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("broken", r"cannot be made: OSError: the weights are gone \(own_.*\.py line \d+\)"),
        ("absent", "cannot be made: AttributeError: .*absent"),
        ("number", "returned a int, but wanted was a torch.nn.Module"),
        ("Wrong", r"gave \(1, 3, 8, 8\) for 1 images, but wanted is a tensor \(B, D\)"),
    ],
)
def test_functions_that_do_not_give_an_encoder_are_explained(functions, function, sentence):
    with pytest.raises(WeightsError, match=sentence):
        load_encoder(f"{functions}:{function}")


def test_unknown_kinds_are_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2_with_register"}))
    with pytest.raises(WeightsError) as caught:
        load_encoder(tmp_path)
    for part in ("'dinov2_with_register'", "did you mean dinov2_with_registers?", "module:function", "timm folder"):
        assert part in str(caught.value)
    for source in (tmp_path / "gone", "README.rst"):
        with pytest.raises(WeightsError, match="does not exist" + r".*a Hugging Face folder of model type vit, deit"):
            load_encoder(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is no JSON"):
        load_encoder(tmp_path)


def test_the_list_of_kinds_stands_once_and_only_where_the_kind_is_unknown(tmp_path):
    with pytest.raises(WeightsError) as caught:
        load_encoder(tmp_path / "gone")
    assert str(caught.value).count("a published DINOv3 file") == str(caught.value).count("module:function") == 1
    model = DinoVisionTransformer(ViTSettings(embed_dim=48, depth=1, num_heads=3, ffn_hidden=96))
    model.init_weights()
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items() if name != "norm.bias"}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match=r"lacks tensors .*norm\.bias") as caught:
        load_encoder(tmp_path / "teacher.pth")
    assert "module:function" not in str(caught.value)


@pytest.mark.parametrize("library", ["transformers", "transformers lazily", "timm"])
def test_a_library_that_cannot_be_imported_is_told(tmp_path, monkeypatch, library):
    name = library.split()[0]
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    broken = "raise RuntimeError('built for another torch')\n"
    code = f"def __getattr__(name):\n    {broken}" if "lazily" in library else broken
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    config = {"architecture": "vit_tiny_patch16_224"} if name == "timm" else {"model_type": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentence = rf"package {name}, which is installed but cannot be imported \(RuntimeError: built for another torch\)"
    with pytest.raises(WeightsError, match=sentence):
        load_encoder(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)  # the broken one


@pytest.mark.parametrize(("side", "sentence"), [(50, "50 px does not divide"), (60, "60 px does not divide")])
def test_an_input_that_is_no_multiple_of_the_patch_is_told(tmp_path, side, sentence):
    hugging_face(tmp_path, "dinov2", size={"height": side, "width": side})
    with pytest.raises(WeightsError, match=f"{sentence} into patches of 14 px"):
        load_encoder(tmp_path)


def test_patches_of_ones_own_that_do_not_divide_the_input_are_told():
    def tokens(model, images):
        return {"cls": torch.zeros(1, 4), "patches": torch.zeros(1, 9, 4)}

    with pytest.raises(WeightsError, match="50 x 50 px does not divide into its 3 x 3 patches"):
        ForeignEncoder(torch.nn.Identity(), tokens, MEAN, STD, 50)
    with pytest.raises(WeightsError, match="8 patch tokens for 50 x 50 px, which is no square grid"):
        ForeignEncoder(torch.nn.Identity(), lambda *_: tokens(*_) | {"patches": torch.zeros(1, 8, 4)}, MEAN, STD, 50)


def test_tensors_that_are_missing_are_named(tmp_path):
    hugging_face(tmp_path, "dinov2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"lacks tensors of a dinov2 model: .*layer\.2\."):
        load_encoder(tmp_path)


def test_the_digest_knows_weights_settings_and_sources_but_no_place(tmp_path, functions):
    hugging_face(tmp_path / "a", "vit", size=64)
    first = load_encoder(tmp_path / "a").sha256
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_encoder(tmp_path / "b").sha256 == first
    about = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    (tmp_path / "b" / "preprocessor_config.json").write_text(json.dumps(about | {"image_mean": STD}))
    assert load_encoder(tmp_path / "b").sha256 != first
    hugging_face(tmp_path / "a", "vit", size=64, seed=1)
    assert load_encoder(tmp_path / "a").sha256 != first
    digests = [load_encoder(f"{functions}.py:Mean").sha256]
    source = tmp_path / f"{functions}.py"
    source.write_text(source.read_text().replace("SCALE *", "3 * SCALE *"))
    digests.append(load_encoder(f"{functions}.py:Mean").sha256)
    assert digests[0] != digests[1]


def test_the_digest_of_our_own_knows_the_card(tmp_path):
    settings = ViTSettings(embed_dim=48, depth=1, num_heads=3, ffn_hidden=96)
    model = DinoVisionTransformer(settings)
    model.init_weights()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "teacher.pth")
    card = {"backbone": settings.as_dict(), "mean": MEAN, "std": STD}
    cards = [card, card | {"mean": STD}, card | {"std": MEAN}]
    cards.append(card | {"backbone": settings.as_dict() | {"rope_normalize_coords": "max"}})
    digests = []
    for content in [*cards, card]:
        (tmp_path / "model.json").write_text(json.dumps(content))
        digests.append(load_encoder(tmp_path / "teacher.pth").sha256)
    assert len(set(digests)) == 4 and digests[0] == digests[-1]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"num_attention_heads": 4}, True),
        ({"hidden_act": "relu"}, True),
        ({"_name_or_path": "/elsewhere", "transformers_version": "9", "torch_dtype": "float32"}, False),
    ],
)
def test_the_digest_knows_the_whole_config(tmp_path, change, differs):
    hugging_face(tmp_path, "dinov2")
    first = load_encoder(tmp_path).sha256
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert (load_encoder(tmp_path).sha256 != first) == differs


def test_the_digest_knows_further_files_and_a_version(tmp_path, functions):
    folder, file = tmp_path / "data", tmp_path / "data" / "scale.txt"
    folder.mkdir()
    file.write_text("2")
    source = f"{functions}:Mean"
    digests = [load_encoder(source, **options).sha256 for options in ({}, {"files": [file]}, {"files": [folder]})]
    digests.append(load_encoder(source, version="2").sha256)
    file.write_text("3")
    digests += [load_encoder(source, files=[path]).sha256 for path in (file, folder)]
    assert len(set(digests)) == 6
    with pytest.raises(WeightsError, match=r"gone\.txt, a file that the encoder reads, does not exist"):
        load_encoder(source, files=[tmp_path / "gone.txt"])


def test_the_number_format_follows_the_device():
    assert choose_precision(CPU) == torch.float32
    assert choose_precision(CPU, "bfloat16") == torch.bfloat16
    assert choose_precision(torch.device("cuda"), "float32") == torch.float32


def test_bfloat16_is_close_and_on_request(tmp_path):
    hugging_face(tmp_path, "vit", size=64)
    images = tiles(64)
    full, half = (features(tmp_path, images, precision=name)[0] for name in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.1 * full.abs().max()


def test_patches_of_other_encoders_are_shown_beside_ours(tmp_path):
    """DINOv2 at any size; encoders that take one size see windows of it; those without patches say so."""
    theirs = hugging_face(tmp_path / "v2", "dinov2_with_registers", size={"height": 56, "width": 56})
    encoder = load_patch_encoder("v2", tmp_path / "v2", "cpu")
    image = np.random.default_rng(0).integers(0, 255, (84, 126, 3), dtype=np.uint8)
    with torch.inference_mode():
        tokens = theirs(pixel_values=normalised(torch.from_numpy(image)[None])).last_hidden_state
    found = dense_features(encoder, image)
    assert (encoder.patch_px, encoder.window_px, found.shape) == (14, None, (6, 9, 48))
    np.testing.assert_allclose(found.reshape(54, 48), tokens[0, 5:], atol=1e-5)
    hugging_face(tmp_path / "vit", "vit", size={"height": 64, "width": 64})
    assert load_patch_encoder("vit", tmp_path / "vit", "cpu").window_px == 64
    (tmp_path / "mine.py").write_text("import torch\n\n\ndef flat():\n    return torch.nn.Flatten()\n")
    assert not load_patch_encoder("mine", f"{tmp_path}/mine.py:flat", "cpu").gives_patches
