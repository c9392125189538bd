import dataclasses
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from dinoscope.config import AugmentationConfig
from dinoscope.data import color, crops, views
from dinoscope.data.crops import (
    AUGMENTATIONS,
    Augmentation,
    Crops,
    CropSizes,
    contact_sheet,
    for_stain,
    make_crops,
    sample_rng,
)
from dinoscope.data.resize import resize
from dinoscope.data.views import draw_views

HISTOLOGY = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiles" / "singles" / "histo.jpg"
PLAIN = Augmentation(horizontal_flips=False, color_jitter_p=0, grayscale_p=0, blur_p=(0, 0, 0), solarize_p=0)
SMALL = CropSizes(global_px=16, local_px=8, num_local=2)


@pytest.fixture(scope="module")
def texture():
    """Smoothed noise: has structure at every place and no symmetry."""
    noise = np.random.default_rng(0).normal(size=(240, 256, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def coordinates():
    """Red counts columns, green counts rows: each pixel of a crop tells where it came from."""
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0] = np.arange(256)
    ramp[..., 1] = np.arange(256)[:, None]
    return ramp


def box_of(crop):
    """Left, top, width and height in the coordinates image of an upright crop, to about half a pixel."""
    size = len(crop)
    inner = crop[2:-2, 2:-2].astype(float)
    middle = np.arange(2, size - 2) + 0.5
    dx, left = np.polyfit(middle, inner[..., 0].mean(0) + 0.5, 1)
    dy, top = np.polyfit(middle, inner[..., 1].mean(1) + 0.5, 1)
    return left, top, dx * size, dy * size


# ---- geometry


def test_shapes_and_types(texture):
    sizes = CropSizes(global_px=48, local_px=20, num_local=5)
    made = make_crops(texture, sizes, AUGMENTATIONS["pathology"], sample_rng(0, 0))
    assert made.global_crops.shape == (2, 48, 48, 3)
    assert made.local_crops.shape == (5, 20, 20, 3)
    assert made.gram_crops is None
    assert made.global_crops.dtype == made.local_crops.dtype == np.uint8
    made = make_crops(texture, dataclasses.replace(sizes, num_local=0, gram_px=64), PLAIN, sample_rng(0, 0))
    assert made.local_crops.shape == (0, 20, 20, 3)
    assert made.gram_crops.shape == (2, 64, 64, 3)


def test_crops_show_areas_and_aspects_as_asked(coordinates):
    sizes = CropSizes(global_px=32, local_px=32, num_local=4, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32))
    boxes = {"global": [], "local": []}
    for index in range(300):
        made = make_crops(coordinates, sizes, PLAIN, sample_rng(1, index))
        boxes["global"] += [box_of(crop) for crop in made.global_crops]
        boxes["local"] += [box_of(crop) for crop in made.local_crops]
    left, top, width, height = np.array(boxes["local"]).T
    # local crops always fit, so their distributions are exactly the ones asked for
    area, aspect = width * height / 256**2, np.log(width / height) / np.log(4 / 3)
    assert stats.kstest(area, stats.uniform(0.05, 0.27).cdf).pvalue > 1e-3
    assert stats.kstest(aspect, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(left / (256 - width), stats.uniform(-0.01, 1.02).cdf).pvalue > 1e-3
    assert stats.kstest(top / (256 - height), stats.uniform(-0.01, 1.02).cdf).pvalue > 1e-3
    left, top, width, height = np.array(boxes["global"]).T
    area, aspect = width * height / 256**2, width / height
    assert 0.31 < area.min() < 0.35
    assert 0.9 < area.max() < 1.01
    assert 0.74 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.35


def test_crop_boxes_follow_the_published_procedure():
    """Same distribution as random-resized crop written out with rejection, where boxes often do not fit."""
    rng = np.random.default_rng(2)
    draws = rng.random((4000, 45)).tolist()
    ours = np.array([views._box((200, 300), (0.5, 1.0), (3 / 4, 4 / 3), row) for row in draws])
    expected = []
    while len(expected) < 4000:
        area, aspect = 60000 * rng.uniform(0.5, 1.0), (4 / 3) ** rng.uniform(-1, 1)
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= 300 and height <= 200:
            expected.append((height, width))
    top, left, height, width = ours.T
    assert (top + height <= 200).all()
    assert (left + width <= 300).all()
    expected = np.array(expected)
    # ours falls back to the whole width of allowed aspect after 10 failures: at 200 × 300, in a few per cent
    fallback = (height == 200) & (width == 267)
    assert fallback.mean() < 0.1
    assert stats.ks_2samp(height[~fallback], expected[:, 0]).pvalue > 1e-3
    assert stats.ks_2samp(width[~fallback], expected[:, 1]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("image_hw", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((50, 50), (0, 0, 50, 50))]
)
def test_fallback_is_the_largest_central_crop(image_hw, box):
    assert views._box(image_hw, (2.0, 2.0), (3 / 4, 4 / 3), np.random.default_rng(0).random(45).tolist()) == box


def test_whole_window():
    whole = dataclasses.replace(PLAIN, aspect_ratio=(1.0, 1.0))
    sizes = CropSizes(global_px=32, local_px=32, num_local=1, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = make_crops(image, sizes, whole, sample_rng(0, 0))
    for crop in (*made.global_crops, *made.local_crops):
        assert np.array_equal(crop, image)


def orientation(crop, image):
    """Which of the 8 flips and rotations of the image the crop is."""
    found = [
        (turns, mirrored)
        for turns, mirrored in itertools.product(range(4), (False, True))
        if np.array_equal(np.rot90(image[:, ::-1] if mirrored else image, turns), crop)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {(0, False)}),
        ({"horizontal_flips": True}, {(0, False), (0, True)}),
        ({"vertical_flips": True}, {(0, False), (2, True)}),
        ({"rotations_90": True}, {(turns, False) for turns in range(4)}),
        (
            {"horizontal_flips": True, "vertical_flips": True, "rotations_90": True},
            set(itertools.product(range(4), (False, True))),
        ),
    ],
)
def test_orientations_are_equally_likely(switches, expected):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    augmentation = dataclasses.replace(PLAIN, aspect_ratio=(1.0, 1.0), **switches)
    sizes = CropSizes(global_px=8, local_px=8, num_local=6, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0))
    seen = []
    for index in range(150):
        made = make_crops(image, sizes, augmentation, sample_rng(3, index))
        seen += [orientation(crop, image) for crop in (*made.global_crops, *made.local_crops)]
    counts = [seen.count(way) for way in expected]
    assert sum(counts) == len(seen)
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-3


# ---- resizing


@pytest.mark.parametrize(("height", "width", "size"), [(200, 210, 96), (240, 256, 96), (150, 130, 96), (60, 64, 96)])
def test_resize_is_close_to_pillows_antialiased_bicubic(height, width, size):
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(height, width, 3)), (0, 0), 1)
    part = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
    ours = resize(part, size).astype(int)
    pillow = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    error = np.abs(ours - pillow).mean()
    assert error < 0.05 * pillow.std()
    # no shift: each pixel is far nearer to Pillow's than to Pillow's neighbour
    assert error < 0.15 * np.abs(ours[:, 1:] - pillow[:, :-1]).mean()


@pytest.mark.parametrize("size", [64, 96, 128, 192, 224])
def test_resize_of_histology(size):
    if not HISTOLOGY.exists():
        pytest.skip("no ../shared/data")
    image = np.asarray(Image.open(HISTOLOGY).convert("RGB"))[:300, 50:350]
    pillow = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(image, size) - pillow).mean() < 0.8
    aliased = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    assert np.abs(resize(image, size) - pillow).mean() < 0.7 * np.abs(aliased - pillow).mean()


@pytest.mark.parametrize(("height", "width", "size"), [(200, 210, 96), (250, 256, 96), (150, 130, 96), (60, 64, 96)])
def test_resize_equals_pillow_but_for_rounding(texture, height, width, size):
    part = texture[:height, :width]
    pillow = Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)
    error = np.abs(resize(part, size).astype(int) - np.asarray(pillow))
    assert error.mean() < 0.25
    assert error.max() <= 2


def test_resize_takes_parts_and_what_cannot_be_written(texture):
    part = texture[3:150, 7:140]
    expected = resize(part.copy(), 64)
    part.flags.writeable = False
    assert np.array_equal(resize(part, 64), expected)
    assert expected.strides == (192, 3, 1)


def test_resize_does_not_alias():
    board = np.indices((200, 200)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    shrunk = resize(board, 80)[4:-4, 4:-4]
    assert abs(shrunk.mean() - 127.5) < 1
    assert shrunk.std() < 6
    assert cv2.resize(board, (80, 80), interpolation=cv2.INTER_CUBIC).std() > 30


def test_resize_keeps_a_ramp_and_leaves_its_input_alone(coordinates):
    before = coordinates.copy()
    ours = resize(coordinates, 64)
    assert np.array_equal(coordinates, before)
    np.testing.assert_allclose(ours[8, 4:-4, 0], np.arange(4, 60) * 4 + 1.5, atol=0.51)
    assert resize(coordinates, 256) is coordinates


# ---- distortions


JITTERS = ("brightness", "contrast", "saturation", "hue")


def draw(augmentation, count, blur_p=0.0, solarize_p=0.0, seed=4):
    """Views of `count` samples, one each."""
    kinds = [((0.1, 1.0), blur_p, solarize_p)]
    return [
        view for index in range(count) for view in draw_views((64, 64), kinds, augmentation, sample_rng(seed, index))
    ]


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_jitter_orders_and_ranges(preset):
    augmentation = AUGMENTATIONS[preset]
    jitters = [view.jitter for view in draw(augmentation, 2000) if view.jitter]
    assert abs(len(jitters) / 2000 - 0.8) < 0.03
    orders = [tuple(name for name, _ in sample) for sample in jitters]
    counts = [orders.count(order) for order in itertools.permutations(JITTERS)]
    assert sum(counts) == len(jitters)
    assert stats.chisquare(counts).pvalue > 1e-3
    for name, neutral, spread in zip(
        JITTERS,
        (1, 1, 1, 0),
        (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue),
        strict=True,
    ):
        values = [value for sample in jitters for called, value in sample if called == name]
        assert stats.kstest(values, stats.uniform(neutral - spread, 2 * spread).cdf).pvalue > 1e-3


def test_factors_are_never_negative():
    augmentation = dataclasses.replace(PLAIN, color_jitter_p=1, brightness=3.0, contrast=0, saturation=0, hue=0)
    jitters = [view.jitter for view in draw(augmentation, 300)]
    assert {name for sample in jitters for name, _ in sample} == {"brightness"}
    factors = [sample[0][1] for sample in jitters]
    assert 0 <= min(factors) < 0.1
    assert 3.9 < max(factors) <= 4


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("dinov3", {"blur": (0.0, 0.9, 0.5), "solarize": (0.0, 0.2, 0.0), "gray": 0.2, "stains": 0.0}),
        ("pathology", {"blur": (0.5, 0.1, 0.2), "solarize": (0.0, 0.0, 0.0), "gray": 0.1, "stains": 0.5}),
    ],
)
def test_rates_of_each_kind_of_crop(monkeypatch, texture, preset, expected):
    """What `make_crops` draws for the first and second global and the local crop; 1500 samples: 3 errors are 4 %."""
    drawn = []
    monkeypatch.setattr(crops, "draw_views", lambda *args: drawn.append(draw_views(*args)) or drawn[-1])
    sizes = CropSizes(global_px=12, local_px=12, num_local=1)
    for index in range(1500):
        make_crops(texture[:24, :24], sizes, AUGMENTATIONS[preset], sample_rng(5, index))

    def rates(done):
        return np.mean([[done(view) for view in sample] for sample in drawn], axis=0)

    blurred = rates(lambda view: view.blur_sigma is not None)
    np.testing.assert_allclose(blurred, expected["blur"], atol=0.04)
    np.testing.assert_allclose(rates(lambda view: view.solarized), expected["solarize"], atol=0.04)
    np.testing.assert_allclose(rates(lambda view: view.gray), expected["gray"], atol=0.04)
    np.testing.assert_allclose(rates(lambda view: view.stains is not None), expected["stains"], atol=0.04)
    for zero in np.flatnonzero(np.array(expected["blur"]) == 0):
        assert blurred[zero] == 0


def test_blur_and_stain_ranges():
    drawn = draw(dataclasses.replace(PLAIN, hed_p=1), 800, blur_p=1.0)
    assert stats.kstest([view.blur_sigma for view in drawn], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    stains = np.array([view.stains for view in drawn])
    for stain in range(3):
        assert stats.kstest(stains[:, 0, stain], stats.uniform(0.95, 0.1).cdf).pvalue > 1e-3
        assert stats.kstest(stains[:, 1, stain], stats.uniform(-0.05, 0.1).cdf).pvalue > 1e-3


def test_changing_one_distortion_changes_no_other_draw():
    usual = draw(AUGMENTATIONS["pathology"], 50, blur_p=0.5)
    changed = dataclasses.replace(AUGMENTATIONS["pathology"], hed_p=0, color_jitter_p=0, grayscale_p=0.9)
    for one, other in zip(usual, draw(changed, 50, blur_p=0.5, solarize_p=0.5), strict=True):
        assert one[:7] == other[:7]
        assert one.blur_sigma == other.blur_sigma


@pytest.mark.parametrize("index", range(12))
def test_pixels_are_what_was_drawn(texture, index):
    """The distortions one after the other, in their order, by Pillow and sums written out."""
    everything = dataclasses.replace(
        PLAIN,
        aspect_ratio=(1.0, 1.0),
        hed_p=0.5,
        color_jitter_p=0.8,
        grayscale_p=0.3,
        blur_p=(0.5, 0.5, 0.5),
        solarize_p=0.5,
    )
    window = texture[:64, :64]
    sizes = CropSizes(global_px=64, local_px=64, num_local=2, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0))
    kinds = [((1.0, 1.0), 0.5, 0.0), ((1.0, 1.0), 0.5, 0.5), *[((1.0, 1.0), 0.5, 0.0)] * 2]
    drawn = draw_views((64, 64), kinds, everything, sample_rng(11, index))
    made = make_crops(window, sizes, everything, sample_rng(11, index))
    for crop, view in zip([*made.global_crops, *made.local_crops], drawn, strict=True):
        error = np.abs(crop.astype(int) - by_pillow(window, view, everything))
        if view.solarized:  # a grey level to this or that side of the threshold is a jump
            error = np.minimum(error, np.abs(255 - crop.astype(int) - by_pillow(window, view, everything)))
        # Pillow cuts off what is behind the point at each of up to five steps
        assert error.max() <= 8
        assert error.mean() < 2


def by_pillow(image, view, augmentation):
    if view.stains:
        image = color.shift_stains(image, *view.stains)  # compared with a naive formula in test_color
    for name, amount in view.jitter:
        if name == "hue":
            image = color.jitter([image], [[("hue", amount)]])[0]  # compared with colorsys in test_color
        else:
            enhancer = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast}
            enhance = enhancer.get(name, ImageEnhance.Color)
            image = np.asarray(enhance(Image.fromarray(image)).enhance(amount))
    if view.gray:
        image = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    if view.blur_sigma is not None:
        offsets = np.arange(-4, 5)
        kernel = np.exp(-(offsets**2) / (2 * view.blur_sigma**2))
        kernel /= kernel.sum()
        for axis in (0, 1):
            padded = np.pad(image.astype(float), [(4, 4) if a == axis else (0, 0) for a in range(3)], "reflect")
            image = sum(k * np.take(padded, np.arange(64) + shift, axis) for shift, k in enumerate(kernel))
        image = np.rint(image).astype(np.uint8)
    if view.solarized:
        image = np.asarray(ImageOps.solarize(Image.fromarray(image), augmentation.solarize_threshold))
    return image


def test_stain_jitter_of_nothing_changes_nothing(texture):
    sizes = dataclasses.replace(SMALL, num_local=1)
    flips_only = make_crops(texture, sizes, PLAIN, sample_rng(0, 3))
    with_stains = make_crops(texture, sizes, dataclasses.replace(PLAIN, hed_p=1, hed_sigma=0), sample_rng(0, 3))
    assert np.array_equal(flips_only.global_crops[0], with_stains.global_crops[0])


# ---- gram crops


@pytest.mark.parametrize("gram_px", [64, 48, 32])
def test_gram_crops_show_the_same_place(texture, gram_px):
    sizes = CropSizes(global_px=48, local_px=16, num_local=1, gram_px=gram_px)
    augmentation = dataclasses.replace(PLAIN, horizontal_flips=True, vertical_flips=True, rotations_90=True)
    for index in range(5):
        made = make_crops(texture, sizes, augmentation, sample_rng(6, index))
        without = make_crops(texture, dataclasses.replace(sizes, gram_px=None), augmentation, sample_rng(6, index))
        for gram_crop, global_crop, alone in zip(made.gram_crops, made.global_crops, without.global_crops, strict=True):
            assert np.abs(resize(gram_crop, 32).astype(int) - resize(global_crop, 32)).mean() < 4
            # gram crops do not change what is drawn: the same view as without them, but for one more resampling
            assert np.abs(global_crop.astype(int) - alone).mean() < 6
            assert np.abs(global_crop.astype(int) - alone[::-1, ::-1]).mean() > 20


def test_gram_crops_with_and_without_distortions(texture):
    augmentation = dataclasses.replace(PLAIN, solarize_p=1.0, grayscale_p=1.0)
    sizes = CropSizes(global_px=32, local_px=16, num_local=1, gram_px=64)
    distorted = make_crops(texture, sizes, augmentation, sample_rng(7, 0))
    clean = make_crops(texture, dataclasses.replace(sizes, gram_no_distortions=True), augmentation, sample_rng(7, 0))
    plain = make_crops(texture, sizes, PLAIN, sample_rng(7, 0))
    assert np.array_equal(distorted.global_crops, clean.global_crops)
    assert np.array_equal(clean.gram_crops[0], plain.gram_crops[0])
    assert np.array_equal(distorted.gram_crops[0], gray(plain.gram_crops[0]))
    assert np.array_equal(distorted.gram_crops[1], color.solarize(gray(clean.gram_crops[1]), 128))


def gray(image):
    return np.repeat(color.luma(image)[..., None], 3, axis=-1)


# ---- presets


def test_every_key_of_the_config_is_a_number_of_the_recipe():
    known = {field.name for field in dataclasses.fields(Augmentation)}
    assert {field.name for field in dataclasses.fields(AugmentationConfig)} - {"recipe"} <= known


def test_presets_are_those_of_the_literature():
    dinov3, pathology = AUGMENTATIONS["dinov3"], AUGMENTATIONS["pathology"]
    jitter = ("color_jitter_p", "brightness", "contrast", "saturation", "hue", "grayscale_p")
    assert [getattr(dinov3, name) for name in jitter] == [0.8, 0.4, 0.4, 0.2, 0.1, 0.2]
    assert [getattr(pathology, name) for name in jitter] == [0.8, 0.2, 0.2, 0.1, 0.05, 0.1]
    assert (dinov3.blur_p, dinov3.solarize_p, dinov3.hed_p) == ((0, 0.9, 0.5), 0.2, 0)
    assert (pathology.solarize_p, pathology.hed_p, pathology.hed_sigma) == (0, 0.5, 0.05)
    assert (dinov3.horizontal_flips, dinov3.vertical_flips, dinov3.rotations_90) == (True, False, False)
    assert (pathology.horizontal_flips, pathology.vertical_flips, pathology.rotations_90) == (True, True, True)
    assert pathology.blur_p == (0.5, 0.1, 0.2)
    assert (dinov3.by_stain, pathology.by_stain) == (False, True)


# ---- stains


def changes(before, after):
    return {
        field.name: getattr(after, field.name)
        for field in dataclasses.fields(Augmentation)
        if getattr(before, field.name) != getattr(after, field.name)
    }


@pytest.mark.parametrize("stain", ["IHC", "IHC:Ki-67", "IF", "IF:DAPI", "ihc:CD3"])
@pytest.mark.parametrize("recipe", AUGMENTATIONS)
def test_colour_that_is_the_label_keeps_its_hue(recipe, stain):
    augmentation = dataclasses.replace(AUGMENTATIONS[recipe], by_stain=True, hed_p=0.5)
    made = for_stain(augmentation, stain)
    assert changes(augmentation, made) == {"hed_p": 0, "hue": 0, "grayscale_p": 0}


@pytest.mark.parametrize("stain", ["Pap", "MGG", "PAP"])
@pytest.mark.parametrize(
    ("recipe", "blur_p"), [("dinov3", (0.0, 0.2, 0.2)), ("pathology", (0.2, 0.1, 0.2))], ids=["dinov3", "pathology"]
)
def test_cytology_is_changed_little(recipe, blur_p, stain):
    augmentation = dataclasses.replace(AUGMENTATIONS[recipe], by_stain=True, hed_p=0.5)
    expected = {"hed_p": 0, "hue": 0.02, "grayscale_p": 0.05, "blur_p": blur_p, "blur_sigma": (0.1, 1.0)}
    assert changes(augmentation, for_stain(augmentation, stain)) == expected


def test_cytology_raises_no_number():
    gentle = dataclasses.replace(PLAIN, by_stain=True, hue=0.01, grayscale_p=0.01, blur_p=(0.1, 0.0, 0.05))
    gentle = dataclasses.replace(gentle, blur_sigma=(0.2, 0.4))
    assert for_stain(gentle, "Pap") == gentle
    strong = dataclasses.replace(gentle, blur_sigma=(1.5, 3.0))
    assert for_stain(strong, "MGG").blur_sigma == (1.0, 1.0)


@pytest.mark.parametrize("stain", [None, "", "HE", "Masson", "IHCx", "PapX", "marker:IHC"])
def test_other_stains_change_nothing(stain):
    assert for_stain(AUGMENTATIONS["pathology"], stain) is AUGMENTATIONS["pathology"]


@pytest.mark.parametrize("stain", ["IHC", "IF", "Pap", "HE"])
def test_stains_do_not_matter_unless_asked(stain):
    assert for_stain(AUGMENTATIONS["dinov3"], stain) is AUGMENTATIONS["dinov3"]


def test_ihc_crops_keep_their_hue():
    """Of what is drawn for a view, nothing that turns its colours."""
    drawn = {stain: draw(for_stain(AUGMENTATIONS["pathology"], stain), 200, 0.5) for stain in ("HE", "IHC:CD3")}
    for stain, views_ in drawn.items():
        names = {name for view in views_ for name, _ in view.jitter}
        turning = any(view.stains for view in views_), any(view.gray for view in views_), "hue" in names
        assert turning == ((True,) * 3 if stain == "HE" else (False,) * 3)
        assert {"brightness", "contrast", "saturation"} <= names
        assert any(view.blur_sigma for view in views_)


# ---- random draws


def test_a_sample_depends_on_seed_and_index_alone(texture):
    def sample(seed, index):
        made = make_crops(texture, SMALL, AUGMENTATIONS["pathology"], sample_rng(seed, index))
        return made.global_crops.tobytes() + made.local_crops.tobytes()

    first = [sample(0, index) for index in range(6)]
    assert [sample(0, index) for index in reversed(range(6))] == first[::-1]
    assert len({*first, *(sample(1, index) for index in range(6))}) == 12


def test_streams_are_unrelated():
    draws = np.array([[sample_rng(seed, index).random(50) for index in range(60)] for seed in (0, 1, 2**63, -1)])
    assert stats.kstest(draws.ravel(), stats.uniform.cdf).pvalue > 1e-3
    correlation = np.corrcoef(draws.reshape(-1, 50))
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 0.75  # 28,680 pairs of 50 draws: 5 standard errors
    assert stats.kstest(draws[:, :, 0].ravel(), stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_the_window_may_be_read_only_and_is_never_written(texture, preset):
    window = texture.copy()
    window.flags.writeable = False
    sizes = CropSizes(global_px=240, local_px=16, num_local=2, global_scale=(1.0, 1.0), gram_px=240)
    for index in range(30):
        make_crops(window, sizes, AUGMENTATIONS[preset], sample_rng(8, index))
    assert np.array_equal(window, texture)


def test_wrong_images_are_refused():
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(AssertionError):
            make_crops(image, SMALL, PLAIN, sample_rng(0, 0))


# ---- picture


def test_contact_sheet_shows_every_crop(texture):
    sizes = CropSizes(global_px=40, local_px=16, num_local=7, gram_px=56)
    made = make_crops(texture, sizes, AUGMENTATIONS["dinov3"], sample_rng(9, 0))
    sheet = contact_sheet(made, gap_px=2)
    assert sheet.dtype == np.uint8
    shown = np.lib.stride_tricks.sliding_window_view
    for crop in (*made.global_crops, *made.gram_crops, *made.local_crops):
        size = len(crop)
        corners = np.argwhere((shown(sheet[..., 0], (size, size))[..., 0, :] == crop[0, :, 0]).all(-1))
        assert any(np.array_equal(sheet[y : y + size, x : x + size], crop) for y, x in corners)


def test_contact_sheet_without_locals():
    made = Crops(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 9, 9, 3), np.uint8), None)
    assert contact_sheet(made, gap_px=1).shape[0] == 6
