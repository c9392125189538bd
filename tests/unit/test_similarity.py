"""Features of one image, and pictures of what its patches have in common."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dinoscope.errors import FeaturesError
from dinoscope.features.patches import PatchFeatures, patch_features
from dinoscope.models.registry import ARCHS, ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.visualize.similarity import draw_patches, patch_colors, similarity_to, spread_places


@pytest.fixture(scope="module")
def model() -> DinoVisionTransformer:
    arch = ARCHS["vit_nano"]
    hidden = int(arch.embed_dim * arch.ffn_ratio)
    backbone = DinoVisionTransformer(ViTSettings(arch.embed_dim, 2, arch.num_heads, hidden, num_storage_tokens=3))
    torch.manual_seed(0)
    backbone.init_weights()
    backbone.mean, backbone.std = (0.6, 0.5, 0.4), (0.1, 0.2, 0.3)
    return backbone.eval()


def patches(rows: int = 5, columns: int = 7, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns, width)).astype(np.float32)


def test_features_are_those_of_the_normalised_image(model: DinoVisionTransformer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)
    features = patch_features(model, image)
    seen = image[:48, :64].astype(np.float64) / 255
    normalised = (seen - np.array(model.mean)) / np.array(model.std)
    with torch.no_grad():
        out = model.forward_features(torch.tensor(normalised.transpose(2, 0, 1)[None]).float())
    np.testing.assert_array_equal(features.image, image[:48, :64])
    assert features.patches.shape == (3, 4, 64) and features.patch_px == 16
    for row in range(3):
        for column in range(4):
            wanted = out["patches"][0, row * 4 + column]
            np.testing.assert_allclose(features.patches[row, column], wanted, atol=1e-5)
    np.testing.assert_allclose(features.cls, out["cls"][0], atol=1e-5)
    np.testing.assert_allclose(features.storage, out["storage"][0], atol=1e-5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((15, 64, 3), np.uint8), "64 × 15 px, smaller than one patch of 16 px"),
        (np.zeros((64, 64), np.uint8), r"shape \(64, 64\) and type uint8"),
        (np.zeros((64, 64, 4), np.uint8), r"shape \(64, 64, 4\)"),
        (np.zeros((64, 64, 3)), "type float64"),
    ],
)
def test_what_is_no_image_is_refused(model: DinoVisionTransformer, image: np.ndarray, message: str) -> None:
    with pytest.raises(FeaturesError, match=message):
        patch_features(model, image)


def test_similarity_is_the_cosine_of_the_textbook() -> None:
    features = patches() * 100
    found = similarity_to(features, (4, 2))
    one = [float(value) for value in features[4, 2]]
    for row in range(5):
        for column in range(7):
            other = [float(value) for value in features[row, column]]
            product = sum(a * b for a, b in zip(one, other, strict=True))
            assert found[row, column] == pytest.approx(product / (math.hypot(*one) * math.hypot(*other)), abs=1e-6)
    assert found[4, 2] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(similarity_to(features * 7, (4, 2)), found, atol=1e-6)
    features[0, 0] = 0
    assert similarity_to(features, (4, 2))[0, 0] == 0


@pytest.mark.parametrize("place", [(5, 0), (0, 7), (-1, 0), (0, -1)])
def test_a_place_outside_is_named(place: tuple[int, int]) -> None:
    with pytest.raises(FeaturesError, match=rf"row {place[0]}, column {place[1]}: rows are 0 to 4, columns 0 to 6"):
        similarity_to(patches(), place)


def test_places_show_one_patch_of_each_kind() -> None:
    """Four kinds of patches in unequal numbers: the commonest comes first, then one of each other."""
    kinds = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [2, 0, 0, 3]])
    features = np.eye(8, dtype=np.float32)[kinds] * 5 + 0.01 * patches(3, 4, 8)
    places = spread_places(features, 4)
    assert kinds[places[0]] == 0
    assert sorted(int(kinds[place]) for place in places) == [0, 1, 2, 3]
    assert spread_places(features, 4) == places
    assert spread_places(np.ones((1, 2, 3), np.float32), 5) == [(0, 0), (0, 1)]


def test_colours_are_components_as_sklearn_has_them() -> None:
    features = patches(6, 9, 20) * np.linspace(3, 0.1, 20, dtype=np.float32) + 50
    colors, explained = patch_colors(features)
    flat = features.reshape(-1, 20).astype(np.float64)
    pca = PCA(3, svd_solver="full").fit(flat)
    assert explained == pytest.approx(pca.explained_variance_ratio_.sum())
    assert colors.shape == (6, 9, 3) and colors.min() == 0 and colors.max() == 1
    scores = pca.transform(flat)
    for component in range(3):
        inside = (colors.reshape(-1, 3)[:, component] > 0) & (colors.reshape(-1, 3)[:, component] < 1)
        correlation = np.corrcoef(colors.reshape(-1, 3)[inside, component], scores[inside, component])[0, 1]
        assert abs(correlation) == pytest.approx(1)
    np.testing.assert_allclose(patch_colors(features * 2)[0], colors, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 8), (1, 1, 8), (1, 2, 8)])
def test_patches_that_do_not_differ_are_grey(shape: tuple[int, ...]) -> None:
    colors, explained = patch_colors(np.full(shape, 3.7, np.float32))
    assert explained == 0 and (colors == 0.5).all()
    few, explained = patch_colors(np.arange(16, dtype=np.float32).reshape(1, 2, 8) ** 2)
    assert explained == pytest.approx(1) and np.isfinite(few).all()


def test_the_picture_shows_image_components_and_similarities() -> None:
    image = np.random.default_rng(0).integers(0, 256, (80, 112, 3), np.uint8)
    features = PatchFeatures(image, np.zeros(12), np.zeros((0, 12)), patches(), 16)
    figure = draw_patches(features, [(4, 2), (0, 6)])
    figure.canvas.draw()
    shown = [axes.images[0].get_array() for axes in figure.axes[:4]]
    np.testing.assert_array_equal(shown[0], image)
    np.testing.assert_allclose(shown[1], patch_colors(features.patches)[0])
    np.testing.assert_allclose(shown[2], similarity_to(features.patches, (4, 2)))
    np.testing.assert_allclose(shown[3], similarity_to(features.patches, (0, 6)))
    assert figure.axes[2].images[0].get_clim() == figure.axes[3].images[0].get_clim()
    framed = {tuple(patch.get_bbox().bounds) for patch in figure.axes[0].patches}
    assert framed == {(31.5, 63.5, 16, 16), (95.5, -0.5, 16, 16)}  # x, y of column 2, row 4 and column 6, row 0
    assert len(draw_patches(features).axes) == 6
    with pytest.raises(FeaturesError, match="no patch"):
        draw_patches(features, [(9, 9)])
