"""Patches: features, colours, similarity, regions of slides, plain images and videos."""

import argparse
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import pca_images
import pca_regions
from dinoscope.errors import ConfigError, FeaturesError, SlideError
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.slides.reader import Slide
from dinoscope.visualize import patch_pages, plain_images
from dinoscope.visualize.color_basis import ColorBasis
from dinoscope.visualize.patch_pages import colored, draw_patch_colors, see, upsampled_scores
from dinoscope.visualize.patches import TorchPatchEncoder, agreeing_with, cosine_similarity, dense_features
from dinoscope.visualize.plain_images import PictureSettings, draw_images, draw_video
from dinoscope.visualize.regions import Region, distinct_places, most_tissue, read_region
from synthetic_slides import texture, write_lossless
from tiny_backbone import tiny_backbone


class MeanColours:
    """An encoder whose features are the means of each patch's colours, and some of their products."""

    def __init__(self, name="means", patch_px=16, window_px=None):
        self.name, self.patch_px, self.window_px, self.seen = name, patch_px, window_px, []

    def __call__(self, images):
        self.seen.append(images.shape[1:3])
        b, height, width = images.shape[:3]
        patches = images.reshape(b, height // self.patch_px, self.patch_px, width // self.patch_px, self.patch_px, 3)
        means = patches.mean(axis=(2, 4)).astype(np.float32)
        return np.concatenate([means, means[..., :1] * means[..., 1:] / 100], axis=-1)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def test_dense_features_are_the_models_patches_row_by_row(backbone):
    image = texture(48, 80, seed=1)
    features = dense_features(TorchPatchEncoder("b", backbone), image)
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - torch.tensor(backbone.mean).view(1, 3, 1, 1)) / (
        torch.tensor(backbone.std).view(1, 3, 1, 1)
    )
    with torch.inference_mode():
        expected = backbone.forward_features(pixels)["patches"][0]
    assert features.shape == (3, 5, 48)
    np.testing.assert_allclose(features.reshape(15, 48), expected, atol=1e-4)


def test_odd_sizes_and_fixed_windows_are_met():
    image = texture(100, 150)
    free, fixed = MeanColours(patch_px=14), MeanColours(patch_px=14, window_px=56)
    assert dense_features(free, image).shape[:2] == (7, 11) and free.seen == [(98, 154)]
    features = dense_features(fixed, image)
    assert features.shape[:2] == (8, 12) and set(fixed.seen) == {(56, 56)}
    whole = cv2.resize(image, (168, 112), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(features, MeanColours(patch_px=14)(whole[None])[0], atol=1e-4)


def test_features_that_are_not_finite_are_refused():
    broken = MeanColours("broken")
    broken_call = lambda images: np.full((1, 2, 2, 5), np.nan, np.float32)  # noqa: E731
    encoder = type(
        "Broken", (), {"name": "broken", "patch_px": 16, "window_px": None, "__call__": lambda s, i: broken_call(i)}
    )()
    with pytest.raises(FeaturesError, match=r"model 'broken' gives patch features that are not finite"):
        dense_features(encoder, texture(32, 32))
    assert dense_features(broken, texture(32, 32)).shape == (2, 2, 5)


def test_components_are_put_in_the_order_that_agrees():
    generator = np.random.default_rng(0)
    wanted = generator.normal(size=(200, 3)) * [3, 2, 1]
    own = wanted[:, [2, 0, 1]] * [1, -1, 1]
    info = {"explained_variance_ratio": [0.5, 0.3, 0.1, 0.05]}
    basis = ColorBasis(np.zeros(5), np.eye(5, dtype=np.float32), own.min(0), own.max(0), info)
    features = np.concatenate([own, np.zeros((200, 2))], axis=1)
    agreed = agreeing_with(basis, own, wanted)
    np.testing.assert_allclose(agreed.project(features)[:, :3], wanted, atol=1e-5)
    np.testing.assert_allclose(agreed.low, wanted.min(0), atol=1e-5)
    np.testing.assert_allclose(agreed.high, wanted.max(0), atol=1e-5)
    assert agreed.info["explained_variance_ratio"] == [0.3, 0.1, 0.5, 0.05]
    assert agreed.info["order"] == [2, 3, 1]


def test_pages_say_which_component_is_which_colour(tmp_path, monkeypatch):
    """After reordering it is not 1, 2 and 3 for each model, and no key may say so."""
    image, pages = halves(64, 96), []
    monkeypatch.setattr(patch_pages, "save_panels", lambda output, rows, **about: pages.append((rows, about)))
    first = see(MeanColours("first"), [image])
    order = [2, 0, 1]
    basis = replace(
        first.basis,
        components=first.basis.components[[*order, 3]],
        low=first.basis.low[order],
        high=first.basis.high[order],
    )
    other = see(MeanColours("second"), [image], reference=replace(first, basis=basis))
    draw_patch_colors(tmp_path / "page.png", image, [first, other], title="t", subtitle="s", upsampler=None)
    (rows, about), *_ = pages
    words = [panel.subtitle for panel in rows[0][1:]]
    assert "red, green, blue = components 1, 2, 3," in words[0] and "= components 3, 1, 2," in words[1]
    assert not about.get("key")
    tall = halves(96, 32)
    draw_patch_colors(tmp_path / "tall.png", tall, [see(MeanColours(), [tall])], title="t", subtitle="s")
    assert pages[-1][0][0][1].subtitle == "red, green, blue = components 1, 2, 3"  # whole where there is little room
    Image.fromarray(image).save(tmp_path / "a.png")
    monkeypatch.setattr(plain_images, "draw_patch_colors", lambda *given, **about: pages.append((given, about)))
    draw_images(tmp_path / "a.png", [MeanColours("one"), MeanColours("two")], tmp_path / "out")
    assert "order and signs of components as agrees best with one" in pages[-1][1]["subtitle"]


def test_cosine_similarity_is_that_of_the_formula():
    features = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    likeness = cosine_similarity(features, 1, 2)
    a = features.astype(np.float64)
    for row, column in np.ndindex(3, 4):
        expected = a[row, column] @ a[1, 2] / np.linalg.norm(a[row, column]) / np.linalg.norm(a[1, 2])
        assert likeness[row, column] == pytest.approx(expected, abs=1e-6)


def halves(height=64, width=96):
    image = texture(height, width)
    image[:, : width // 2] //= 3
    return image


def test_the_page_shows_patches_in_their_colours(tmp_path):
    image = halves(64, 96)
    seen = see(MeanColours(), [image])
    draw_patch_colors(tmp_path / "page.png", image, [seen], title="t", subtitle="s", upsampler=None)
    with Image.open(tmp_path / "page.png") as page:
        shown = np.asarray(page.convert("RGB"))[162 : 162 + 512, 24 + 788 : 24 + 788 + 768]
    colors = seen.basis.colors(seen.features[0].reshape(-1, 5)).reshape(4, 6, 3)
    np.testing.assert_array_equal(shown[64::128, 64::128], colors)


def test_one_colour_space_for_all_images_of_a_model():
    images = [halves(), 255 - halves()]
    both = see(MeanColours(), images)
    rows = np.concatenate([each.reshape(-1, 5) for each in both.features])
    np.testing.assert_allclose(both.basis.mean, rows.mean(axis=0), atol=1e-3)
    assert len(both.features) == 2 and both.scores(1).shape == (4, 6, 4)


@pytest.mark.parametrize(("image", "count"), [(halves(16, 16), "1 patch"), (np.full((32, 48, 3), 9, np.uint8), "6 p")])
def test_too_few_patches_or_flat_ones_are_refused_in_their_words(image, count):
    with pytest.raises(FeaturesError, match=rf"model 'means' \({count}.* take a larger region or image") as refused:
        see(MeanColours(), [image])
    assert "--pooling" not in str(refused.value) and "tile" not in str(refused.value)


@pytest.mark.parametrize(
    "region", [("a", "0", "256", "0.5"), ("0", "0", "256", "nan"), ("0", "0", "-8", "0.5"), ("0.5", "0", "8", "1")]
)
def test_a_region_that_is_none_is_refused_in_one_sentence(region):
    with pytest.raises(ConfigError, match=rf"--region {' '.join(region)} is no place: X and Y are whole"):
        pca_regions.chosen_region(argparse.Namespace(region=region, tiles=None))


def test_upsamplers_of_ones_own_get_all_features_and_are_checked():
    image = halves()
    seen = see(MeanColours(), [image])
    given = {}

    def doubled(features, pixels):
        given.update(features=tuple(features.shape), pixels=tuple(pixels.shape), top=float(pixels.max()))
        return torch.nn.functional.interpolate(features, scale_factor=2)

    scores = upsampled_scores(seen, 0, image, doubled)
    assert given["features"] == (1, 5, 4, 6) and given["pixels"] == (1, 3, 64, 96) and given["top"] <= 1
    np.testing.assert_allclose(scores, seen.scores(0).repeat(2, axis=0).repeat(2, axis=1), atol=1e-3)
    assert colored(scores, seen.basis).shape == (8, 12, 3)
    with pytest.raises(FeaturesError, match=r"the upsampler gives \(1, 4, 6\) for features \(1, 5, 4, 6\)"):
        upsampled_scores(seen, 0, image, lambda features, pixels: features[:, 0])


@pytest.fixture
def slide(tmp_path):
    with Slide(write_lossless(tmp_path / "A.tiff", texture(600, 800), mpp=0.5, downsamples=(1, 4)), "A") as opened:
        yield opened


def write_tissue(path, tissue, tile_px=64, mpp=0.5, size=(800, 600)):
    """A manifest of the tiles (row, column) -> share of tissue."""
    rows, columns = (np.array(axis) * tile_px for axis in zip(*tissue, strict=True)) if tissue else (np.zeros(0),) * 2
    shares = {"x": columns, "y": rows, "tissue_fraction": np.array(list(tissue.values()), np.float32)}
    rest = {"level": 0, "read_px": tile_px, "tile_px": tile_px, "mpp": mpp, "footprint_px": tile_px}
    about = {"slide_id": "A", "tile_set": "features", "tile_px": tile_px, "requested_mpp": mpp, "stride_px": tile_px}
    about |= {"width": size[0], "height": size[1], "mpp_x": 0.5, "mpp_y": 0.5}
    write_tiles(path, tile_table("A", shares | rest), about)
    return path


def test_the_region_with_most_tissue_is_found(tmp_path):
    tissue = {(row, column): 0.1 for row in range(9) for column in range(12)}
    tissue |= {(row, column): 1.0 for row in (4, 5, 6) for column in (7, 8, 9)}
    tiles = write_tissue(tmp_path / "A.parquet", tissue)
    assert most_tissue(tiles, 192, None, seed=0) == Region(7 * 64, 4 * 64, 192, 0.5)
    assert most_tissue(tiles, 192, None, seed=5) == Region(7 * 64, 4 * 64, 192, 0.5)
    whole = most_tissue(tiles, 4096, None, seed=0)
    assert whole.size_px == 592 and whole.y in range(9) and whole.x + 592 <= 800
    assert most_tissue(write_tissue(tmp_path / "none.parquet", {}), 192, None, seed=0) is None


def test_a_region_is_read_at_its_place_and_scale(slide):
    image, side = read_region(slide, Region(100, 200, 128, 0.5))
    assert side == 128
    np.testing.assert_array_equal(image, slide.read_region(100, 200, 0, 128, 128))
    coarse, side = read_region(slide, Region(96, 192, 64, 1.0))
    blocks = slide.read_region(96, 192, 0, 128, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert side == 128
    np.testing.assert_allclose(coarse, blocks, atol=1)


@pytest.mark.parametrize("region", [Region(700, 100, 128, 0.5), Region(-1, 0, 64, 0.5), Region(0, 0, 128, 3.0)])
def test_regions_beyond_the_slide_are_refused(slide, region):
    with pytest.raises(SlideError, match=r"slide 'A': the region .* reaches beyond the slide's 800 x 600"):
        read_region(slide, region)


def test_distinct_places_lie_in_the_three_kinds():
    image = np.full((96, 96, 3), 240, np.uint8)
    image[:, :32], image[:, 32:64] = (60, 20, 90), (220, 120, 160)
    for low, (x, _) in zip((0, 1 / 3, 2 / 3), distinct_places(image), strict=True):
        assert low < x < low + 1 / 3


def write_film(path, count=7, size=(96, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    image = texture(size[1], size[0] + 8 * count)
    for number in range(count):
        writer.write(np.ascontiguousarray(image[:, 8 * number : 8 * number + size[0]]))
    writer.release()
    return path


def read_film(path):
    video, frames = cv2.VideoCapture(str(path)), []
    while (frame := video.read())[0]:
        frames.append(frame[1][..., ::-1])
    rate = video.get(cv2.CAP_PROP_FPS)
    video.release()
    return frames, rate


def test_a_video_is_shown_frame_by_frame(tmp_path):
    film = write_film(tmp_path / "film.mp4")
    models = [MeanColours("one"), MeanColours("two", patch_px=8)]
    settings = PictureSettings(longest_px=96, upsampler=None)
    assert draw_video(film, models, tmp_path / "out.mp4", settings) == 7
    frames, rate = read_film(tmp_path / "out.mp4")
    original, _ = read_film(film)
    assert len(frames) == 7 and rate == pytest.approx(10)
    assert frames[0].shape == (100, 296, 3)
    for frame, source in zip(frames, original, strict=True):
        difference = frame[36:, :96].astype(int) - source
        assert np.abs(difference).mean() < 12  # what the codec loses
        assert frame[36:, 100:196].std() > 15
    assert draw_video(film, models, tmp_path / "few.mp4", settings, every=3, max_frames=2) == 2
    assert read_film(tmp_path / "few.mp4")[1] == pytest.approx(10 / 3, rel=0.01)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(ConfigError, match=r"film\.mp4 holds no frame that can be read"):
        draw_video(tmp_path / "film.mp4", [MeanColours()], tmp_path / "out.mp4")
    film = write_film(tmp_path / "real.mp4", count=2)
    with pytest.raises(ConfigError, match="cannot write an MP4 of codec zzzz"):
        draw_video(film, [MeanColours()], tmp_path / "out.mp4", PictureSettings(96, None, codec="zzzz"))
    assert not (tmp_path / "out.mp4").exists()


def test_images_of_a_folder_become_pictures_of_their_names(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    Image.fromarray(halves()).save(tmp_path / "in" / "a.png")
    Image.fromarray(halves(96, 64)).save(tmp_path / "in" / "deeper" / "b.jpg")
    encoder = MeanColours()
    pictures = draw_images(tmp_path / "in", [encoder], tmp_path / "out", PictureSettings(longest_px=96, upsampler=None))
    assert pictures == [tmp_path / "out" / "a.png", tmp_path / "out" / "deeper" / "b.png"]
    for picture, size in zip(pictures, ((64, 96), (96, 64)), strict=True):
        with Image.open(picture) as page:
            assert page.width >= 1000
        assert size in encoder.seen
    (tmp_path / "in" / "a.jpg").write_bytes((tmp_path / "in" / "deeper" / "b.jpg").read_bytes())
    with pytest.raises(ConfigError, match=r"several images that would become .*a\.png"):
        draw_images(tmp_path / "in", [encoder], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no image"):
        draw_images(tmp_path / "empty", [encoder], tmp_path / "out")


@pytest.mark.parametrize("where", ["in", "in/deeper", "link"])
def test_images_are_not_written_over(tmp_path, where):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    image = tmp_path / "in" / "a.png"
    Image.fromarray(halves()).save(image)
    before = image.read_bytes()
    with pytest.raises(ConfigError, match=r"the pictures would lie among the images of .*in; give a folder outside it"):
        draw_images(tmp_path / "in", [MeanColours()], tmp_path / where)
    assert image.read_bytes() == before and list((tmp_path / "in").iterdir()) == [image]


def test_one_image_is_not_written_over(tmp_path):
    """Whether it is named itself, or through a link among the images of another folder."""
    Image.fromarray(halves()).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "a.png")
    for source in (tmp_path / "a.png", tmp_path / "links"):
        with pytest.raises(
            ConfigError, match=r"a picture would be written over the image .*a\.png; give another folder"
        ):
            draw_images(source, [MeanColours()], tmp_path)
    assert (tmp_path / "a.png").read_bytes() == before


def test_the_scripts_draw_regions_and_images(tmp_path, slide, backbone, monkeypatch):
    """With a real backbone from a file; run in this process, because torch takes long to import."""
    weights = {}
    for name in ("one", "two"):
        weights[name] = tmp_path / f"{name}.pth"
        torch.save(backbone.state_dict(), weights[name])
    tiles = write_tissue(tmp_path / "A.parquet", {(2, 3): 1.0, (2, 4): 1.0})

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()

    common = ["--slide", slide.path, "--slide-id", "A", "--model", *(f"{n}={path}" for n, path in weights.items())]
    outputs = ["--output", tmp_path / "colors.png", "--similarity", tmp_path / "similarity.png"]
    run(pca_regions, *common, *outputs, "--tiles", tiles, "--size-px", 128)
    heights = {"colors": 104 + 58 + 768 + 20 + 30 + 768 + 84, "similarity": 104 + 58 + 2 * 30 + 3 * 480 + 40 + 84}
    for name, height in heights.items():
        with Image.open(tmp_path / f"{name}.png") as page:
            assert page.height == height
    with pytest.raises(ConfigError, match=r"point \(10, 110\) of slide 'A' is not in the region from \(100, 100\)"):
        run(pca_regions, *common, *outputs, "--region", 100, 100, 64, 0.5, "--point", 10, 110)
    (tmp_path / "mine.py").write_text("import torch\n\n\ndef flat():\n    return torch.nn.Flatten()\n")
    alone = ["--slide", slide.path, "--slide-id", "A", "--model", f"flat={tmp_path}/mine.py:flat"]
    with pytest.raises(FeaturesError, match="none of the models gives features of patches"):
        run(pca_regions, *alone, *outputs, "--tiles", tiles, "--size-px", 128)
    bare = write_tissue(tmp_path / "none.parquet", {})
    run(pca_regions, *common, *outputs, "--tiles", bare)
    with Image.open(tmp_path / "colors.png") as page:
        assert page.size == (512, 384)  # a card that says why
    common = ["--models", weights["one"], "--output", tmp_path / "out", "--size-px", 96]
    Image.fromarray(halves()).save(tmp_path / "a.png")
    run(pca_images, *common, "--input", tmp_path / "a.png")
    run(pca_images, *common, "--input", write_film(tmp_path / "film.mp4", count=2))
    assert (tmp_path / "out" / "a.png").is_file() and len(read_film(tmp_path / "out" / "film.mp4")[0]) == 2
    with pytest.raises(ConfigError, match=r"gone does not exist; give a folder of images"):
        run(pca_images, *common, "--input", tmp_path / "gone")
