"""Our features equal those of transformers' DINOv3ViTModel, whichever of both the weights come from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinoscope.models.foreign import HUGGING_FACE, to_foreign
from dinoscope.models.weights import load_backbone
from other_libraries import random_backbone, relative_error, require, save_transformers, tokens_of, transformers_model

require("transformers")
SIZES = [(224, 224), (96, 96), (160, 256)]


@pytest.fixture(scope="module", params=["vit_small", "vit_small_plus"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Theirs, and ours read from the folder that theirs was saved to."""
    theirs = transformers_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    save_transformers(theirs, folder)
    ours = load_backbone(folder)
    assert ours.settings.arch == request.param
    return theirs, ours


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_the_same(pair: tuple, size: tuple[int, int]) -> None:
    theirs, ours = pair
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found, expected = tokens_of(ours, images), tokens_of(theirs, images)
    for part in (slice(0, 1), slice(1, 5), slice(5, None)):  # CLS, storage, patches
        assert relative_error(found[:, part], expected[:, part]) < 1e-5


def test_ours_written_with_their_names_loads_there(pair: tuple, tmp_path: Path) -> None:
    theirs, ours = pair
    weights = random_backbone(ours.settings, seed=5)
    theirs.config.save_pretrained(tmp_path)
    written = {name: tensor.contiguous() for name, tensor in to_foreign(weights.state_dict(), HUGGING_FACE).items()}
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    model = require("transformers").DINOv3ViTModel
    loaded, report = model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    assert relative_error(tokens_of(loaded.eval(), images), tokens_of(weights, images)) < 1e-5


@pytest.mark.parametrize("changes", [
    {"key_bias": True},
    {"query_bias": False, "value_bias": False},
    {"num_register_tokens": 0, "proj_bias": False, "mlp_bias": False},
    {"layer_norm_eps": 1e-6, "rope_theta": 30.0},
    {"use_gated_mlp": True, "hidden_act": "silu"},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_options_of_their_config(changes: dict, tmp_path: Path) -> None:
    theirs = transformers_model("vit_nano", **changes)
    save_transformers(theirs, tmp_path)
    ours = load_backbone(tmp_path)
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(3))
    assert relative_error(tokens_of(ours, images), tokens_of(theirs, images)) < 1e-5
