"""The steps of evaluate.py that ask models: features, answers, images for probes; each reads files and writes files."""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from dinoscope.evaluate.answers import Answers, write_answers
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.describing import describe_slides
from dinoscope.evaluate.embedding import (
    embed_masked,
    embed_tiles,
    read_image_features,
    read_sampled_features,
    write_features,
)
from dinoscope.evaluate.inputs import groups_seen, read_history, slide_features
from dinoscope.evaluate.labels import read_labels
from dinoscope.evaluate.masked import answer_masks
from dinoscope.evaluate.measuring import Settings, answer_classes, answer_values
from dinoscope.evaluate.patch_similarity import MAX_IMAGES, embed_patches, gram_distances, read_patches
from dinoscope.evaluate.probe_sets import probe_of_images, probe_of_slides, sampled_tiles
from dinoscope.evaluate.run import images_of
from dinoscope.evaluate.sampled_answers import add_sampled
from dinoscope.evaluate.samples import SampledTiles
from dinoscope.evaluate.sampling import sample_slide
from dinoscope.evaluate.tile_sets import ImageSet
from dinoscope.evaluate.units import Units, read_units
from dinoscope.export.convert import write_initial_weights
from dinoscope.features.embedding import choose_device
from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.recipe import load_recipe
from dinoscope.slides.reader import SlidePool
from dinoscope.slides.skipping import Attempt
from dinoscope.slides.table import read_slide_table
from dinoscope.train.probing import ProbeSet, read_probe_set, write_probe_set

__all__ = [
    "embed",
    "embed_sampled_patches",
    "make_probe",
    "measure",
    "sample_described",
    "take_sample",
    "write_random_weights",
]

_log = logging.getLogger(__name__)
_NAMED = 5  # of cases without a tile


def write_random_weights(arguments: argparse.Namespace) -> None:
    """The recipe's backbone as it would begin without published weights."""
    config = OmegaConf.merge(load_recipe(arguments.config), {"MODEL": {"WEIGHTS": ""}})
    write_initial_weights(config, arguments.output)


def embed(arguments: argparse.Namespace) -> None:
    """Writes the features of a set of images by one encoder."""
    device = choose_device(arguments.device)
    encoder = _encoder(arguments, device)
    images = images_of(arguments) if not arguments.sampled else SampledTiles(arguments.sampled)
    about = {"model": arguments.model_name, "pooling": arguments.pooling}
    how: dict[str, Any] = {"grey": arguments.grey, "device": device}
    if isinstance(images, SampledTiles):
        about |= {"slides": images.slides, "most": max(Counter(images.slides).values())}
        found = embed_tiles(encoder, images, about, tile_px=images.tile_px, shifts=arguments.shifts, **how)
    elif arguments.masks is None:
        found = embed_tiles(encoder, images, about, tile_px=arguments.tile_px, shifts=arguments.shifts, **how)
    else:
        found = embed_masked(encoder, images, about, enlarge=arguments.enlarge, **how)
    write_features(arguments.output, found)
    _log.info("%s: features of %d images, width %d", arguments.model_name, len(images), found.features.shape[1])


def measure(arguments: argparse.Namespace) -> None:
    """Writes the answers of one model to one task."""
    started = time.monotonic()
    units = read_units(arguments.units)
    settings = Settings(
        arguments.folds, arguments.repeats, tuple(arguments.splits), arguments.seed, not arguments.no_attention
    )
    images = images_of(arguments) if arguments.folder is not None else None
    history = read_history(arguments.seal, arguments.trained_on, is_known=not arguments.unknown_origin)
    records = read_slide_table(arguments.slides) if arguments.slides and images is None else []
    case_of = {record.slide_id: record.case_id for record in records}
    seen = groups_seen(units, history, case_of, images, _pattern(arguments.groups))
    if images is not None:
        answers = _answers_of_images(units, images, arguments, settings)
    else:
        features = slide_features(units, arguments.features, max_tiles=arguments.max_tiles, seed=arguments.seed)
        empty = np.array([not len(bag) for bag in features.bags])
        units = units.without(empty)
        if units.kind == "none":
            answers = describe_slides(units, features, settings.seed)
        else:
            ask = answer_classes if units.kind == "classes" else answer_values
            answers = ask(units, features.pooled, settings, features)
            if arguments.sampled is not None:
                answers = add_sampled(answers, units, read_sampled_features(arguments.sampled), settings)
        answers.about.update(features.about)
        if empty.any():
            names = [unit.name for unit in units.units if unit.set == "skipped"]
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            answers.notes.append(f"left out, since no tile was found or read: {', '.join(names[:_NAMED])}{more}")
    _add_gram_distances(answers, arguments)
    answers.about["seconds"] = round(time.monotonic() - started, 2)
    told = {name: int((seen == number).sum()) for number, name in enumerate(SEEN)}
    answers.about["seen"] = {name: count for name, count in told.items() if count}
    write_answers(arguments.output, Answers(**{**vars(answers), "seen": seen}))
    _log.info("%s, %s: %s", units.task, arguments.model_name, ", ".join(answers.measures) or "described")


def take_sample(arguments: argparse.Namespace) -> None:
    """Writes a sample of the tiles of one slide."""
    attempt = Attempt(arguments.slide, arguments.slide_id, "samples", arguments.on_error)
    how = {"count": arguments.count, "seed": arguments.seed, "reader": arguments.slide_reader}
    sample_slide(attempt, arguments.tiles, arguments.output, **how)


def sample_described(arguments: argparse.Namespace) -> None:
    """Writes the tiles on which the similarities of patches are compared."""
    pool = _pool(arguments, arguments.described)
    tiles = {slide: arguments.tiles / f"{slide}.parquet" for slide in arguments.described}
    how = {"count": MAX_IMAGES, "seed": arguments.seed, "skip": arguments.on_error == "skip"}
    images, of = sampled_tiles(arguments.described, pool, tiles, **how)
    nothing = np.zeros(0, np.int64)
    write_probe_set(arguments.output, ProbeSet(images, of, nothing, np.zeros((0, 1, 1), np.uint8)))
    _log.info("%d tiles of %d slides", len(images), len(np.unique(of)))


def embed_sampled_patches(arguments: argparse.Namespace) -> None:
    """Writes the patches of these tiles by one model."""
    device = choose_device(arguments.device)
    encoder = _encoder(arguments, device)
    about = {"model": arguments.model_name, "pooling": "patches"}
    found = embed_patches(encoder, read_probe_set(arguments.sampled).images, about, device)
    write_features(arguments.output, found)
    _log.info("%s: %d patches of %d tiles", arguments.model_name, len(found.features), len(found.grids))


def make_probe(arguments: argparse.Namespace) -> None:
    """Writes the images that runs are asked about."""
    if arguments.folder is not None:
        images, units = images_of(arguments), read_units(arguments.units)
        how = {key: getattr(arguments, key) for key in ("tile_px", "grey", "instances", "enlarge", "seed")}
        probe = probe_of_images(images, units, count=arguments.images, **how)
    else:
        records = read_slide_table(arguments.slides)
        labels = read_labels(arguments.labels, arguments.label or None) if arguments.labels else []
        probe = probe_of_slides(
            arguments.probed,
            {record.slide_id: record.case_id for record in records},
            _pool(arguments, arguments.probed),
            {slide: arguments.tiles / f"{slide}.parquet" for slide in arguments.probed},
            next((label for label in labels if label.kind == "classes"), None),
            count=arguments.images,
            seed=arguments.seed,
            skip=arguments.on_error == "skip",
        )
    write_probe_set(arguments.output, probe)
    _log.info("probe: %d images of %d groups", len(probe.images), len(np.unique(probe.groups)))


def _encoder(arguments: argparse.Namespace, device: torch.device) -> LoadedEncoder:
    return load_encoder(
        arguments.weights,
        architecture=arguments.architecture,
        device=device,
        files=arguments.encoder_files,
        version=arguments.encoder_version,
    )


def _pool(arguments: argparse.Namespace, slides: Sequence[str]) -> SlidePool:
    records = {record.slide_id: record for record in read_slide_table(arguments.slides)}
    wanted = [records[slide] for slide in slides]
    given = {record.slide_id: record.mpp or arguments.slide_mpp for record in wanted}
    mpp = {slide: value for slide, value in given.items() if value is not None}
    return SlidePool({record.slide_id: record.path for record in wanted}, mpp, reader=arguments.slide_reader)


def _add_gram_distances(answers: Answers, arguments: argparse.Namespace) -> None:
    """How far the similarities of patches are from those of other models, where these are given."""
    if not arguments.patches_from:
        return
    (mine,) = [arguments.patches] if arguments.patches is not None else arguments.features
    others = dict(pair.split("=", 1) for pair in arguments.patches_from)
    others = {f"gram_distance_from_{name}": read_patches(Path(path)) for name, path in others.items()}
    numbers, notes = gram_distances(read_patches(mine), others, arguments.seed)
    answers.numbers.update(numbers)
    answers.notes.extend(notes)


def _answers_of_images(units: Units, images: ImageSet, arguments: argparse.Namespace, settings: Settings) -> Answers:
    (path,) = arguments.features
    features = read_image_features(path, units.digest)
    if units.kind == "masks":
        answers = answer_masks(units, images, features, arguments.instances, settings)
    else:
        answers = answer_classes(units, features.features, settings, shifted=features.shifted)
    answers.about.update(features.about)
    return answers


def _pattern(groups: str | None) -> str | None:
    return None if groups is None or Path(groups).suffix.lower() in (".csv", ".tsv") else groups
