"""Parts of JPEG 2000 images: the pixels that imagecodecs gives of the whole."""

import ctypes

import imagecodecs
import numpy as np
import pytest

from dinoscope.slides import jpeg2000
from dinoscope.slides.jpeg2000 import Window, decode_planes
from synthetic_slides import texture

HEIGHT, WIDTH = 240, 256
KINDS = {
    "lossy": {"level": 38, "reversible": False, "mct": True},
    "lossy, no colour transform": {"level": 34, "reversible": False, "mct": False},
    "lossless": {"level": 0, "reversible": True, "mct": True},
    "few resolutions": {"level": 40, "reversible": False, "mct": True, "resolutions": 2},
}


def encode(image: np.ndarray, **options: object) -> bytes:
    return imagecodecs.jpeg2k_encode(image, codecformat="j2k", **options)


def random_windows(count: int) -> list[Window]:
    rng = np.random.default_rng(0)
    windows = [Window(0, 0, WIDTH, HEIGHT), Window(0, 0, 1, 1), Window(WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT)]
    for _ in range(count):
        left, right = sorted(rng.choice(WIDTH + 1, 2, replace=False).tolist())
        top, bottom = sorted(rng.choice(HEIGHT + 1, 2, replace=False).tolist())
        windows.append(Window(left, top, right, bottom))
    return windows


@pytest.fixture(params=["openjpeg", "imagecodecs"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With OpenJPEG asked directly, and as where it is not to be found."""
    if request.param == "imagecodecs":
        monkeypatch.setattr(jpeg2000, "_openjpeg", lambda: None)
    else:
        assert jpeg2000._openjpeg() is not None
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_cut_from_the_whole(library: str, kind: str) -> None:
    stream = encode(texture(HEIGHT, WIDTH), **KINDS[kind])
    whole = imagecodecs.jpeg2k_decode(stream)
    assert whole.std() > 10
    for window in random_windows(60):
        planes = decode_planes(stream, WIDTH, HEIGHT, window)
        wanted = whole[window.top : window.bottom, window.left : window.right]
        assert np.array_equal(np.dstack(planes), wanted), window
        assert all(plane.flags.c_contiguous for plane in planes)
    assert np.array_equal(np.dstack(decode_planes(stream, WIDTH, HEIGHT)), whole)


@pytest.mark.parametrize("window", [None, Window(3, 5, 90, 200)])
def test_damage_and_other_images_are_none(library: str, window: Window | None) -> None:
    image = texture(HEIGHT, WIDTH)
    stream = encode(image, **KINDS["lossy"])
    others = [b"", b"no image", bytes(500), stream[:60], encode(image[:200], **KINDS["lossy"])]
    others += [encode(image.astype(np.uint16), level=0), encode(image[..., 0].copy(), level=0)]
    others += [imagecodecs.jpeg8_encode(image)]
    for other in others:
        assert decode_planes(other, WIDTH, HEIGHT, window) is None


def test_noise_in_the_stream_crashes_nothing() -> None:
    stream = encode(texture(HEIGHT, WIDTH), **KINDS["lossy"])
    rng = np.random.default_rng(1)
    for _ in range(200):
        noisy = bytearray(stream)
        start = int(rng.integers(len(noisy)))
        noisy[start : start + 8] = rng.bytes(8)
        planes = decode_planes(bytes(noisy[: len(stream)]), WIDTH, HEIGHT, Window(10, 20, 200, 230))
        assert planes is None or planes[0].shape == (210, 190)


def test_components_of_fewer_samples_are_repeated() -> None:
    """As Aperio stores chroma: the n-th pixel has sample n // 2, wherever the window begins."""
    samples = np.arange(20 * 30, dtype=np.int32).reshape(20, 30) % 256
    whole = samples.astype(np.uint8).repeat(2, 1)
    components = (jpeg2000._Component * 3)()
    for number, dx in enumerate((1, 2, 2)):
        components[number].dx, components[number].dy = dx, 1
    for window in (Window(0, 0, 60, 20), Window(7, 3, 8, 4), Window(1, 0, 59, 20), Window(10, 5, 31, 6)):
        decoded = jpeg2000._whole_samples(list(components), window, 60, 20)
        assert decoded.left % 2 == decoded.right % 2 == 0
        part = np.ascontiguousarray(samples[decoded.top : decoded.bottom, decoded.left // 2 : decoded.right // 2])
        chroma = components[1]
        chroma.h, chroma.w = part.shape
        chroma.data = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        plane = jpeg2000._plane(chroma, decoded, window)
        assert np.array_equal(plane, whole[window.top : window.bottom, window.left : window.right])
