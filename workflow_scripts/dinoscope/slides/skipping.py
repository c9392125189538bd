"""Slides that cannot be used and are skipped (`slides.on_error: skip`): tried without harm, and written down.

A slide that is skipped leaves its outputs all the same, valid and without a tile, so that all that follows goes on.
Why is written to RESULTS/skipped/STAGE/SLIDE.json. That record also numbers the attempts: planning hands the number to
the job as a param, and a new number (another setting, a repaired file) is what makes Snakemake try again.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dinoscope.errors import DinoscopeError, SlideError
from dinoscope.files import read_json, write_json, writing
from dinoscope.processes import die_with_parent
from dinoscope.slides.find import slide_files
from dinoscope.slides.privacy import without_file_name

__all__ = [
    "Attempt",
    "SkippedSlide",
    "add_skip_arguments",
    "failure_of",
    "files_signature",
    "read_records",
    "try_slide",
]

log = logging.getLogger(__name__)

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_SLIDE_ERROR = 3  # exit status of the child that tried


@dataclass(frozen=True)
class SkippedSlide:
    """What is kept of a slide that was skipped once.

    Attributes:
        slide_id: Name of the slide.
        stage: "tiles", or "features_MODEL".
        attempt: Number of the last attempt.
        reason: Why it was skipped, without names of files; None if the last attempt went well.
        signature: Of the slide's files at that attempt (`files_signature`).
    """

    slide_id: str
    stage: str
    attempt: int
    reason: str | None
    signature: str


def add_skip_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make an `Attempt`."""
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with a slide that cannot be used: fail, or skip (leave outputs without a tile and exit 0)",
    )
    parser.add_argument("--skip-record", type=Path, metavar="F.json", help="where to write why a slide was skipped")
    parser.add_argument("--attempt", type=int, default=0, metavar="N", help="number of this attempt, for the record")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage of a slide.

    Attributes:
        slide: What is opened.
        slide_id: Its name.
        stage: "tiles", or "features_MODEL".
        on_error: "fail" or "skip".
        number: Which attempt it is.
        record: The file to write how it ended to, if any.
    """

    slide: Path
    slide_id: str
    stage: str
    on_error: str = "fail"
    number: int = 0
    record: Path | None = None

    def end(self, problem: object | None) -> str | None:
        """Writes down how it ended, where that is worth a record, and returns the reason without names of files."""
        reason = None
        if problem is not None:
            reason = without_file_name(problem, self.slide, self.slide_id)
            log.warning("slide %r is skipped: %s", self.slide_id, reason)
        if self.record is not None and (reason is not None or self.number or self.record.exists()):
            kept = SkippedSlide(self.slide_id, self.stage, self.number, reason, files_signature(self.slide))
            with writing(self.record, DinoscopeError):
                write_json(self.record, asdict(kept))
        return reason


def try_slide(work: Callable[[], None], give_up: Callable[[str], None], attempt: Attempt) -> None:
    """Does the work on one slide, or skips the slide if that is wanted.

    Args:
        work: What may fail.
        give_up: Called with the reason, to write outputs that say that the slide was skipped.
        attempt: What is tried, and how errors are taken.
    """
    if attempt.on_error == "fail":
        work()
        attempt.end(None)
        return
    problem = failure_of(work)
    reason = attempt.end(problem)
    if reason is not None:
        give_up(reason)


def failure_of(work: Callable[[], None]) -> str | None:
    """Runs the work in a process of its own and returns why it failed, None if it went well.

    A slide that makes the reading library crash thus costs no more than one that it refuses.

    Raises:
        SystemExit: It ended otherwise: by a defect of ours (its traceback is on stderr) or by a signal from outside.
    """
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of numpy are no obstacle to a fork
        child = os.fork()
    if child == 0:
        os.close(receiver)
        _work_in_child(work, sender)
    os.close(sender)
    with os.fdopen(receiver, encoding="utf-8") as told:
        reason = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return None
    if status == _SLIDE_ERROR:
        return reason
    if status < 0 and signal.Signals(-status) in _CRASHES:
        name = signal.Signals(-status).name
        return f"reading it crashed the program ({name}): the file is damaged; copy it again, or leave the slide out"
    sys.exit(status if status > 0 else 128 - status)


def files_signature(path: str | os.PathLike[str]) -> str:
    """Changes when any file of a slide changes size or time, comes or goes."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        for file in [Path(path), *slide_files(Path(path))]:
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def read_records(results: Path) -> Iterator[SkippedSlide]:
    """All records of a results folder, by stage and slide."""
    for path in sorted((results / "skipped").glob("*/*.json"), key=lambda path: (path.parent.name, path.stem)):
        with contextlib.suppress(OSError, ValueError, TypeError):  # one that is half gone counts as none
            yield SkippedSlide(**read_json(path))


def _work_in_child(work: Callable[[], None], sender: int) -> None:
    status = 1
    try:
        die_with_parent()
        work()
        status = 0
    except SlideError as error:
        with os.fdopen(sender, "w", encoding="utf-8") as told:
            told.write(str(error))
        status = _SLIDE_ERROR
    except DinoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
