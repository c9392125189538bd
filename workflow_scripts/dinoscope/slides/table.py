"""The slide table: which slides there are, whose they are, and what each is for.

The table is a tab-separated file with one row a slide and the columns of COLUMNS; a folder or a glob of slides stands
for a table that says no more than names. Nothing here opens a slide, so that planning stays fast.
"""

import csv
import glob
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.slides.find import SLIDE_SUFFIXES, find_slides

__all__ = [
    "COLLECTION",
    "COLUMNS",
    "SlideRecord",
    "check_cases",
    "check_labels",
    "draw_cases",
    "read_rows",
    "read_slide_table",
    "split_cases",
]

COLUMNS = ("slide_id", "path", "case_id", "use", "site", "scanner", "stain", "mpp")
COLLECTION = "*"  # in column slide_id of slides_report.tsv, all slides; none can have this name
USES = ("train", "eval", "features")
_SLIDE_ID = re.compile(r"""[^/\\{}:*?"<>|\n\r\t.\-@][^/\\{}:*?"<>|\n\r\t]*""")
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class SlideRecord:
    """One slide as the table describes it.

    Attributes:
        slide_id: Name of the slide in all results.
        path: File to open; relative paths start at the working directory.
        case_id: Patient; the slide_id where the table names none.
        use: Subset of "train", "eval" and "features".
        site: Where the slide was made, if known.
        scanner: What it was scanned with, if known.
        stain: HE, IHC:marker, Pap, MGG, IF or another name, if known.
        mpp: Micrometres a pixel at level 0, if the table gives it.
    """

    slide_id: str
    path: Path
    case_id: str
    use: frozenset[str]
    site: str | None = None
    scanner: str | None = None
    stain: str | None = None
    mpp: float | None = None


def read_slide_table(spec: str | os.PathLike[str]) -> list[SlideRecord]:
    """Reads a table (.tsv), or lists the slides of a folder or a glob.

    Args:
        spec: A table; a folder, searched with all it contains; or a glob such as "slides/*.svs". In a folder or glob
            each slide counts once however many files it has (MIRAX, DICOM: one slide a folder), and is named after its
            file, or its folder (DICOM).

    Raises:
        ConfigError: One sentence a problem: no such table or no slide, an unknown column, a missing or bad value, a
            slide_id that stands twice, a case that is in both train and eval.
    """
    text = str(spec)
    if Path(text).is_dir() or (glob.has_magic(text) and not Path(text).is_file()):
        records = _records_of_files(find_slides(text), text)
    else:
        records = _records_of_table(Path(text))
    check_cases(records, text)
    return records


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a tab-separated file, and its rows with the line each stands in.

    Empty cells are left out of a row; lines that start with # are comments.

    Raises:
        ConfigError: The file is missing, is not UTF-8 text or not tab-separated, names no columns or one twice, or a
            row has more cells than there are columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [(line, _cells(text)) for line, text in enumerate(file.read().splitlines(), start=1)]
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path} does not exist; write a table of that name or change the config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save the table as tab-separated text (UTF-8)") from None
    lines = [(line, cells) for line, cells in lines if any(cells) and not cells[0].startswith("#")]
    if not lines:
        raise ConfigError(f"{path} is empty; its first line must name the columns")
    (_, header), *rows = lines
    if len(header) == 1 and re.search(r"[,; ]", header[0]):
        raise ConfigError(f"{path}: columns must be separated by tabs; the first line reads {header[0]!r}")
    untabbed = next((line for line, cells in rows if len(cells) == 1 < len(header) and "  " in cells[0]), None)
    if untabbed is not None:
        raise ConfigError(f"{path} line {untabbed} has blanks between its cells; columns must be separated by tabs")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ConfigError(f"{path}: column {repeated[0]!r} stands twice in the first line")
    for line, cells in rows:
        if len(cells) > len(header):
            raise ConfigError(f"{path} line {line} has {len(cells)} cells, but there are {len(header)} columns")
    return header, [(line, {k: v for k, v in zip(header, cells, strict=False) if v}) for line, cells in rows]


def check_cases(records: Sequence[SlideRecord], source: str) -> None:
    """Refuses a case with slides in both train and eval, since it would be judged on what it was trained on.

    Raises:
        ConfigError: A sentence for each of the first such cases, with one slide of each kind.
    """
    kinds: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        for kind in record.use & {"train", "eval"}:
            kinds[record.case_id].setdefault(kind, record.slide_id)
    found = [
        f"{source}: case {case_id} is in both train (slide {slides['train']}) and eval (slide {slides['eval']}); "
        "a case may be in one of them: change column `use`"
        for case_id, slides in kinds.items()
        if len(slides) > 1
    ]
    if found:
        raise ConfigError(_shown(found))


def check_labels(path: str | os.PathLike[str], records: Sequence[SlideRecord]) -> None:
    """Checks that a table of labels names known slides or cases, each once.

    Raises:
        ConfigError: No column slide_id or case_id (or both), no label column, an unknown or repeated key.
    """
    columns, rows = read_rows(Path(path))
    keys = [column for column in columns if column in ("slide_id", "case_id")]
    if len(keys) != 1:
        raise ConfigError(f"{path} must have one of the columns slide_id and case_id, and has {len(keys)} of them")
    key = keys[0]
    if len(columns) == 1:
        raise ConfigError(f"{path} has no column but {key}; add one column a label")
    known = {getattr(record, key) for record in records}
    seen: set[str] = set()
    for line, row in rows:
        name = row.get(key)
        if name is None:
            raise ConfigError(f"{path} line {line} has no {key}")
        if name not in known:
            raise ConfigError(f"{path} line {line}: {key} {name!r} is not in the slide table{nearest(name, known)}")
        if name in seen:
            raise ConfigError(f"{path} line {line}: {key} {name!r} stands twice; give each one row")
        seen.add(name)


def split_cases(records: Sequence[SlideRecord], fraction: float, seed: int) -> dict[str, str]:
    """Says for each slide with train or eval in its `use` which of the two it serves.

    With any eval slide in the table, the table is followed. Without one, `fraction` of the training cases, rounded, at
    least one if there are three, is held out: shares are dealt to the strata (site and stain of a case's slides) by
    largest remainder, and within a stratum the cases of the smallest SHA-256 of seed and case_id are taken, so that
    a case that comes or goes moves few others.

    Args:
        fraction: Share of cases, 0 to 0.9; 0 holds nothing out.
        seed: Another seed draws other cases.

    Returns:
        slide_id -> "train" or "eval"; slides of other use are left out.
    """
    if fraction == 0 or any("eval" in record.use for record in records):
        held_out: set[str] = set()
    else:
        held_out = draw_cases([record for record in records if "train" in record.use], fraction, seed)
    split = {}
    for record in records:
        if "eval" in record.use or ("train" in record.use and record.case_id in held_out):
            split[record.slide_id] = "eval"
        elif "train" in record.use:
            split[record.slide_id] = "train"
    return split


def draw_cases(records: Sequence[SlideRecord], fraction: float, seed: int) -> set[str]:
    """Cases whose share of all cases is `fraction`, drawn as `split_cases` says."""
    looks: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for record in records:
        looks[record.case_id].add((record.site or "", record.stain or ""))
    strata: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for case_id, look in looks.items():
        strata[tuple(sorted(look))].append(case_id)
    number = round(fraction * len(looks))
    if len(looks) >= 3:
        number = max(number, 1)
    shares = {stratum: number * len(cases) / len(looks) for stratum, cases in strata.items()}
    counts = {stratum: math.floor(share) for stratum, share in shares.items()}
    # Among equal remainders the larger stratum gives, which has more left to train on.
    by_remainder = sorted(strata, key=lambda s: (counts[s] - shares[s], -len(strata[s]), s))
    for stratum in by_remainder[: number - sum(counts.values())]:
        counts[stratum] += 1
    held_out: set[str] = set()
    for stratum, cases in strata.items():
        held_out.update(sorted(cases, key=lambda case_id: _draw(seed, case_id))[: counts[stratum]])
    return held_out


def _draw(seed: int, case_id: str) -> str:
    return hashlib.sha256(f"{seed}\n{case_id}".encode()).hexdigest()


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter="\t"), [])]


def _records_of_table(path: Path) -> list[SlideRecord]:
    if path.suffix.lower() in SLIDE_SUFFIXES:
        raise ConfigError(f"slides.source {path} is a slide; give a table (.tsv), a folder or a glob such as '{path}*'")
    columns, rows = read_rows(path)
    problems = list(_column_problems(path, columns))
    if not problems and not rows:
        problems = [f"{path} lists no slides; add one line a slide below the names of the columns"]
    records, first_line = [], {}
    for line, row in rows:
        found = [f"{path} line {line}: {problem}" for problem in _row_problems(row)]
        slide_id = row.get("slide_id", "")
        if slide_id in first_line:
            found.append(
                f"{path} line {line}: slide_id {slide_id!r} stands in line {first_line[slide_id]} already; "
                "give each slide a name of its own"
            )
        first_line.setdefault(slide_id, line)
        problems += found
        if not found:
            records.append(_record(row))
    if problems:
        raise ConfigError(_shown(problems))
    return records


def _shown(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN_PROBLEMS
    return "\n".join([*problems[:_SHOWN_PROBLEMS], *([f"… and {more} more"] if more > 0 else [])])


def _column_problems(path: Path, header: Sequence[str]) -> Iterator[str]:
    for name in ("slide_id", "path"):
        if name not in header:
            yield f"{path} has no column {name}; its columns are {', '.join(header)}"
    for name in header:
        if name not in COLUMNS:
            hint = nearest(name, COLUMNS) or "; labels live in config/labels.tsv (config key `labels`)"
            yield f"{path}: unknown column {name!r}{hint}; known are {', '.join(COLUMNS)}"


def _row_problems(row: Mapping[str, str]) -> Iterator[str]:
    slide_id = row.get("slide_id")
    if slide_id is None:
        yield "slide_id is empty"
    elif problem := _id_problem(slide_id):
        yield problem
    named = f" (slide {slide_id})" if slide_id else ""
    if "path" not in row:
        yield f"path is empty{named}"
    for use in _uses(row):
        if use not in USES:
            yield f"use {use!r}{named} is unknown{nearest(use, USES)}; give a comma list of {', '.join(USES)}"
    if "mpp" in row and not _is_positive_number(row["mpp"]):
        yield f"mpp {row['mpp']!r}{named} is not a positive number of micrometres a pixel, e.g. 0.25"


def _record(row: Mapping[str, str]) -> SlideRecord:
    return SlideRecord(
        slide_id=row["slide_id"],
        path=Path(row["path"]).expanduser(),
        case_id=row.get("case_id", row["slide_id"]),
        use=frozenset(_uses(row)),
        site=row.get("site"),
        scanner=row.get("scanner"),
        stain=row.get("stain"),
        mpp=float(row["mpp"]) if "mpp" in row else None,
    )


def _uses(row: Mapping[str, str]) -> list[str]:
    return [part.strip() for part in row.get("use", "train,features").split(",")]


def _is_positive_number(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and value > 0


def _id_problem(slide_id: str) -> str | None:
    if _SLIDE_ID.fullmatch(slide_id):
        return None
    return (
        f"slide_id {slide_id!r} cannot name files: it must not start with ., - or @ "
        'nor hold any of / \\ { } : * ? " < > | or a line break'
    )


def _records_of_files(paths: Iterable[Path], source: str) -> list[SlideRecord]:
    records: dict[str, SlideRecord] = {}
    for path in paths:
        slide_id = path.resolve().name if path.is_dir() else path.stem
        if problem := _id_problem(slide_id):
            raise ConfigError(f"{path}: {problem}; name it in a slide table instead")
        if slide_id in records:
            raise ConfigError(
                f"{source}: {records[slide_id].path} and {path} would both be slide {slide_id!r}; "
                "rename one or name them in a slide table"
            )
        records[slide_id] = _record({"slide_id": slide_id, "path": str(path)})
    if not records:
        raise ConfigError(f"no slides in {source}; looked for files ending in {', '.join(SLIDE_SUFFIXES)}")
    return list(records.values())
