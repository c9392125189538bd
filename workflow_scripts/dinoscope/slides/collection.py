"""A whole collection of inspected slides: what is wrong with each, and what shows only when all are looked at.

Every check adds sentences; none stops another. Nothing is corrected: a suggested mpp is for the user to give.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dinoscope.errors import SlideError
from dinoscope.files import read_json, write_text
from dinoscope.slides.grid import TileSet, plan_reading
from dinoscope.slides.looks import stain_contradiction
from dinoscope.slides.resolution import MAX_ANISOTROPY
from dinoscope.slides.table import COLLECTION, SlideRecord

__all__ = ["REPORT_COLUMNS", "collection_problems", "report_rows", "slide_problems", "write_report"]

REPORT_COLUMNS = (
    "slide_id", "problems", "width", "height", "mpp_x", "mpp_y", "mpp_source", "objective_power", "vendor", "scanner",
    "num_levels", "focal_planes", "has_icc_profile", "case_id", "site", "stain",
)  # fmt: skip
_SAME_MPP = 0.05  # mpps that differ by less, relative, are taken for one
_ODD_MPP = 0.10
_MIN_AGREEING = 3
_FEWEST_OF_A_SITE = 3  # slides, below which nothing is said of its mpp


def report_rows(
    documents: Sequence[Mapping[str, Any]],
    records: Sequence[SlideRecord] = (),
    tile_sets: Sequence[TileSet] = (),
) -> list[dict[str, str]]:
    """One row a slide, those with problems first, then by slide_id; before them a row for the collection if needed.

    Args:
        documents: What `describe_slide` returned, or {"slide_id", "error"} of slides that could not be read.
        records: The slide table, as far as it is to be compared.
        tile_sets: The tile sets that are wanted of every slide.
    """
    table = {record.slide_id: record for record in records}
    found = slide_problems(documents, table, tile_sets)
    rows = []
    for document in documents:
        slide_id = document["slide_id"]
        values = {name: _cell(document.get(name)) for name in REPORT_COLUMNS}
        if planes := document.get("focal_planes"):
            values["focal_planes"] = "unknown" if planes["count"] is None else str(planes["count"])
        if record := table.get(slide_id):
            given = {name: _cell(getattr(record, name)) for name in ("case_id", "site", "stain")}
            values |= given | {"scanner": values["scanner"] or _cell(record.scanner)}
        rows.append(values | {"problems": _cell("; ".join(found[slide_id]) or "none")})
    rows.sort(key=lambda row: (row["problems"] == "none", row["slide_id"]))
    if of_all := list(collection_problems(documents, table)):
        rows.insert(0, dict.fromkeys(REPORT_COLUMNS, "") | {"slide_id": COLLECTION, "problems": "; ".join(of_all)})
    return rows


def slide_problems(
    documents: Sequence[Mapping[str, Any]], table: Mapping[str, SlideRecord], tile_sets: Sequence[TileSet]
) -> dict[str, list[str]]:
    """slide_id -> sentences, of all slides."""
    found: dict[str, list[str]] = {document["slide_id"]: [] for document in documents}
    readable = [document for document in documents if "error" not in document]
    for document in documents:
        found[document["slide_id"]] += [document["error"]] if "error" in document else document["warnings"]
    for check in (_odd_mpps(readable, table), _copies(readable), _cases(table), _stains(readable, table)):
        for slide_id, problem in check:
            if slide_id in found:
                found[slide_id].append(problem)
    for document in readable:
        found[document["slide_id"]] += _misfits(document, tile_sets)
    return found


def collection_problems(documents: Sequence[Mapping[str, Any]], table: Mapping[str, SlideRecord]) -> Iterator[str]:
    """What no single slide is to blame for."""
    known = [
        (table[document["slide_id"]].site, _mpp(document))
        for document in documents
        if _mpp(document) and document["slide_id"] in table and table[document["slide_id"]].site
    ]
    groups = _groups([mpp for _, mpp in known])
    sites: dict[str, Counter[float]] = defaultdict(Counter)
    for (site, _), group in zip(known, groups, strict=True):
        sites[site][group] += 1
    large = [site for site, counts in sites.items() if sum(counts.values()) >= _FEWEST_OF_A_SITE]
    if len(large) < 2 or len(set(groups)) < 2:
        return
    by_mpp: dict[float, Counter[str]] = defaultdict(Counter)
    for site, counts in sites.items():
        for group, count in counts.items():
            by_mpp[group][site] += count
    told = sum(counts.most_common(1)[0][1] for counts in by_mpp.values()) / len(known)
    chance = max(sum(counts.values()) for counts in sites.values()) / len(known)
    if told - chance < 0.5 * (1 - chance):
        return
    shown = ", ".join(
        f"{site} {' and '.join(f'{group:.3g} ({counts[group]})' for group in sorted(counts))}"
        for site, counts in sorted(sites.items())
    )
    yield (
        f"site and mpp are confounded: from mpp alone {told:.0%} of the slides can be told to be of their site, by "
        f"chance {chance:.0%} (mpp, and number of slides: {shown}); tiles get the same mpp, but sharpness still tells "
        "sites apart: hold out whole sites when you evaluate, or balance the sites"
    )


def write_report(
    path: str | Path,
    inspected: Sequence[str | Path],
    records: Sequence[SlideRecord] = (),
    tile_sets: Sequence[TileSet] = (),
) -> list[dict[str, str]]:
    """Writes the table of `report_rows` for inspected slides as tab-separated text and returns its rows."""
    rows = report_rows([read_json(document) for document in inspected], records, tile_sets)
    lines = ["\t".join(REPORT_COLUMNS), *("\t".join(row[name] for name in REPORT_COLUMNS) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")
    return rows


def _odd_mpps(documents: Sequence[Mapping[str, Any]], table: Mapping[str, SlideRecord]) -> Iterator[tuple[str, str]]:
    """Slides without a usable mpp, or with another than all others of their kind, and what these have."""
    kinds: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for document in documents:
        kinds[_kind(document, table)].append(document)
    for kind, members in kinds.items():
        sure = [_mpp(document) for document in members if _is_sure(document)]
        if not sure:
            continue
        usual, name = statistics.median(sure), _kind_name(kind)
        number = sum(abs(mpp / usual - 1) < _SAME_MPP for mpp in sure)
        slides = f"{number} other slide{'s' if number > 1 else ''} of {name} {'have' if number > 1 else 'has'}"
        for document in members:
            mpp, is_sure = _mpp(document), _is_sure(document)
            if not is_sure and number == len(sure):
                yield document["slide_id"], f"{slides} mpp {usual:.4g}: give that in column mpp if it is right"
            elif is_sure and number >= max(_MIN_AGREEING, 0.8 * (len(sure) - 1)) and abs(mpp / usual - 1) > _ODD_MPP:
                yield document["slide_id"], f"mpp {mpp:.4g} is odd: {slides} {usual:.4g}"


def _kind(document: Mapping[str, Any], table: Mapping[str, SlideRecord]) -> tuple:
    """Format, scanner and objective: slides that have these in common should have one mpp."""
    record = table.get(document["slide_id"])
    scanner = (record.scanner if record else None) or document.get("scanner")
    return document["vendor"], scanner, document["objective_power"]


def _kind_name(kind: tuple) -> str:
    vendor, scanner, power = kind
    return (scanner or f"format {vendor}") + (f" at {power:g}x" if power else "")


def _is_sure(document: Mapping[str, Any]) -> bool:
    return _mpp(document) is not None and document["mpp_source"] != "objective"


def _mpp(document: Mapping[str, Any]) -> float | None:
    known = document.get("mpp_x") and document.get("mpp_y")
    return (document["mpp_x"] + document["mpp_y"]) / 2 if known else None


def _copies(documents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    same: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        if content := document.get("content"):
            same[content].append(document["slide_id"])
    for slide_ids in same.values():
        for slide_id in slide_ids if len(slide_ids) > 1 else ():
            others = ", ".join(other for other in slide_ids if other != slide_id)
            yield slide_id, f"its pixels are those of {others}: keep one of them, lest one slide counts twice"


def _cases(table: Mapping[str, SlideRecord]) -> Iterator[tuple[str, str]]:
    """Slides of a case that stand with different sites or, of a case that is held out, for training as well."""
    cases: dict[str, list[SlideRecord]] = defaultdict(list)
    for record in table.values():
        cases[record.case_id].append(record)
    for case_id, records in cases.items():
        sites = Counter(record.site for record in records if record.site)
        if len(sites) > 1:
            shown = " and ".join(sorted(sites))
            for record in records:
                yield record.slide_id, f"the slides of case {case_id} stand with sites {shown}: correct column site"
        uses = {kind for record in records for kind in record.use & {"train", "eval"}}
        if len(uses) > 1:
            for record in records:
                yield record.slide_id, f"case {case_id} is in both train and eval: change column use"


def _stains(documents: Sequence[Mapping[str, Any]], table: Mapping[str, SlideRecord]) -> Iterator[tuple[str, str]]:
    for document in documents:
        record = table.get(document["slide_id"])
        if record and (problem := stain_contradiction(record.stain, document["looks"])):
            yield document["slide_id"], f"{problem}: correct column stain, or look at the slide"


def _misfits(document: Mapping[str, Any], tile_sets: Sequence[TileSet]) -> Iterator[str]:
    """Tile sets that the slide is too coarse or too small for."""
    mpp = _mpp(document)
    if mpp is None or abs(document["mpp_x"] - document["mpp_y"]) > MAX_ANISOTROPY * mpp:
        return  # which is a problem of its own
    slide = SimpleNamespace(**{name: document[name] for name in ("slide_id", "width", "height", "mpp_x", "mpp_y")})
    slide.mpp, slide.level_downsamples = mpp, document["level_downsamples"]
    slide.num_levels, slide.level_dimensions = document["num_levels"], document["level_dimensions"]
    for tile_set in tile_sets:
        try:
            plan_reading(slide, tile_set)
        except SlideError as error:
            yield str(error).removeprefix(f"slide {document['slide_id']!r}, ")


def _groups(mpps: Sequence[float]) -> list[float]:
    """Of every mpp the smallest of its neighbours in a chain of steps below 5 %."""
    first: dict[float, float] = {}
    last = start = None
    for mpp in sorted(set(mpps)):
        if last is None or mpp / last - 1 >= _SAME_MPP:
            start = mpp
        first[mpp], last = start, mpp
    return [first[mpp] for mpp in mpps]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())
