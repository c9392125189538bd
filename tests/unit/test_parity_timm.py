"""Our features equal those of timm's DINOv3 models, whichever of both the weights come from."""

from pathlib import Path

import pytest
import torch

from dinoscope.models.foreign import TIMM, to_foreign
from dinoscope.models.weights import load_backbone
from other_libraries import random_backbone, relative_error, require, timm_model, tokens_of

require("timm")
SIZES = [(224, 224), (96, 96), (160, 256)]


@pytest.fixture(scope="module", params=["vit_small", "vit_small_plus"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Theirs, and ours read from their state dict."""
    theirs = timm_model(request.param)
    path = tmp_path_factory.mktemp(request.param) / "any_name.pth"
    torch.save(theirs.state_dict(), path)
    ours = load_backbone(path)
    assert ours.settings.arch == request.param
    return theirs, ours


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_the_same(pair: tuple, size: tuple[int, int]) -> None:
    theirs, ours = pair
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found, expected = tokens_of(ours, images), tokens_of(theirs, images)
    for part in (slice(0, 1), slice(1, 5), slice(5, None)):  # CLS, storage, patches
        assert relative_error(found[:, part], expected[:, part]) < 1e-5


@pytest.mark.parametrize("arch", ["vit_small", "vit_small_plus"])
def test_models_with_biases_of_queries_and_values(arch: str, tmp_path: Path) -> None:
    theirs = timm_model(arch, suffix="_qkvb", depth=2)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = load_backbone(tmp_path / "w.pth")
    assert ours.settings.qkv_bias and ours.settings.mask_k_bias
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    assert relative_error(tokens_of(ours, images), tokens_of(theirs, images)) < 1e-5
    weights = random_backbone(ours.settings, seed=5)
    theirs.load_state_dict(to_foreign(weights.state_dict(), TIMM), strict=True)
    assert relative_error(tokens_of(theirs, images), tokens_of(weights, images)) < 1e-5
