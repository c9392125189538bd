"""Many slides in one process under Snakemake, whose jobs are of one slide each.

Jobs of single slides are what makes a single slide a target and a new slide cheap to plan. Loading the weights for each
would be dear, though. So the job that has loaded them goes on with slides whose jobs have yet to come: it lays their
features down in a folder `.finished` beside the outputs, where Snakemake deletes nothing. The job of such a slide finds
them there, sees from the receipt that weights, tiles, slide and settings are the very same, and links them to its
output without loading anything. What a job has finished thus survives whatever fails after it.

Which slides are wanted stands in a list that Snakemake's `onstart` writes. Nothing here imports torch.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dinoscope.errors import DinoscopeError, FeaturesError, SlideError
from dinoscope.files import atomic_path, read_json, sha256_file, write_json, write_text, writing
from dinoscope.processes import snakemake_ancestor, still_alive
from dinoscope.slides.skipping import Attempt, files_signature
from dinoscope.train.lock import WITHOUT_FLOCK

if TYPE_CHECKING:
    from dinoscope.features.extract import Extractor

__all__ = [
    "MINUTES_FOR_OTHERS",
    "MadeWith",
    "SharedSlide",
    "cards_beside",
    "claim",
    "extract_shared",
    "files_digest",
    "read_wanted",
    "write_wanted",
]

FINISHED = ".finished"
MINUTES_FOR_OTHERS = 60.0
_LOOKED_AT = 4  # times as many slides as are wanted are looked at, since some are done or not ready
_log = logging.getLogger(__name__)
# Raise it when the same input gives other features than before, so that none of before are taken over.
EXTRACTION_VERSION = 2
_CARDS = ("model.json", "config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class MadeWith:
    """What all slides of a job are made with.

    Attributes:
        weights: Digest of sizes and times of the encoder's files (`files_digest`).
        settings: Digest of everything else: name and source of the encoder, what is taken and how it is stored.
    """

    weights: str
    settings: str

    @classmethod
    def of(cls, files: Iterable[Path], **settings: object) -> Self:
        """Of the encoder's files and all settings."""
        text = json.dumps(settings, sort_keys=True, default=str)
        return cls(files_digest(files), hashlib.sha256(text.encode()).hexdigest()[:16])


@dataclass(frozen=True)
class SharedSlide:
    """A slide, its tiles, and where its features go.

    Attributes:
        slide: What is opened.
        tiles: Its tile manifest.
        output: Its feature file.
        tiles_since: Tiles older than this time are about to be made anew; seconds since 1970.
    """

    slide: Path
    tiles: Path
    output: Path
    tiles_since: float = 0.0

    @property
    def finished(self) -> Path:
        """Where its features lie before they are published, and stay after."""
        return self.output.parent / FINISHED / self.output.name

    @property
    def is_ready(self) -> bool:
        """Whether its tiles are there and will stay."""
        try:
            return self.tiles.stat().st_mtime > self.tiles_since
        except FileNotFoundError:
            return False

    def receipt(self, made_with: MadeWith) -> dict[str, Any]:
        """What its features depend on, as far as that can be told without loading anything."""
        # here, because pyarrow takes its time and planning imports this module
        from dinoscope.slides.manifest import manifest_digest

        return asdict(made_with) | {
            "version": EXTRACTION_VERSION,
            "slide": files_signature(self.slide),
            "tiles": manifest_digest(self.tiles),
        }

    def is_finished(self, made_with: MadeWith, *, whatever_weights: bool = False, at_a_glance: bool = False) -> bool:
        """Whether its features lie there as they were written, made of the very same; or of the same but for weights.

        Args:
            made_with: What they are to be made with.
            whatever_weights: The files of the weights need not be the same.
            at_a_glance: Compare only the size of what lies there, without reading it.
        """
        try:
            kept, wanted = read_json(self._receipt_path), self.receipt(made_with)
            size, content = kept.pop("size", None), kept.pop("content", None)
            if whatever_weights:
                kept, wanted = kept | {"weights": ""}, wanted | {"weights": ""}
            is_whole = size == self.finished.stat().st_size
            return kept == wanted and is_whole and (at_a_glance or content == sha256_file(self.finished))
        except (OSError, ValueError):
            return False

    @contextlib.contextmanager
    def finishing(self, made_with: MadeWith) -> Iterator[None]:
        """Features are written to `finished` within, under a claim; the receipt follows when that went well."""
        receipt = self.receipt(made_with)  # of what is read, not of what may have changed meanwhile
        with writing(self.finished, FeaturesError):
            self._receipt_path.unlink(missing_ok=True)
            for left in self.finished.parent.glob(f".{glob.escape(self.finished.stem)}.*.partial.h5"):
                left.unlink(missing_ok=True)  # by a process that was killed: nobody else is at this slide
        yield
        # the output is a link to it: whoever writes into that changes this
        written = {"size": self.finished.stat().st_size, "content": sha256_file(self.finished)}
        with writing(self._receipt_path, FeaturesError):
            write_json(self._receipt_path, receipt | written)

    def publish(self) -> None:
        """Links the finished features to the output, or copies them where the file system has no links."""
        with writing(self.output, FeaturesError), atomic_path(self.output) as temporary:
            try:
                os.link(self.finished, temporary)
            except OSError:
                shutil.copyfile(self.finished, temporary)
            os.utime(temporary)  # newer than all that it was made of

    @property
    def _receipt_path(self) -> Path:
        return self.finished.with_suffix(".json")


def extract_shared(
    own: SharedSlide,
    others: Sequence[SharedSlide],
    made_with: MadeWith,
    load: Callable[[], "Extractor"],
    attempt: Attempt,
    *,
    at_most: int,
    minutes: float = MINUTES_FOR_OTHERS,
) -> None:
    """Makes the features of one's own slide, or takes them over where they are finished, then those of others.

    What goes wrong with another slide is logged and left to its own job. After what is no fault of a slide (memory of
    a GPU, a function of the user's) none is begun.

    Args:
        own: The slide whose output is wanted.
        others: Slides to go on with once the weights are loaded.
        made_with: The same for all of them.
        load: Loads the weights.
        attempt: How it is taken when the own slide cannot be read.
        at_most: Slides in all.
        minutes: After this time no further slide is begun; the job must have as much again for the one it is at.

    Raises:
        DinoscopeError: The own slide failed.
    """
    with claim(own, wait=True):
        if own.is_finished(made_with):
            _log.info("%s: finished before, taken over", own.output.stem)
            own.publish()
            attempt.end(None)
            return
        extractor = load()
        try:
            _finish(extractor, own, made_with)
        except SlideError as error:
            if attempt.on_error == "fail":
                raise
            extractor.skip(own.tiles, own.output)
            attempt.end(error)
        else:
            own.publish()
            attempt.end(None)
    until, left, snakemake = time.monotonic() + 60 * minutes, at_most - 1, snakemake_ancestor()
    for other in others[: _LOOKED_AT * left]:
        was_killed = snakemake is not None and not still_alive(snakemake)
        if not left or time.monotonic() > until or was_killed:
            return
        try:
            left -= _finish_other(extractor, other, made_with)
        except (DinoscopeError, OSError) as error:
            _log.warning("%s: left to its own job, which will say more: %s", other.output.stem, error)
        except Exception as error:  # whatever it is, the own slide is done
            _log.warning(
                "%s and those after it: left to their own jobs, which will say more: %s: %s",
                *(other.output.stem, type(error).__name__, error),
            )
            return


def _finish(extractor: "Extractor", slide: SharedSlide, made_with: MadeWith) -> None:
    same_but_weights = slide.is_finished(made_with, whatever_weights=True)
    with slide.finishing(made_with):
        # files of weights that were only copied or touched: their tensors tell
        if same_but_weights and extractor.is_finished(slide.tiles, slide.finished):
            _log.info("%s: finished before with the same weights, kept", slide.output.stem)
            return
        stats = extractor.extract(slide.slide, slide.tiles, slide.finished)
        _log.info("%s: %s", slide.output.stem, stats.line())


def _finish_other(extractor: "Extractor", other: SharedSlide, made_with: MadeWith) -> bool:
    """Whether there was something to do."""
    with claim(other, wait=False) as is_ours:
        if not is_ours or not other.is_ready or other.is_finished(made_with, at_a_glance=True):
            return False
        _finish(extractor, other, made_with)
        return True


@contextlib.contextmanager
def claim(slide: SharedSlide, *, wait: bool) -> Iterator[bool]:
    """Whether no other process is at this slide; until the end none will be. A claim dies with its process.

    On a file system without locks each job has its own slide and takes no other: yes to who would wait, else no.

    Args:
        wait: Wait until the other process has done it; else say no at once.
    """
    path = slide.finished.with_name(f".{slide.finished.stem}.lock")
    with contextlib.ExitStack() as stack:
        with writing(slide.output, FeaturesError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_ours = True
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno not in WITHOUT_FLOCK:
                raise
            is_ours = wait
        yield is_ours
        # the file stays: to delete it would let two processes hold locks on two files of its name


def files_digest(files: Iterable[Path]) -> str:
    """Changes when any of the files, or any file of a folder among them, changes size or time, comes or goes."""
    digest = hashlib.sha256()
    for path in sorted(files):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def cards_beside(weights: Path) -> list[Path]:
    """What lies beside a file of weights and tells how it is to be read: settings, mean and std."""
    return [card for name in _CARDS if weights.is_file() and (card := weights.with_name(name)).is_file()]


def write_wanted(folder: Path, slides: Iterable[tuple[str, Path, str, str]], tiles_to_come: Iterable[str]) -> None:
    """Lists the slides whose features are wanted, FOLDER/MODEL/.wanted.json a model.

    Args:
        folder: Where the lists go.
        slides: Model, slide, tiles and output of each.
        tiles_to_come: Tile manifests that are about to be made.
    """
    to_come, now = set(tiles_to_come), time.time()
    by_model: dict[str, list[dict[str, Any]]] = {}
    for model, slide, tiles, output in slides:
        shared = SharedSlide(slide, Path(tiles), Path(output), now if tiles in to_come else 0.0)
        by_model.setdefault(model, []).append(asdict(shared))
    for model, rows in by_model.items():
        rows.sort(key=lambda row: row["output"])
        write_text(folder / model / ".wanted.json", json.dumps(rows, default=str))


def read_wanted(path: Path | None, own: SharedSlide) -> Sequence[SharedSlide]:
    """The other slides of such a list, those after one's own first, so that jobs side by side seldom meet."""
    try:
        rows = read_json(path) if path is not None else []
    except (FileNotFoundError, ValueError):
        return []
    paths = ("slide", "tiles", "output")
    slides = [SharedSlide(**(row | {name: Path(row[name]) for name in paths})) for row in rows]
    after = [slide for slide in slides if str(slide.output) > str(own.output)]
    return after + [slide for slide in slides if str(slide.output) < str(own.output)]
