"""The table of slides beside the merged manifest: what each slide is, without paths and without labels."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinoscope.errors import ManifestError
from dinoscope.files import atomic_path
from dinoscope.slides.manifest import read_metadata
from dinoscope.slides.table import SlideRecord, read_rows

__all__ = ["SLIDE_SCHEMA", "write_slide_summary"]

SLIDE_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("case_id", pa.string()),
        ("use", pa.string()),
        ("site", pa.string()),
        ("scanner", pa.string()),
        ("stain", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mpp", pa.float32()),
        ("num_levels", pa.int16()),
        ("vendor", pa.string()),
        ("num_tiles", pa.int64()),
    ]
)


def write_slide_summary(
    path: str | Path, manifests: Sequence[str | Path], records: Sequence[SlideRecord], splits: str | Path | None = None
) -> None:
    """Writes one row a slide, sorted by slide_id.

    Args:
        path: Parquet file to write.
        manifests: Tile manifests, one a slide.
        records: The slide table (`read_slide_table`).
        splits: Table of slide_id and use (train or eval), which overrules the records' train and eval.

    Raises:
        ManifestError: A manifest is damaged, or its slide is not in the slide table.
    """
    by_id = {record.slide_id: record for record in records}
    decided = {row["slide_id"]: row["use"] for _, row in read_rows(Path(splits))[1]} if splits else {}
    rows = [_row(manifest, by_id, decided) for manifest in manifests]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["slide_id"]), schema=SLIDE_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _row(manifest: str | Path, by_id: dict[str, SlideRecord], decided: dict[str, str]) -> dict[str, object]:
    metadata = read_metadata(manifest)
    record = by_id.get(metadata["slide_id"])
    if record is None:
        raise ManifestError(f"{manifest} is of slide {metadata['slide_id']!r}, which is not in the slide table: add it")
    uses = set(record.use)
    if record.slide_id in decided:
        uses = uses - {"train", "eval"} | {decided[record.slide_id]}
    row = {name: getattr(record, name) for name in ("slide_id", "case_id", "site", "scanner", "stain")}
    row |= {name: metadata[name] for name in ("width", "height", "num_levels", "vendor", "num_tiles")}
    row["use"] = ",".join(use for use in ("train", "eval", "features") if use in uses)
    known = metadata["mpp_x"] is not None  # not so of a slide that was skipped
    row["mpp"] = (metadata["mpp_x"] + metadata["mpp_y"]) / 2 if known else None
    return row
