"""What the jobs of single slides are told while planning: what to open, how errors are taken, which attempt it is."""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dinoscope.errors import ConfigError
from dinoscope.files import write_text
from dinoscope.plan import Plan
from dinoscope.slides.find import SLIDE_SUFFIXES
from dinoscope.slides.remote import remote_address
from dinoscope.slides.skipping import SkippedSlide, files_signature, read_records
from dinoscope.slides.table import COLLECTION, SlideRecord, read_rows

__all__ = ["SlideJobs"]

_SHOWN = 3
_TILES = "tiles"


class SlideJobs:
    """Arguments and inputs of the jobs of a plan's slides."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._settings = plan, plan.config["slides"]

    @property
    def skips(self) -> bool:
        """Whether slides that cannot be used are skipped."""
        return self._settings["on_error"] == "skip"

    def input_of(self, slide_id: str, *, may_be_missing: bool = False) -> list[str]:
        """The file to open, as a job's input; none where it is missing and may be.

        Raises:
            ConfigError: Slides are missing that may not be; a sentence each for the first.
        """
        path = str(self._plan.slide(slide_id).path)
        if path not in self._missing:
            return [path]
        if not (may_be_missing or self.skips):
            raise ConfigError("\n".join(self._missing_problems()))
        return []

    def address_of(self, slide_id: str) -> str | None:
        """Where Snakemake fetches the slide from, s3://BUCKET/KEY; None where it is a file that is there."""
        return remote_address(self._plan.slide(slide_id).path)

    def own_reader(self, slide_id: str) -> list[str]:
        """Arguments for the reader of a slide whose format OpenSlide does not know."""
        reader = self._settings["reader"]
        known = self._plan.slide(slide_id).path.suffix.lower() in SLIDE_SUFFIXES
        return [] if reader is None or known else ["--slide-reader", reader]

    def options(self, slide_id: str, stage: str | None = None, *, many: bool = False) -> list[str]:
        """Arguments whose change reruns nothing: reader of other slides, and how errors are taken at a stage.

        Args:
            slide_id: The slide.
            stage: "tiles", or "features_MODEL"; None where errors are always written down.
            many: The script takes a folder of records.
        """
        arguments = []
        if self._settings["reader"] is not None and not self.own_reader(slide_id):
            arguments += ["--slide-reader", self._settings["reader"]]
        if stage is not None:
            folder = self._records_folder / stage
            record = ["--skip-records", folder] if many else ["--skip-record", folder / f"{slide_id}.json"]
            arguments += ["--on-error", self._settings["on_error"], *map(str, record)]
        return arguments

    def training_options(self) -> list[str]:
        """Arguments of training, whose change reruns nothing."""
        arguments = ["--slide-reader", self._settings["reader"]] if self._settings["reader"] else []
        if self.skips:
            arguments += ["--on-error", "skip", "--skip-records", str(self._records_folder)]
        if self._plan.config["privacy"] == "hosts":
            arguments.append("--name-hosts")
        return arguments

    def reading_options(self) -> list[str]:
        """Arguments of jobs that find slides in the table: what the config says of all of them."""
        pairs = (("--slide-mpp", self._settings["mpp"]), ("--slide-reader", self._settings["reader"]))
        return [part for option, value in pairs if value is not None for part in (option, str(value))]

    def attempt(self, slide_id: str, stage: str = _TILES) -> int:
        """Number of the attempt at a stage of a slide: a new one where a skipped slide is to be tried again.

        That is so when slides are no longer to be skipped, and when the slide's files have changed.
        """
        last = self._records.get((stage, slide_id))
        if last is None:
            return 0
        if last.reason is None:
            return last.attempt
        changed = files_signature(self._plan.slide(slide_id).path) != last.signature
        return last.attempt + (changed or not self.skips)

    def closing_notes(self) -> Iterator[str]:
        """What to say when Snakemake ends; also writes failed_slides.tsv where slides are or were skipped."""
        skipped = [record for record in read_records(self._plan.results) if record.slide_id in self._plan.slides]
        skipped = [record for record in skipped if record.reason is not None]
        table = self._plan.results / "failed_slides.tsv"
        if skipped or (self.skips and self._plan.results.is_dir()) or table.exists():
            rows = [("slide_id", "stage", "reason"), *((r.slide_id, r.stage, r.reason) for r in skipped)]
            write_text(table, "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows))
        if skipped:
            slides = len({record.slide_id for record in skipped})
            stages = Counter(record.stage for record in skipped)
            shown = ", ".join(f"{stage} {count}" for stage, count in sorted(stages.items()))
            yield (
                f"{slides} of {len(self._plan.slides)} slides {'was' if slides == 1 else 'were'} skipped ({shown}), "
                f"the first because: {skipped[0].reason}; {table} has all reasons"
            )
        yield from self._report_notes()

    def _report_notes(self) -> Iterator[str]:
        table = self._plan.results / "slides_report.tsv"
        try:
            rows = [row for _, row in read_rows(table)[1]]
        except ConfigError:  # not inspected, or somebody has edited it
            return
        odd = [row for row in rows if row.get("problems") != "none"]
        slides = sum(row["slide_id"] != COLLECTION for row in odd)
        if odd:
            collection = "; so has the collection as a whole" if len(odd) > slides else ""
            total = sum(row["slide_id"] != COLLECTION for row in rows)
            yield f"{slides} of {total} inspected slides have problems{collection}: see {table}"

    @functools.cached_property
    def _missing(self) -> dict[str, SlideRecord]:
        made = {*self._plan.demo_slides(), *self._plan.demo_biopsies()}
        return {
            str(record.path): record
            for record in self._plan.slides.values()
            if str(record.path) not in made and not remote_address(record.path) and not os.path.exists(record.path)
        }

    def _missing_problems(self) -> Iterator[str]:
        source = self._settings["source"]
        for record in list(self._missing.values())[:_SHOWN]:
            yield f"slide {record.slide_id}: {record.path} does not exist; correct column path of {source}"
        if len(self._missing) > _SHOWN:
            yield f"… and {len(self._missing) - _SHOWN} more slides do not exist"

    @functools.cached_property
    def _records_folder(self) -> Path:
        return self._plan.results / "skipped"

    @functools.cached_property
    def _records(self) -> dict[tuple[str, str], SkippedSlide]:
        return {(record.stage, record.slide_id): record for record in read_records(self._plan.results)}
