"""From tiles to features: reading, embedding and writing, all three at once.

Shapes: B tiles a batch, D embedding width, R storage tokens, P = h·w patches a tile.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import DinoscopeError, FeaturesError, ManifestError, SlideError
from dinoscope.features.embedding import POOLINGS, Embedder, choose_device, pool
from dinoscope.features.encoders import Encoder
from dinoscope.features.overlap import BackgroundThread, HostCopy
from dinoscope.features.read_ahead import SlideTiles, load_tiles, read_batches
from dinoscope.features.writers import FeatureInfo, FeatureWriter, open_features, write_features
from dinoscope.progress import progress
from dinoscope.slides.manifest import manifest_digest
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipping import Attempt

__all__ = [
    "POOLINGS",
    "ExtractSettings",
    "ExtractStats",
    "Extractor",
    "choose_device",
    "extract_slides",
    "pool",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractSettings:
    """How features are taken.

    Attributes:
        pooling: "cls" (D), "mean" of the patches (D), "cls+mean" (2·D) or "cls+storage" (D·(1+R)).
        dtype: "float16" or "float32", as stored.
        batch_size: Tiles a forward pass.
        workers: Threads that read tiles ahead; 0 reads in the main thread.
        dense: Also store the features of every patch, (N, h, w, D) float16.
        slide_reader: module:Class of a reader for formats that OpenSlide lacks.
        precision: Number format of the matrix products: "auto" (`choose_precision`), "float32" or "bfloat16".
        compile: Compile the forward pass with torch.compile, which takes a minute and pays on large slides.
    """

    pooling: str = "cls"
    dtype: str = "float16"
    batch_size: int = 64
    workers: int = 2
    dense: bool = False
    slide_reader: str | None = None
    precision: str = "auto"
    compile: bool = False


@dataclass
class ExtractStats:
    """Where the time of one slide went: seconds that the main thread spent on each part, or waited for it."""

    num_tiles: int
    reading: float = 0.0
    forward: float = 0.0
    writing: float = 0.0

    def line(self) -> str:
        """One line for the log: number of tiles, tiles/s and the share of each part."""
        parts = {"reading": self.reading, "forward": self.forward, "writing": self.writing}
        total = max(sum(parts.values()), 1e-9)
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
        return f"{self.num_tiles} tiles in {total:.1f} s, {self.num_tiles / total:.1f} tiles/s ({shares})"


class Extractor:
    """Embeds the tiles of slides with one model.

    Args:
        model: An encoder (encoders.py) in evaluation mode on `device`; `dinoscope.load_backbone` gives one.
        model_name: Stored in the feature files, e.g. "pretrain".
        weights_sha256: Digest of the encoder (`LoadedEncoder.sha256`), stored as well.
        device: Where the model is.
    """

    def __init__(
        self, model: Encoder, model_name: str, weights_sha256: str, settings: ExtractSettings, device: torch.device
    ) -> None:
        self.model_name, self.weights_sha256 = model_name, weights_sha256
        self.settings, self.device = settings, device
        self.embedder = Embedder(
            model,
            model_name,
            settings.pooling,
            device,
            precision=settings.precision,
            dense=settings.dense,
            compile_for=settings.batch_size if settings.compile else None,
        )

    @property
    def feature_dim(self) -> int:
        """Length of a row of features."""
        return self.embedder.feature_dim

    def extract(self, slide_path: Path, tiles_path: Path, output: Path) -> ExtractStats:
        """Writes the features of one slide; the file appears whole or not at all.

        Raises:
            FeaturesError: The tile side does not fit the patch size, or features are not finite.
            ManifestError: The manifest is damaged, or not of this slide.
            SlideError: The slide cannot be opened or read.
        """
        tiles = load_tiles(tiles_path)
        stats = ExtractStats(len(tiles))
        if tiles.skipped:
            self._write_none(tiles, tiles_path, output)
            return stats
        with (
            Slide(slide_path, tiles.slide_id, reader=self.settings.slide_reader) as slide,
            self._writing(tiles, tiles_path, output, len(tiles)) as writer,
            progress(f"features of {tiles.slide_id} by {self.model_name}", len(tiles), unit="tiles") as shown,
        ):
            _check_same_slide(slide, tiles)
            with contextlib.closing(self._embed_and_write(slide, tiles, writer, stats)) as batches:
                for num_done in batches:
                    shown.advance(num_done)
        return stats

    def skip(self, tiles_path: Path, output: Path) -> None:
        """Writes a feature file without rows for a slide whose tiles cannot be read."""
        self._write_none(load_tiles(tiles_path), tiles_path, output)

    def is_finished(self, tiles_path: Path, output: Path) -> bool:
        """Whether `output` holds just what `extract` would write: same weights, tiles and settings."""
        tiles = load_tiles(tiles_path)
        try:
            with open_features(output) as (file, info):
                features, is_dense = file["features"], "patch_features" in file
                wanted = self._info(tiles, manifest_digest(tiles_path))
                if self.settings.precision == "auto":  # it depends on the machine, and any will do
                    wanted = replace(wanted, precision=info.precision)
                return (
                    info == wanted
                    and features.shape == (len(tiles), self.feature_dim)
                    and features.dtype == self.settings.dtype
                    and is_dense == self.settings.dense
                )
        except FeaturesError:
            return False

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of a batch of tiles (`Embedder.embed`), left on the device."""
        return self.embedder.embed(images)

    def _writing(
        self, tiles: SlideTiles, tiles_path: Path, output: Path, num_rows: int
    ) -> contextlib.AbstractContextManager[FeatureWriter]:
        patch_shape = self.embedder.patch_shape(tiles.tile_px, tiles.slide_id)
        return write_features(
            output,
            self._info(tiles, manifest_digest(tiles_path)),
            num_rows,
            self.feature_dim,
            dtype=self.settings.dtype,
            patch_shape=patch_shape if self.settings.dense else None,
        )

    def _write_none(self, tiles: SlideTiles, tiles_path: Path, output: Path) -> None:
        with self._writing(tiles, tiles_path, output, 0):
            pass

    def _embed_and_write(
        self, slide: Slide, tiles: SlideTiles, writer: FeatureWriter, stats: ExtractStats
    ) -> Iterator[int]:
        """Yields the number of tiles of each batch as it is handed to the writer.

        While the device embeds one batch, threads read those to come and another thread writes the one before. The
        main thread only launches, and waits for the slowest of them.
        """
        settings, clock, coords = self.settings, _Clock(stats), tiles.coords
        batches = read_batches(
            slide, tiles, settings.batch_size, settings.workers, pin_memory=self.device.type == "cuda"
        )
        launched: HostCopy | None = None
        # whatever happens, the reading threads end before the slide is closed beneath them
        with BackgroundThread() as background, contextlib.closing(batches):
            for rows, images in batches:
                clock.lap("reading")
                previous, launched = launched, HostCopy(rows, *self.embed(images))
                clock.lap("forward")
                if previous is not None:
                    yield self._hand_over(previous, background, tiles.slide_id, coords, writer, clock)
            if launched is not None:
                yield self._hand_over(launched, background, tiles.slide_id, coords, writer, clock)
        clock.lap("writing")

    def _hand_over(
        self,
        batch: HostCopy,
        background: BackgroundThread,
        slide_id: str,
        coords: np.ndarray,
        writer: FeatureWriter,
        clock: "_Clock",
    ) -> int:
        features, patches = batch.wait()
        clock.lap("forward")
        background.run(self._write, writer, slide_id, features, coords[batch.rows], patches)
        clock.lap("writing")
        return len(features)

    def _write(
        self, writer: FeatureWriter, slide_id: str, features: Tensor, coords: np.ndarray, patches: Tensor | None
    ) -> None:
        if not features.isfinite().all():
            self._refuse(slide_id, coords, features.isfinite().all(dim=1), "check the weights of this model")
        rows = features.to(getattr(torch, self.settings.dtype))
        if not rows.isfinite().all():
            self._refuse(slide_id, coords, rows.isfinite().all(dim=1), "they overflow float16: use --dtype float32")
        if patches is not None and not patches.isfinite().all():
            is_good = patches.isfinite().flatten(1).all(dim=1)
            self._refuse(slide_id, coords, is_good, "its patch features overflow float16: leave out --dense")
        writer.append(rows.numpy(), coords, None if patches is None else patches.numpy())

    def _refuse(self, slide_id: str, coords: np.ndarray, is_good: Tensor, advice: str) -> None:
        x, y = coords[int(is_good.logical_not().nonzero()[0])]
        raise FeaturesError(
            f"slide {slide_id!r}: the features of model {self.model_name!r} are not finite for the tile at ({x}, {y}); "
            + advice
        )

    def _info(self, tiles: SlideTiles, manifest_hash: str) -> FeatureInfo:
        return FeatureInfo(
            slide_id=tiles.slide_id,
            model=self.model_name,
            weights_sha256=self.weights_sha256,
            manifest_hash=manifest_hash,
            pooling=self.settings.pooling,
            mpp=tiles.mpp,
            tile_px=tiles.tile_px,
            overlap_px=tiles.overlap_px,
            patch_size_level0=tiles.footprint_px,
            level0_mpp=tiles.level0_mpp,
            level0_width=tiles.width,
            level0_height=tiles.height,
            precision=str(self.embedder.dtype).removeprefix("torch."),
        )


def extract_slides(
    extractor: Extractor,
    jobs: Sequence[tuple[Path, Path, Path]],
    *,
    keep_finished: bool = False,
    attempts: Sequence[Attempt] | None = None,
) -> None:
    """Extracts slide after slide; one that fails does not stop those after it.

    Args:
        jobs: (slide, tile manifest, output) a slide.
        keep_finished: Leave outputs alone that already hold the very same.
        attempts: One a job: whether a slide that cannot be read is skipped, which gives it a file without rows, and
            where that is written down.

    Raises:
        FeaturesError: Some slides failed; what each of them suffered from is logged.
    """
    failures: list[DinoscopeError] = []
    for number, (slide_path, tiles_path, output) in enumerate(jobs):
        try:
            if keep_finished and extractor.is_finished(tiles_path, output):
                _log.info("%s: finished before, kept", output.stem)
                continue
            attempt = attempts[number] if attempts else Attempt(slide_path, output.stem, "features")
            try:
                stats = extractor.extract(slide_path, tiles_path, output)
            except SlideError as error:
                if attempt.on_error == "fail":
                    raise
                extractor.skip(tiles_path, output)
                attempt.end(error)
            else:
                _log.info("%s: %s", output.stem, stats.line())
                attempt.end(None)
        except DinoscopeError as error:
            if len(jobs) == 1:
                raise
            _log.error("error: %s", error)
            failures.append(error)
    if failures:
        raise FeaturesError(
            f"{len(failures)} of {len(jobs)} slides failed (see above), the first because: {failures[0]}"
        )


def _check_same_slide(slide: Slide, tiles: SlideTiles) -> None:
    if (slide.width, slide.height) != (tiles.width, tiles.height):
        raise ManifestError(
            f"slide {tiles.slide_id!r} is {slide.width}x{slide.height} px, but was {tiles.width}x{tiles.height} px "
            "when its tiles were made; tile it again"
        )


class _Clock:
    """Adds the time since the last lap to a part of the statistics."""

    def __init__(self, stats: ExtractStats) -> None:
        self._stats, self._last = stats, time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        setattr(self._stats, part, getattr(self._stats, part) + now - self._last)
        self._last = now
