"""The steps of evaluate.py that need no model: units, comparisons, verdicts; each reads files and writes files."""

import argparse
import logging

from dinoscope.errors import ConfigError
from dinoscope.evaluate.answers import read_answers
from dinoscope.evaluate.cohort import Cohort, make_cohort
from dinoscope.evaluate.comparing import compare_models, read_comparison, write_comparison
from dinoscope.evaluate.labels import read_labels
from dinoscope.evaluate.tile_sets import ImageSet, list_masks, list_tiles
from dinoscope.evaluate.units import read_units, units_of_images, units_of_label, units_of_slides, write_units
from dinoscope.evaluate.verdicts import judge, primary_of, write_summary
from dinoscope.names import nearest
from dinoscope.slides.table import SlideRecord, check_labels, read_slide_table, split_cases

__all__ = ["compare", "images_of", "make_units", "summarise"]

_log = logging.getLogger(__name__)


def make_units(arguments: argparse.Namespace) -> None:
    """Writes units.json of a task."""
    if arguments.folder is not None:
        images = images_of(arguments)
        units = units_of_images(arguments.task, images, arguments.selection_fraction, arguments.seed)
    else:
        records, cohort = _cohort(arguments)
        by_name = {record.slide_id: record for record in records}
        if arguments.labels is None:
            units = units_of_slides(arguments.task, arguments.described, cohort, by_name)
        else:
            check_labels(arguments.labels, records)
            (label,) = read_labels(arguments.labels, [arguments.label])
            units = units_of_label(arguments.task, label, cohort, by_name)
    write_units(arguments.output, units)
    groups = {unit.group for unit in units.units}
    _log.info("task %s: %d units in %d groups, %s", units.task, len(units), len(groups), units.kind)


def compare(arguments: argparse.Namespace) -> None:
    """Writes the comparison of all models on one task, and its figure."""
    units = read_units(arguments.units)
    if len(arguments.models) != len(arguments.answers):
        raise ConfigError(
            f"{len(arguments.models)} names of models but {len(arguments.answers)} files of answers; give one each"
        )
    answers = dict(zip(arguments.models, map(read_answers, arguments.answers), strict=True))
    references: dict[str, list[str]] = {}
    for pair in arguments.against:
        model, _, reference = pair.partition("=")
        references.setdefault(model, []).append(reference)
    from dinoscope.evaluate.figures import draw_task  # matplotlib takes its time

    unknown = [model for members in arguments.seeds_of for model in members if model not in answers]
    if unknown:
        raise ConfigError(f"--seeds-of names {unknown[0]}, which is none of the models{nearest(unknown[0], answers)}")
    how = {"draws": arguments.bootstraps, "seed": arguments.seed}
    found = compare_models(units, answers, references, runs=arguments.seeds_of, **how)
    draw_task(found, arguments.figure, margin=arguments.margin)
    write_comparison(arguments.output, found)


def summarise(arguments: argparse.Namespace) -> None:
    """Writes the table of all measures, what the report shows, and a JSON a measure."""
    tasks = [read_comparison(path) for path in arguments.comparisons]
    primary = primary_of(tasks, arguments.primary)
    judgements = judge(tasks, arguments.margin, primary)
    write_summary(
        tasks, judgements, primary, table=arguments.table, document=arguments.document, folder=arguments.measures
    )
    for one in judgements:
        if one.is_primary:
            _log.info("%s", one.sentence)


def images_of(arguments: argparse.Namespace) -> ImageSet:
    """The images that the options name.

    Raises:
        ConfigError: They name none, or the folder is not as it must be.
    """
    if arguments.folder is None or arguments.set_name is None:
        raise ConfigError("no images are named; give --folder and --set-name")
    if arguments.masks is None:
        return list_tiles(arguments.set_name, arguments.folder, arguments.groups)
    return list_masks(arguments.set_name, arguments.folder, arguments.masks, arguments.groups)


def _cohort(arguments: argparse.Namespace) -> tuple[list[SlideRecord], Cohort]:
    records = read_slide_table(arguments.slides)
    split = split_cases(records, arguments.split_fraction, arguments.seed)
    return records, make_cohort(
        records,
        split,
        fraction=arguments.selection_fraction,
        seed=arguments.seed,
        selection=arguments.selection,
    )
