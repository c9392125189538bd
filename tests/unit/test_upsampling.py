import numpy as np
import pytest

from dinoscope.errors import ConfigError
from dinoscope.visualize import upsampling
from dinoscope.visualize.upsampling import joint_bilateral, load_upsampler, nearest_neighbour


def by_hand(values, coarse, fine, spread):
    """One step of Kopf et al.'s equation, pixel by pixel in float64."""
    height, width = fine.shape[:2]
    h, w = values.shape[:2]
    out = np.zeros((height, width, values.shape[2]))
    for y in range(height):
        for x in range(width):
            row, column = (y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5
            total = weights = 0.0
            for i in range(int(np.floor(row + 0.5)) - 1, int(np.floor(row + 0.5)) + 2):
                for j in range(int(np.floor(column + 0.5)) - 1, int(np.floor(column + 0.5)) + 2):
                    p, q = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
                    near = ((i - row) ** 2 + (j - column) ** 2) / (2 * upsampling.NEAR**2)
                    alike = np.square(fine[y, x].astype(float) - coarse[p, q]).sum() / (2 * spread**2)
                    weight = np.exp(-near - min(alike, upsampling.FAINTEST))
                    total, weights = total + weight * values[p, q], weights + weight
            out[y, x] = total / weights
    return out


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_a_step_is_the_published_equation(generator):
    values = generator.normal(size=(4, 5, 3)).astype(np.float32)
    coarse, fine = (generator.normal(size=(*size, 3)).astype(np.float32) * 30 for size in ((4, 5), (8, 10)))
    rows, columns = (upsampling._neighbours(*sides)[0][upsampling.RADIUS] for sides in ((4, 8), (5, 10)))
    spread = upsampling._range(coarse, fine, rows, columns)
    np.testing.assert_allclose(
        upsampling._step(values, coarse, fine), by_hand(values, coarse, fine, spread), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("patches", "pixels"), [((8, 8), (128, 128)), ((5, 7), (70, 98)), ((3, 4), (50, 61)), ((6, 6), (6, 6))]
)
def test_any_size_keeps_constants_and_ranges(generator, patches, pixels):
    image = generator.integers(0, 256, (*pixels, 3)).astype(np.uint8)
    values = generator.normal(size=(*patches, 2)).astype(np.float32)
    up = joint_bilateral(values, image)
    assert up.shape == (*pixels, 2) and np.isfinite(up).all()
    assert up.min() >= values.min() - 1e-5 and up.max() <= values.max() + 1e-5
    np.testing.assert_allclose(joint_bilateral(np.full((*patches, 1), 3.0, np.float32), image), 3, rtol=1e-5)


def test_it_commutes_with_the_projection(generator):
    """So that three components may be upsampled in place of all features."""
    image = generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    features = generator.normal(size=(4, 4, 20)).astype(np.float32)
    matrix, shift = generator.normal(size=(20, 3)).astype(np.float32), generator.normal(size=3).astype(np.float32)
    np.testing.assert_allclose(
        joint_bilateral(features @ matrix + shift, image), joint_bilateral(features, image) @ matrix + shift, atol=1e-3
    )


def test_an_edge_inside_a_patch_is_followed():
    """A dark disc of 1.5 patches: upsampled, the pixels of disc and ground take the values of pure patches."""
    y, x = np.mgrid[0:128, 0:128]
    disc = (y - 66) ** 2 + (x - 60) ** 2 < 44**2
    image = np.where(disc[..., None], (90, 40, 110), (235, 225, 240)).astype(np.uint8)
    share = disc.reshape(8, 16, 8, 16).mean(axis=(1, 3)).astype(np.float32)
    up = joint_bilateral(share[..., None], image)[..., 0]
    plain = nearest_neighbour(share[..., None], 128, 128)[..., 0]
    assert ((up > 0.5) == disc).mean() > 0.995 > 0.97 > ((plain > 0.5) == disc).mean()
    assert np.abs(up - disc).mean() < 0.35 * np.abs(plain - disc).mean()


def test_nearest_neighbour_repeats():
    values = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    np.testing.assert_array_equal(nearest_neighbour(values, 4, 9), values.repeat(2, axis=0).repeat(3, axis=1))


def test_own_upsamplers_are_loaded_and_mistakes_named(tmp_path, monkeypatch):
    (tmp_path / "mine_up.py").write_text("def twice(features, image):\n    return features\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_upsampler("jbu") is None and load_upsampler("none") is None
    assert load_upsampler("mine_up:twice")(1, 2) == 1
    for name, message in (
        ("featup", "must be jbu, none or module:callable"),
        ("mine_up:thrice", "cannot be loaded: AttributeError"),
        ("mine_up:number", "is no callable"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_upsampler(name)
