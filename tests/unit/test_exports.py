"""Exports, as the libraries that they are meant for open them: transformers, timm and ONNX Runtime."""

import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoscope.errors import ConfigError, WeightsError
from dinoscope.export import formats, onnx_model, verify
from dinoscope.export.formats import export_model
from dinoscope.export.timm_model import timm_name
from dinoscope.files import atomic_folder, read_json, write_json
from dinoscope.models.card import license_note
from dinoscope.models.foreign import TIMM, to_foreign
from dinoscope.models.registry import ARCHS, ViTSettings, ffn_hidden
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_backbone, read_model_file, state_digest
from other_libraries import random_backbone, relative_error, require, tokens_of

SMALL = ViTSettings(64, 2, 2, 256, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16", rope_rescale=2.0)
SWIGLU = dataclasses.replace(SMALL, ffn_layer="swiglu", ffn_hidden=176)
# as the demo's recipe has it: no LayerScale
DEMO = dataclasses.replace(SMALL, layerscale=None)
SIZES = ((2, 48, 32), (1, 96, 96), (3, 16, 80))


def teacher(folder: Path, settings: ViTSettings = SMALL, changes: Any = None, **card: Any) -> Path:
    """A teacher.pth with its card, random weights in which everything matters; key biases are zero where masked."""
    state = random_backbone(settings).state_dict()
    for name in [name for name in state if name.endswith("bias_mask")]:
        state[name.removesuffix("_mask")].chunk(3)[1].zero_()
    if changes:
        changes(state)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, folder / "teacher.pth")
    told = {"backbone": settings.as_dict(), "mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "origin": "a seed"}
    write_json(folder / "model.json", told | {"run": "pretrain", "iteration": 41} | card)
    return folder / "teacher.pth"


def random_images(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height))


def in_transformers(folder: Path) -> torch.nn.Module:
    return require("transformers").AutoModel.from_pretrained(folder).eval()


def in_timm(folder: Path) -> torch.nn.Module:
    return require("timm").create_model(f"local-dir:{folder}", pretrained=True).eval()


OPEN = {"hf": in_transformers, "timm": in_timm}


@pytest.mark.parametrize("format", ["hf", "timm"])
@pytest.mark.parametrize("changes", [
    {},
    {"ffn_layer": "swiglu", "ffn_hidden": 176},
    {"ffn_layer": "swiglu", "ffn_hidden": 171},
    {"layerscale": None},
    {"norm_layer": "layernorm"},
    {"qkv_bias": False, "mask_k_bias": False, "proj_bias": False, "ffn_bias": False},
    {"num_storage_tokens": 0},
    {"rope_base": 25.0, "patch_size": 8, "in_chans": 4, "ffn_hidden": 100},
    {"rope_shift": 0.1, "rope_jitter": 1.5, "rope_rescale": None, "drop_path_rate": 0.2},
], ids=["mlp", "swiglu", "odd swiglu", "no LayerScale", "eps 1e-6", "no biases", "no storage tokens", "other sizes",
        "training"])  # fmt: skip
def test_features_and_tensors_come_back(tmp_path: Path, format: str, changes: dict) -> None:
    """The other library's features are ours, and reading the export gives the very tensors and settings again."""
    require({"hf": "transformers", "timm": "timm"}[format])
    settings = dataclasses.replace(SMALL, **changes)
    no_mask_token = (lambda state: state["mask_token"].zero_()) if format == "timm" else None
    path = teacher(tmp_path / "ours", settings, no_mask_token)
    report = export_model(path, format, tmp_path / format)
    ours, theirs = load_backbone(path), OPEN[format](tmp_path / format)
    patch = settings.patch_size
    for batch, height, width in SIZES:
        images = random_images(batch, height // 16 * patch, width // 16 * patch, settings.in_chans)
        assert relative_error(tokens_of(theirs, images), tokens_of(ours, images)) < 1e-5
    assert report == read_json(tmp_path / format / "verification.json")
    assert len({entry.stat().st_mode for entry in (tmp_path / format).iterdir()}) == 1  # who may read one, may read all
    assert report["passed"] and report["tolerance"] == 1e-5
    assert list(report["outputs"]) == ["cls", "storage", "patches"]
    assert all(entry["max_relative_difference"] < 1e-5 for entry in report["outputs"].values())
    back, before = read_model_file(tmp_path / format), read_model_file(path)
    assert back.settings == settings
    assert back.foreign
    assert state_digest(back.backbone) == state_digest(before.backbone) == back.card["weights_sha256"]
    assert (load_backbone(tmp_path / format).mean, back.card["iteration"]) == ((0.7, 0.5, 0.6), 41)
    assert back.card["export"]["weights_sha256_before"] == back.card["weights_sha256"]


def test_what_training_alone_uses_is_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    require("transformers"), require("timm")
    settings = dataclasses.replace(SMALL, untie_global_and_local_cls_norm=True)
    path = teacher(tmp_path / "ours", settings)
    for format, notes in {"hf": ["local_cls_norm"], "timm": ["local_cls_norm", "mask_token"]}.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dinoscope.export"):
            report = export_model(path, format, tmp_path / format)
        assert [note.split()[0] for note in report["notes"]] == notes
        assert all(note in caplog.text for note in report["notes"])
        images = random_images(2, 48, 32)
        assert (
            relative_error(tokens_of(load_backbone(tmp_path / format), images), tokens_of(load_backbone(path), images))
            < 1e-6
        )
    assert not read_model_file(tmp_path / "timm").backbone["mask_token"].any()


def test_a_masked_key_bias_and_half_precision(tmp_path: Path) -> None:
    """What stands in the masked third has no effect and is stored nowhere else; bf16 weights come out as float32."""
    require("transformers")

    def changes(state: dict) -> None:
        for name, tensor in state.items():
            if name != "rope_embed.periods":
                state[name] = tensor.bfloat16()
        state["blocks.0.attn.qkv.bias"].chunk(3)[1].fill_(7)

    path = teacher(tmp_path / "ours", SMALL, changes)
    export_model(path, "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert not [name for name in tensors if "k_proj.bias" in name]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    images = random_images(1, 64, 48)
    assert (
        relative_error(tokens_of(in_transformers(tmp_path / "hf"), images), tokens_of(load_backbone(path), images))
        < 1e-5
    )


def test_key_biases_that_are_not_masked(tmp_path: Path) -> None:
    require("transformers")
    path = teacher(tmp_path / "ours", dataclasses.replace(SMALL, mask_k_bias=False))
    export_model(path, "hf", tmp_path / "hf")
    assert read_json(tmp_path / "hf" / "config.json")["key_bias"] is True
    assert state_digest(read_model_file(tmp_path / "hf").backbone) == state_digest(read_model_file(path).backbone)
    with pytest.raises(WeightsError, match=r"timm cannot express student\.mask_k_bias = False .*--format onnx"):
        export_model(path, "timm", tmp_path / "timm")


def test_rounded_periods_of_published_files_are_told(tmp_path: Path) -> None:
    """Other libraries compute the periods exactly: how far that is from the file's own features is measured."""
    require("transformers")
    path = teacher(tmp_path / "ours", SMALL, lambda state: state.update(
        {"rope_embed.periods": state["rope_embed.periods"].bfloat16()}))  # fmt: skip
    report = export_model(path, "hf", tmp_path / "hf")
    (note,) = report["notes"]
    assert "RoPE periods are rounded" in note
    images, apart = verify._images(load_backbone(path)), 0.0
    ours, theirs = load_backbone(path), in_transformers(tmp_path / "hf")
    for batch in images:
        expected = tokens_of(ours, batch)[:, 0]
        apart = max(apart, (theirs(batch).pooler_output - expected).abs().max().item())
    found = report["by_rounded_rope_periods"]["cls"]["max_abs_difference"]
    assert found > 1e-4
    assert found == pytest.approx(apart, rel=0.05)
    assert report["by_rounded_rope_periods"]["cls"]["max_relative_difference"] > 10 * report["tolerance"]  # as docs say


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"untie_cls_and_patch_norms": True}, r"student\.untie_cls_and_patch_norms = True \(it has one final norm"),
    ({"norm_layer": "rmsnorm"}, r"student\.norm_layer = rmsnorm"),
    ({"rope_base": None, "rope_min_period": 0.5, "rope_max_period": 9.0}, r"student\.pos_embed_rope_min_period = 0\.5"),
    ({"rope_normalize_coords": "max"}, r"student\.pos_embed_rope_normalize_coords = max \(it has separate\)"),
    ({"rope_dtype": "bf16"}, r"student\.pos_embed_rope_dtype = bf16 .*model\.json"),
])  # fmt: skip
@pytest.mark.parametrize("format", ["hf", "timm"])
def test_what_a_format_cannot_express_is_named(tmp_path: Path, format: str, changes: dict, sentence: str) -> None:
    require({"hf": "transformers", "timm": "timm"}[format])
    path = teacher(tmp_path / "ours", dataclasses.replace(SMALL, **changes))
    with pytest.raises(WeightsError, match=rf"teacher\.pth cannot be exported: .* cannot express {sentence}"):
        export_model(path, format, tmp_path / format)
    assert not (tmp_path / format).exists()


def test_a_published_file_has_the_license_in_its_export(tmp_path: Path) -> None:
    require("transformers")
    torch.save(random_backbone(SMALL).state_dict(), tmp_path / "published.pth")
    export_model(tmp_path / "published.pth", "hf", tmp_path / "hf")
    card = read_json(tmp_path / "hf" / "model.json")
    assert "DINOv3 License" in card["license_note"]
    assert "license_name: dinov3-license" in (tmp_path / "hf" / "README.md").read_text()
    assert card["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("format", ["hf", "timm"])
def test_no_license_is_claimed_where_nothing_tells_the_origin(tmp_path: Path, format: str) -> None:
    """A teacher.pth that was copied without its model.json may come from a seed, and so may an export of it."""
    require({"hf": "transformers", "timm": "timm"}[format])
    path = teacher(tmp_path / "ours")
    path.with_name("model.json").unlink()
    export_model(path, format, tmp_path / "once")
    (tmp_path / "once" / "model.json").unlink()
    export_model(tmp_path / "once", format, tmp_path / "twice")
    for folder in ("once", "twice"):
        assert "Derived from weights published by Meta" not in (tmp_path / folder / "README.md").read_text()
        assert "license_name" not in (tmp_path / folder / "README.md").read_text()
    card = read_json(tmp_path / "twice" / "model.json")
    assert card["origin"] == "not recorded"
    assert card["license_note"].startswith("If the training started from weights published by Meta")


@pytest.mark.parametrize(("origin", "words"), [
    ("published weights", "Derived from"), (None, "If the training"), ("not recorded", "If the training"),
    ("random initialisation, distilled from published weights", "Derived from"),
    ("random initialisation, distilled from not recorded", "If the training"),
    ("not recorded, distilled from published weights", "Derived from"), ("random initialisation, seed 0", None),
])  # fmt: skip
def test_the_license_note_follows_all_of_the_origin(origin: str | None, words: str | None) -> None:
    note = license_note(origin)
    assert note is None if words is None else note.startswith(words)


# Hugging Face


def test_everything_stands_in_the_config_of_hugging_face(tmp_path: Path) -> None:
    library = require("transformers")
    settings = dataclasses.replace(SWIGLU, rope_shift=0.1, rope_jitter=1.5, drop_path_rate=0.25, layerscale=1e-4)
    export_model(teacher(tmp_path / "ours", settings), "hf", tmp_path / "hf")
    config = library.AutoConfig.from_pretrained(tmp_path / "hf")
    expected = {
        "model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 4, "patch_size": 16, "num_channels": 3,
        "image_size": 224, "use_gated_mlp": True, "hidden_act": "silu", "layer_norm_eps": 1e-5, "query_bias": True,
        "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True, "layerscale_value": 1e-4,
        "drop_path_rate": 0.25, "rope_theta": 100.0, "pos_embed_shift": 0.1, "pos_embed_jitter": 1.5,
        "pos_embed_rescale": 2.0,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    (tmp_path / "hf" / "model.json").unlink()  # our reader needs no more than transformers does
    loaded = load_backbone(tmp_path / "hf").settings
    assert dataclasses.replace(loaded, layerscale=1e-4) == settings


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_images_are_prepared_as_ours(tmp_path: Path, backend: str) -> None:
    from PIL import Image

    library = require("transformers")
    if backend == "torchvision":
        require("torchvision")
    export_model(teacher(tmp_path / "ours"), "hf", tmp_path / "hf")
    processor = library.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend=backend)
    model, ours = in_transformers(tmp_path / "hf"), load_backbone(tmp_path / "ours" / "teacher.pth")
    for size in ((224, 224), (256, 256), (144, 144), (96, 176)):
        tile = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        found = processor(Image.fromarray(tile), return_tensors="pt")["pixel_values"]
        expected = ((tile / 255 - [0.7, 0.5, 0.6]) / [0.2, 0.25, 0.3]).transpose(2, 0, 1)[None]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        features = model(found).pooler_output
        assert relative_error(features, ours(torch.from_numpy(expected).float())) < 1e-5


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"do_resize": True}, r"makes images of \[224, 224\] px of \[144, 256\] px"),
    ({"image_mean": [0.7, 0.5, 0.61]}, "normalises images otherwise: by up to"),
])  # fmt: skip
def test_a_processor_with_other_images_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, sentence: str
) -> None:
    require("transformers")
    write = formats.write_hugging_face

    def wrong(model: Any, folder: Path) -> dict:
        said = write(model, folder)
        path = folder / "preprocessor_config.json"
        write_json(path, read_json(path) | changes)
        return said

    monkeypatch.setattr(formats, "write_hugging_face", wrong)
    with pytest.raises(WeightsError, match=sentence):
        export_model(teacher(tmp_path / "ours"), "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_hugging_face_needs_no_torchvision(tmp_path: Path) -> None:
    """In a process in which there is none, the classes that users name take a tile to its features."""
    require("transformers")
    path = teacher(tmp_path / "ours")
    export_model(path, "hf", tmp_path / "hf")
    tile = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    np.save(tmp_path / "tile.npy", tile)
    lines = """
        import sys
        sys.modules["torchvision"] = None
        import numpy
        from transformers import AutoImageProcessor, AutoModel
        processor = AutoImageProcessor.from_pretrained("hf")
        assert type(processor).__name__ == "ViTImageProcessorPil"
        out = AutoModel.from_pretrained("hf")(**processor(numpy.load("tile.npy"), return_tensors="pt"))
        numpy.save("cls.npy", out.pooler_output.detach())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = load_backbone(path)
    images = ((torch.from_numpy(tile) / 255 - torch.tensor(ours.mean)) / torch.tensor(ours.std)).permute(2, 0, 1)[None]
    assert relative_error(torch.from_numpy(np.load(tmp_path / "cls.npy")), ours(images)) < 1e-5


# timm


@pytest.mark.parametrize(("arch", "ffn"), [
    ("vit_tiny", "mlp"), ("vit_small", "mlp"), ("vit_small_plus", "swiglu"), ("vit_base", "mlp"), ("vit_large", "mlp"),
    ("vit_huge_plus", "swiglu"), ("vit_7b", "swiglu"),
])  # fmt: skip
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_timm_makes_every_size_by_its_name(arch: str, ffn: str, qkv_bias: bool) -> None:
    """Without any tensor: timm's model of that name, on the meta device, has the shapes that are exported."""
    timm = require("timm")
    numbers = ARCHS[arch]
    hidden = ffn_hidden(numbers.embed_dim, numbers.ffn_ratio, numbers.ffn or ffn)
    settings = ViTSettings(
        numbers.embed_dim, numbers.depth, numbers.num_heads, hidden, ffn, num_storage_tokens=4, qkv_bias=qkv_bias,
        mask_k_bias=qkv_bias, norm_layer="layernormbf16",
    )  # fmt: skip
    name, arguments = timm_name(settings)
    named = (arch, qkv_bias) not in {("vit_tiny", False), ("vit_7b", True)}  # timm has no such model
    assert (not arguments) == named
    if named:
        assert name.startswith(f"{arch}_patch16_dinov3") and name.endswith("_qkvb") == qkv_bias
    with torch.device("meta"):
        model, ours = timm.create_model(name, pretrained=False, **arguments), DinoVisionTransformer(settings)
    state = ours.state_dict()
    masks = {key: torch.ones(tensor.shape) for key, tensor in state.items() if key.endswith("bias_mask")}
    for mask in masks.values():
        mask.chunk(3)[1].zero_()
    state |= masks
    exported = {key: tensor.shape for key, tensor in to_foreign(state, TIMM).items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == exported
    assert model.norm.eps == 1e-5 and model.blocks[0].attn.num_heads == numbers.num_heads


def test_timm_takes_a_named_model_strictly(tmp_path: Path) -> None:
    timm = require("timm")
    settings = ViTSettings(192, 12, 3, 768, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16")
    path = teacher(tmp_path / "ours", settings)
    export_model(path, "timm", tmp_path / "timm")
    said = read_json(tmp_path / "timm" / "model.json")["export"]
    assert (said["timm_name"], said["timm_arguments"]) == ("vit_tiny_patch16_dinov3_qkvb", {})
    model = timm.create_model(said["timm_name"]).eval()
    model.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"), strict=True)
    ours, images = load_backbone(path), random_images(2, 96, 48)
    assert relative_error(tokens_of(model, images), tokens_of(ours, images)) < 1e-5
    with torch.no_grad():
        assert relative_error(in_timm(tmp_path / "timm")(images), ours(images)) < 1e-5  # pools the CLS token, as we do


# Their own converters


def flat_file(settings: ViTSettings, path: Path) -> dict[str, torch.Tensor]:
    """A file as published ones are laid out, of the teacher that `teacher` writes."""
    return read_model_file(teacher(path, settings)).backbone


@pytest.mark.parametrize("settings", [SMALL, SWIGLU], ids=["mlp", "swiglu"])
def test_timm_converts_our_flat_file(tmp_path: Path, settings: ViTSettings) -> None:
    from importlib import import_module

    timm = require("timm")
    flat = flat_file(settings, tmp_path / "ours")
    name, arguments = timm_name(settings)
    theirs = timm.create_model(name, **arguments).eval()
    converted = import_module("timm.models.eva").checkpoint_filter_fn(dict(flat), theirs)
    theirs.load_state_dict(converted, strict=True)
    ours = load_backbone(tmp_path / "ours" / "teacher.pth")
    images = random_images(2, 64, 48)
    assert relative_error(tokens_of(theirs, images), tokens_of(ours, images)) < 1e-5
    export_model(tmp_path / "ours" / "teacher.pth", "timm", tmp_path / "timm")
    exported = load_file(tmp_path / "timm" / "model.safetensors")
    assert exported.keys() == converted.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in converted.items())


def test_transformers_maps_our_names_as_it_maps_those_of_its_hub(tmp_path: Path) -> None:
    """It has no converter of published files; what it has is a renaming of its own files, which must find them all."""
    library = require("transformers")
    export_model(teacher(tmp_path / "ours"), "hf", tmp_path / "hf")
    on_disk = load_file(tmp_path / "hf" / "model.safetensors")
    model, loading = library.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    library.utils.logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "again")  # transformers writes by its mapping, backwards
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == on_disk.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in on_disk.items())


# ONNX


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher.pth and its export, without LayerScale and with norms that no other format expresses."""
    require("onnxscript"), require("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    settings = dataclasses.replace(SWIGLU, layerscale=None, untie_cls_and_patch_norms=True)
    path = teacher(folder / "ours", settings)
    export_model(path, "onnx", folder / "onnx")
    return path, folder / "onnx"


def test_onnx_runtime_has_our_features_at_any_size(onnx_export: tuple[Path, Path]) -> None:
    path, folder = onnx_export
    session = require("onnxruntime").InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ours = load_backbone(path)
    for batch, height, width in ((1, 16, 16), (5, 48, 48), (2, 224, 224), (1, 32, 176), (3, 160, 64)):
        images = random_images(batch, height, width)
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        expected = ours.forward_features(images)
        assert patches.shape == (batch, height * width // 256, 64)
        assert np.abs(cls - expected["cls"].numpy()).max() < 1e-4
        assert np.abs(patches - expected["patches"].numpy()).max() < 1e-4


def test_onnx_says_what_it_is(onnx_export: tuple[Path, Path]) -> None:
    onnx = require("onnx")
    path, folder = onnx_export
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    model = onnx.load(folder / "model.onnx")
    said = read_json(folder / "model.json")["export"]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": said["opset"]} == {"": 20}
    assert said["bytes_of_weights"] == pytest.approx((folder / "model.onnx").stat().st_size, rel=0.2)
    (given,) = model.graph.input
    assert given.name == said["input"] == "images"
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (given, *model.graph.output)
    }
    assert shapes == {"images": said["input_shape"], **said["outputs"]}
    assert shapes == {"images": ["batch", 3, "16*h", "16*w"], "cls": ["batch", 64], "patches": ["batch", "h*w", 64]}
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert (told["mean"], told["std"]) == ("[0.7, 0.5, 0.6]", "[0.2, 0.25, 0.3]")
    content = (folder / "model.onnx").read_bytes()
    assert not any(part.encode() in content for part in (str(Path(__file__).parents[2]), str(path.parent), ".py"))


def test_large_weights_lie_beside_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("onnxscript"), require("onnxruntime")
    monkeypatch.setattr(onnx_model, "_LARGEST_IN_ONE_FILE", 1000)
    settings = dataclasses.replace(SMALL, depth=1, rope_normalize_coords="max", norm_layer="rmsnorm")
    report = export_model(teacher(tmp_path / "ours", settings), "onnx", tmp_path / "moved" / "onnx")
    assert report["passed"]
    assert (tmp_path / "moved" / "onnx" / "model.onnx").stat().st_size < 60_000
    assert (tmp_path / "moved" / "onnx" / "model.onnx.data").stat().st_size > 100_000


def test_onnx_computes_rope_in_float32_alone(tmp_path: Path) -> None:
    require("onnxscript"), require("onnxruntime")
    path = teacher(tmp_path / "ours", dataclasses.replace(SMALL, rope_dtype="bf16"))
    with pytest.raises(WeightsError, match=r"ONNX cannot express student\.pos_embed_rope_dtype = bf16"):
        export_model(path, "onnx", tmp_path / "onnx")


# Verification, and what is there when it fails


def test_other_features_are_an_error_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("transformers")
    path = teacher(tmp_path / "ours")
    export_model(path, "hf", tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    write = formats.write_hugging_face

    def wrong(model: Any, folder: Path) -> dict:
        said = write(model, folder)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"rope_theta": 99.0})
        return said

    monkeypatch.setattr(formats, "write_hugging_face", wrong)
    for output in (tmp_path / "new", tmp_path / "hf"):
        with pytest.raises(
            WeightsError, match=r"not give our features: transformers [\d.]+ differs in cls by .* patches"
        ):
            export_model(path, "hf", output)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "ours"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_an_export_is_exported_again(tmp_path: Path) -> None:
    """From one library's format to the other's, and over what an earlier export has left."""
    require("transformers"), require("timm")
    export_model(teacher(tmp_path / "ours", DEMO), "hf", tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "timm")
    export_model(tmp_path / "hf", "timm", tmp_path / "timm")
    assert not (tmp_path / "timm" / "preprocessor_config.json").exists()
    images = random_images(2, 48, 64)
    ours = load_backbone(tmp_path / "ours" / "teacher.pth")
    assert relative_error(tokens_of(in_timm(tmp_path / "timm"), images), tokens_of(ours, images)) < 1e-5
    assert read_json(tmp_path / "timm" / "model.json")["export"]["format"] == "timm"


def test_differences_are_the_largest_ones() -> None:
    ours = [{"cls": torch.tensor([[1.0, -4.0]])}, {"cls": torch.tensor([[2.0, 2.0]])}]
    theirs = [{"cls": torch.tensor([[1.0, -4.5]])}, {"cls": torch.tensor([[2.25, 2.0]])}]
    assert verify._differences(theirs, ours) == {"cls": {"max_abs_difference": 0.5, "max_relative_difference": 0.125}}
    theirs[1]["cls"][0, 0] = float("nan")
    assert not verify._differences(theirs, ours)["cls"]["max_relative_difference"] < 1
    with pytest.raises(WeightsError, match="cls has shape"):
        verify._differences([{"cls": torch.ones(1, 1)}], [{"cls": torch.ones(1, 2)}])


@pytest.mark.parametrize(("format", "library"), [("hf", "transformers"), ("timm", "timm"), ("onnx", "onnxruntime")])
def test_a_missing_library_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, library: str
) -> None:
    monkeypatch.setattr(verify, "_LIBRARIES", {format: (library,)})
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ConfigError, match=rf'{library}, which cannot be imported .*pip install "dinoscope\[export\]".*export\.yaml'
    ):
        export_model(teacher(tmp_path / "ours"), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which is no part of an export"):
        export_model(tmp_path / "nothing.pth", "hf", tmp_path)
    with pytest.raises(ConfigError, match=r"is a file"):
        export_model(tmp_path / "nothing.pth", "hf", tmp_path / "thesis.tex")


def test_a_folder_that_no_export_has_made_is_left_alone(tmp_path: Path) -> None:
    """Somebody else's model has the very names of an export."""
    library = require("transformers")
    path = teacher(tmp_path / "ours")
    export_model(path, "hf", tmp_path / "hf")
    library.utils.logging.disable_progress_bar()
    in_transformers(tmp_path / "hf").save_pretrained(tmp_path / "theirs")
    for name in ("README.md", "verification.json", "model.json"):  # the names tell nothing, nor does damaged JSON
        (tmp_path / "theirs" / name).write_text("[1, 2")
        with pytest.raises(ConfigError, match=r"theirs holds README\.md, which no export has left there"):
            export_model(path, "timm", tmp_path / "theirs")
    assert in_transformers(tmp_path / "theirs") is not None


def test_weights_are_not_replaced_by_their_export(tmp_path: Path) -> None:
    require("transformers"), require("timm")
    export_model(teacher(tmp_path / "ours"), "hf", tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "link").symlink_to("hf")
    linked = tmp_path / "linked"  # as in the cache of Hugging Face
    shutil.copytree(tmp_path / "hf", linked)
    (linked / "model.safetensors").rename(tmp_path / "blobs" / "4f2a")
    (linked / "model.safetensors").symlink_to("../blobs/4f2a")
    for weights, output in (("hf", "hf"), ("hf/model.safetensors", "hf"), ("hf", "link"), ("linked", "linked")):
        with pytest.raises(ConfigError, match=rf"{output} holds the weights .*{weights}.* give another folder"):
            export_model(tmp_path / weights, "timm", tmp_path / output)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert (linked / "model.safetensors").is_symlink()


@pytest.mark.parametrize("left", ["README.md", "verification.json", "model.json"])
def test_what_desktops_leave_and_snakemake_removes_is_no_obstacle(tmp_path: Path, left: str) -> None:
    require("transformers")
    path, folder = teacher(tmp_path / "ours"), tmp_path / "hf"
    export_model(path, "hf", folder)
    for entry in folder.iterdir():
        if entry.name != left:
            entry.unlink()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._model.json"):
        (folder / name).touch()
    export_model(path, "hf", folder)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / ".DS_Store").exists()


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "disk" / "place" / "old").touch()
    (tmp_path / "link").symlink_to("disk/place")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "disk", "disk/place", "disk/place/new", "link"
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["hf", "timm"])
def test_tensors_that_came_out_otherwise_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """One that features do not depend on to the tolerance, so that verification would let it pass."""
    require({"hf": "transformers", "timm": "timm"}[format])
    path = teacher(tmp_path / "ours")
    name = {"hf": "write_hugging_face", "timm": "write_timm"}[format]
    write = getattr(formats, name)

    def wrong(model: Any, folder: Path) -> dict:
        said = write(model, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1e-6}, folder / "model.safetensors")
        return said

    monkeypatch.setattr(formats, name, wrong)
    with pytest.raises(WeightsError, match="tensors read back are not those that were written"):
        export_model(path, format, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours"]


def test_a_place_where_no_folder_can_be_is_named(tmp_path: Path) -> None:
    require("transformers")
    path = teacher(tmp_path / "ours")
    for output, reason in ((path / "hf", "exists"), (path / "below" / "hf", "Not a"), (tmp_path / ("x" * 300), "long")):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(output))} cannot be written \(.*{reason}.*\); free"):
            export_model(path, "hf", output)


@pytest.mark.parametrize("limit", [200, 20_000], ids=["JSON", "weights"])
@pytest.mark.parametrize("format", ["hf", "timm", "onnx"])
def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, format: str, limit: int) -> None:
    """The system refuses larger files than `limit` bytes, as it does when a disk is full."""
    for library in {"hf": ["transformers"], "timm": ["timm"], "onnx": ["onnxscript", "onnxruntime"]}[format]:
        require(library)
    lines = f"""
        import resource
        from dinoscope.cli import run_script
        from dinoscope.export.formats import export_model
        from other_libraries import require
        require("timm")
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        run_script(lambda: export_model("ours/teacher.pth", "{format}", "out"))
    """
    teacher(tmp_path / "ours")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: out cannot be written ("), done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


# README.md


def test_the_lines_in_the_readme_give_our_features(
    tmp_path: Path, onnx_export: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are run as they stand; the ONNX model is another one than the two others."""
    from PIL import Image

    require("transformers"), require("timm")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Use the model elsewhere")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    tile = np.random.default_rng(0).integers(0, 256, (144, 256, 3), dtype=np.uint8)
    opaque = np.full((144, 256, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate((tile, opaque), axis=2)).save(tmp_path / "tile.png")  # RGBA
    path = teacher(tmp_path / "ours")
    for format in ("hf", "timm"):
        export_model(path, format, tmp_path / "results" / "models" / "gram" / format)
    (tmp_path / "results" / "models" / "gram" / "onnx").symlink_to(onnx_export[1])
    monkeypatch.chdir(tmp_path)
    for snippet, weights, word in zip(snippets, (path, path, onnx_export[0]), ("hf", "timm", "onnx"), strict=True):
        assert f"gram/{word}" in snippet
        ours = load_backbone(weights)
        images = ((torch.from_numpy(tile) / 255 - torch.tensor(ours.mean)) / torch.tensor(ours.std)).permute(2, 0, 1)[
            None
        ]
        expected, names = ours.forward_features(images), {}
        exec(snippet, names)
        for name in ("cls", "patches"):
            found = torch.as_tensor(names[name]).detach()
            assert relative_error(found, expected[name]) < 1e-5, (word, name)
