"""What models see in images and videos that are no slides: pages side by side, with one colour space a model for all.

The colour space is fitted on a sample of the images or frames; then one after the other is drawn, so that memory stays
bounded whatever their number.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from dinoscope.data.images import IMAGE_SUFFIXES, read_image
from dinoscope.errors import ConfigError
from dinoscope.files import atomic_path
from dinoscope.progress import progress
from dinoscope.visualize.overview import text_font
from dinoscope.visualize.page import fitted
from dinoscope.visualize.patch_pages import Seen, colored, draw_patch_colors, see, upsampled_scores
from dinoscope.visualize.patches import PatchEncoder, dense_features
from dinoscope.visualize.upsampling import nearest_neighbour

__all__ = ["CODECS", "PictureSettings", "draw_images", "draw_video", "find_images"]

SAMPLED = 32
CODECS = ("vp09", "mp4v", "avc1")
BAND_PX, GAP_PX = 36, 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureSettings:
    """How images are shown.

    Attributes:
        longest_px: Longer side that images are brought to before the models see them.
        upsampler: "jbu", a callable of the user's own, or None.
        background: What becomes of background, see `color_basis.fit_colors`.
        codec: Of videos, four letters; None, the first of `CODECS` that can be written.
    """

    longest_px: int = 896
    upsampler: Callable | str | None = "jbu"
    background: str = "keep"
    codec: str | None = None


def find_images(source: Path) -> list[Path]:
    """The images of a folder and of those in it, by name, or the one image.

    Raises:
        ConfigError: There are none, or several that would be written to one file.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    if not found:
        raise ConfigError(f"{source} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} in it and below")
    return found


def draw_images(
    source: Path, encoders: Sequence[PatchEncoder], output: Path, settings: PictureSettings = PictureSettings()
) -> list[Path]:
    """Writes a PNG for each image of a folder.

    Args:
        source: Folder of images, or one image.
        encoders: The models, from left to right.
        output: Folder for the pictures, which have the names of the images.
        settings: How.

    Returns:
        The pictures.

    Raises:
        ConfigError: There is no image, two have the same name, or pictures would lie among the images.
        DinoscopeError: An image cannot be read, or its features cannot be shown.
    """
    paths = find_images(source)
    root = source if source.is_dir() else source.parent
    outputs = [output / path.relative_to(root).with_suffix(".png") for path in paths]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise ConfigError(f"{source} has several images that would become {twice}; rename one of them")
    _check_apart(source, paths, output, outputs)

    def image(number: int) -> np.ndarray:
        return fitted(read_image(root, str(paths[number].relative_to(root))), settings.longest_px)

    models = _fitted(encoders, [image(number) for number in _evenly(len(paths))], settings)
    with progress("pictures", len(paths), unit="images") as shown:
        for number, picture in enumerate(outputs):
            pixels = image(number)
            seen = [_look(encoder, model, pixels) for encoder, model in zip(encoders, models, strict=True)]
            subtitle = (
                f"PCA of patch features; one colour space a model for all {len(paths)} images; order and signs of "
                f"components as agrees best with {encoders[0].name}"
            )
            about = {"title": paths[number].stem, "subtitle": subtitle, "upsampler": settings.upsampler}
            draw_patch_colors(picture, pixels, seen, **about)
            shown.advance(1)
    return outputs


def draw_video(
    source: Path,
    encoders: Sequence[PatchEncoder],
    output: Path,
    settings: PictureSettings = PictureSettings(),
    *,
    every: int = 1,
    max_frames: int | None = None,
) -> int:
    """Writes an MP4 that shows each frame beside its patches in the colours of their features.

    Args:
        source: A video that OpenCV reads.
        encoders: The models, from left to right.
        output: The MP4; it appears whole or not at all.
        settings: How.
        every: Takes every so manieth frame; the video is shown as fast as before.
        max_frames: Ends after so many.

    Returns:
        Number of frames written.

    Raises:
        ConfigError: The video cannot be read or holds no frame, or none can be written here.
        FeaturesError: Its features cannot be shown.
    """
    rate, count = _about(source)
    frames = list(range(0, count, every))[:max_frames]
    if not frames:
        raise ConfigError(
            f"{source} holds no frame that can be read; give a video that OpenCV opens, such as .mp4 or .avi"
        )
    sample = {frames[index] for index in _evenly(len(frames))}
    sampled = [fitted(frame, settings.longest_px) for number, frame in _frames(source) if number in sample]
    models = _fitted(encoders, sampled, settings)
    names = [encoder.name for encoder in encoders]
    written = 0
    with atomic_path(output) as temporary, contextlib.ExitStack() as closing:
        writer: cv2.VideoWriter | None = None
        shown = closing.enter_context(progress(f"frames of {source.stem}", len(frames), unit="frames"))
        for number, frame in _frames(source, frames[-1] + 1):
            if number % every:
                continue
            pixels = fitted(frame, settings.longest_px)
            page = _strip(
                pixels, names, [_shown(*pair, pixels, settings) for pair in zip(encoders, models, strict=True)]
            )
            if writer is None:
                writer = _writer(temporary, rate / every, page.shape[1::-1], settings.codec)
                closing.callback(writer.release)
            writer.write(page[..., ::-1].copy())
            written += 1
            shown.advance(1)
        closing.close()  # the file is whole when the writer is released
        _check_written(temporary, written, output)
    return written


def _check_apart(source: Path, paths: Sequence[Path], output: Path, outputs: Sequence[Path]) -> None:
    """Refuses to write over the images, and into their folder, where the next run would take pictures for images."""
    folder, target = source.resolve(), output.resolve()
    if source.is_dir() and target.is_relative_to(folder):
        raise ConfigError(f"the pictures would lie among the images of {source}; give a folder outside it as --output")
    images = {path.resolve() for path in paths}
    over = next((path for path in outputs if path.resolve() in images), None)
    if over is not None:
        raise ConfigError(f"a picture would be written over the image {over}; give another folder as --output")


def _evenly(count: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int).tolist()))


def _fitted(encoders: Sequence[PatchEncoder], sample: Sequence[np.ndarray], settings: PictureSettings) -> list[Seen]:
    models: list[Seen] = []
    for encoder in encoders:
        reference = models[0] if models else None
        models.append(see(encoder, sample, reference=reference, background=settings.background))
        explained = 100 * models[-1].basis.info["explained_by_top_3"]
        _log.info("%s: 3 components explain %.0f %% of the patches of %d images", encoder.name, explained, len(sample))
    return [replace(model, features=[]) for model in models]  # the basis is what is kept


def _look(encoder: PatchEncoder, model: Seen, image: np.ndarray) -> Seen:
    """What a model sees in one image, in the colours of all."""
    return replace(model, features=[dense_features(encoder, image)])


def _shown(encoder: PatchEncoder, model: Seen, image: np.ndarray, settings: PictureSettings) -> np.ndarray:
    seen = _look(encoder, model, image)
    if settings.upsampler is None:
        return colored(nearest_neighbour(seen.scores(0), *image.shape[:2]), seen.basis)
    scores = upsampled_scores(seen, 0, image, None if settings.upsampler == "jbu" else settings.upsampler)
    colors = colored(scores, seen.basis)
    return cv2.resize(colors, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def _strip(frame: np.ndarray, names: Sequence[str], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """A frame and its pictures side by side below their names, with even sides, as codecs want them."""
    height, width = frame.shape[:2]
    step = width + GAP_PX
    page = np.full((BAND_PX + height, (1 + len(pictures)) * step - GAP_PX, 3), 255, np.uint8)
    for number, picture in enumerate([frame, *pictures]):
        page[BAND_PX:, number * step : number * step + width] = picture
    canvas = Image.fromarray(page)
    for number, name in enumerate(["image", *names]):
        ImageDraw.Draw(canvas).text((number * step + 8, 7), name, fill=(20, 20, 20), font=text_font(20))
    page = np.asarray(canvas)
    return page[: page.shape[0] // 2 * 2, : page.shape[1] // 2 * 2]


def _about(source: Path) -> tuple[float, int]:
    """Frames a second, and the number of frames, counted: what files say of it is not to be trusted."""
    video = cv2.VideoCapture(os.fspath(source))
    try:
        rate = video.get(cv2.CAP_PROP_FPS)
        count = 0
        while video.grab():
            count += 1
    finally:
        video.release()
    return rate if 0 < rate < 1000 else 25.0, count


def _frames(source: Path, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    video, number = cv2.VideoCapture(os.fspath(source)), 0
    try:
        while stop is None or number < stop:
            found, frame = video.read()
            if not found:
                return
            yield number, frame[..., ::-1]
            number += 1
    finally:
        video.release()


def _writer(path: Path, rate: float, size: tuple[int, int], codec: str | None) -> cv2.VideoWriter:
    for name in [codec] if codec else CODECS:
        writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter_fourcc(*name), rate, size)
        if writer.isOpened():
            return writer
        writer.release()
    tried = codec or ", ".join(CODECS)
    raise ConfigError(f"OpenCV cannot write an MP4 of codec {tried} here; name another one, or give a folder of images")


def _check_written(path: Path, count: int, output: Path) -> None:
    if _about(path)[1] != count:
        raise ConfigError(f"{output}: the video could not be written to its end; is the disk full? else try codec mp4v")
