"""Merged segmentation models: opened by what opens any encoder, with the logits of the adapted one."""

import json
import sys
from pathlib import Path

import pytest
import torch

import export_segmenter
from dinoscope.errors import ConfigError, WeightsError
from dinoscope.features.encoders import load_encoder
from dinoscope.models.weights import load_backbone
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.encoder_parts import patch_maps
from dinoscope.segment.export import export_merged
from dinoscope.segment.files import load_segmenter, make_card, read_card, save_segmenter
from dinoscope.segment.model import Segmenter
from other_libraries import require
from tiny_segmenter import some_images, trained, write_dinov2, write_own_encoder

CLASSES, PALETTE = ("nothing", "nucleus", "gland"), ((0, 0, 0), (255, 0, 10), (0, 90, 181))


def saved(folder: Path, source: Path, decoder: str = "linear", **options) -> Segmenter:
    """A trained model in `folder`/model."""
    segmenter = trained(Segmenter(load_encoder(source), 3, decoder, **options)).eval()
    save_segmenter(folder / "model", segmenter, make_card(segmenter, CLASSES, PALETTE, mpp=0.5, measures={"miou": 0.3}))
    return segmenter


@pytest.mark.parametrize("options", [{"lora": LoraSettings(2, 3.0, ("q", "v", "ffn"))}, {"trainable": "last_n"}])
@pytest.mark.parametrize("decoder", ["linear", "fpn"])
def test_the_merged_backbone_is_opened_as_any_other(tmp_path, monkeypatch, decoder, options):
    source = write_own_encoder(tmp_path / "a.pth")
    (tmp_path / "model.json").write_text(
        json.dumps({"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.2, 0.1], "origin": "here"})
    )
    segmenter = saved(tmp_path, source, decoder, **options)
    line = ["--segmenter", tmp_path / "model", "--encoder", source, "--output", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["export_segmenter.py", *map(str, line)])
    export_segmenter.main()
    images = some_images(64, 48)
    backbone = load_backbone(tmp_path / "merged")
    assert not [name for name in backbone.state_dict() if "lora" in name]
    with torch.no_grad():
        for found, wanted in zip(
            patch_maps(backbone, images, 4), patch_maps(segmenter.encoder, images, 4), strict=True
        ):
            assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5
        merged = load_segmenter(tmp_path / "merged", tmp_path / "merged")
        assert (merged(images) - segmenter(images)).abs().max() < 1e-4
    plain = load_backbone(source).forward_features(images)["patches"]
    assert (backbone.forward_features(images)["patches"] - plain).abs().max() > 0.01
    assert (backbone.mean, backbone.std) == ((0.7, 0.5, 0.6), (0.2, 0.2, 0.1))
    card = read_card(tmp_path / "merged")
    assert (card.classes, card.palette, card.mpp, card.measures) == (CLASSES, PALETTE, 0.5, {"miou": 0.3})
    assert card.lora is None and card.trainable == "decoder"
    assert json.loads((tmp_path / "merged/model.json").read_text())["origin"] == "here"
    torch.load(tmp_path / "merged/teacher.pth", weights_only=True)["teacher"]["backbone.cls_token"]


@pytest.mark.parametrize("registers", [0, 4])
def test_the_merged_dinov2_is_a_hugging_face_folder(tmp_path, registers):
    library = require("transformers")
    source = write_dinov2(tmp_path / "hf", registers=registers)
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    segmenter = saved(tmp_path, source, lora=LoraSettings(2))
    assert export_merged(tmp_path / "model", source, tmp_path / "merged") < 1e-5
    images = some_images(56, 70)
    theirs = library.AutoModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = theirs(images).last_hidden_state[:, 1 + registers :]
        wanted = segmenter.encoder.forward_features(images)["patches"]
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5
        merged = load_segmenter(tmp_path / "merged", tmp_path / "merged")
        assert (merged(images) - segmenter(images)).abs().max() < 1e-4
    assert merged.mean == (0.5, 0.5, 0.5)


def test_nothing_appears_where_the_logits_differ(tmp_path, monkeypatch):
    source = write_own_encoder(tmp_path / "a.pth")
    saved(tmp_path, source, lora=LoraSettings(2))
    merge = Segmenter.merge

    def spoil(self):
        merge(self)
        self.decoder.classifier.bias.data += 0.1

    monkeypatch.setattr(Segmenter, "merge", spoil)
    with pytest.raises(WeightsError, match="merged model's logits differ by"):
        export_merged(tmp_path / "model", source, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_encoder_of_another_kind_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Patches(torch.nn.Module):\n    image_px = 32\n\n    def forward(self, images):\n"
        "        cells = torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)\n"
        "        return {'cls': cells.mean(1), 'patches': cells}\n\n\ndef make():\n    model = Patches()\n"
        "    model.unused = torch.nn.Parameter(torch.zeros(1))\n    return model\n"
    )
    name = f"{tmp_path / 'mine.py'}:make"
    segmenter = Segmenter(load_encoder(name), 3)
    save_segmenter(tmp_path / "model", segmenter, make_card(segmenter, CLASSES, PALETTE))
    with pytest.raises(ConfigError, match="blocks of an encoder of type Patches are not known"):
        export_merged(tmp_path / "model", name, tmp_path / "merged")
