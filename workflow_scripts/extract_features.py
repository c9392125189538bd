"""Features of tiles by one model, one HDF5 file a slide (TRIDENT's layout).

    python workflow_scripts/extract_features.py --weights results/models/gram/teacher.pth --model-name gram \\
        --slide slides/A.svs --tiles results/tiles/features/A.parquet --output results/features/gram/A.h5

Several slides: give as many of --slide, --tiles and --output each; the weights load once. Long lists can stand in a
file, one word a line: @list.txt. Takes a GPU when there is one (then in bf16), else the CPU (in float32).
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.slides.skipping import Attempt


def main() -> None:
    """Extracts the features of the given slides."""
    arguments = parse_arguments()
    jobs = zip_jobs(arguments.slide, arguments.tiles, arguments.output)

    # here, so that --help and mistakes in the arguments need not wait for torch
    from dinoscope.features.extract import Extractor, ExtractSettings, choose_device, extract_slides, weights_digest
    from dinoscope.models.weights import load_backbone

    device = choose_device(arguments.device)
    settings = ExtractSettings(
        pooling=arguments.pooling,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        dense=arguments.dense,
        slide_reader=arguments.slide_reader,
    )
    model = load_backbone(arguments.weights, device=device)
    extractor = Extractor(model, arguments.model_name, weights_digest(arguments.weights), settings, device)
    logging.info("model %s on %s, rows of %d numbers", arguments.model_name, device, extractor.feature_dim)
    extract_slides(extractor, jobs, keep_finished=arguments.keep_finished, attempts=numbered_attempts(arguments))


def numbered_attempts(arguments: argparse.Namespace) -> list[Attempt]:
    """How errors of each slide are taken, and where they are written down."""
    numbers = arguments.attempt or [0] * len(arguments.output)
    if len(numbers) != len(arguments.output):
        raise ConfigError(f"{len(arguments.output)} --output and {len(numbers)} --attempt: give as many of each")
    attempts = []
    for slide, output, number in zip(arguments.slide, arguments.output, numbers, strict=True):
        record = arguments.skip_records / f"{output.stem}.json" if arguments.skip_records else None
        stage = f"features_{arguments.model_name}"
        attempts.append(Attempt(slide, output.stem, stage, arguments.on_error, number, record))
    return attempts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="teacher.pth, a published file, or a model's or run's folder")
    add("--model-name", required=True, help="stored in the files, e.g. gram")
    add("--slide", nargs="+", type=Path, required=True, help="slides")
    add("--tiles", nargs="+", type=Path, required=True, help="their tile manifests (.parquet), in the same order")
    add("--output", nargs="+", type=Path, required=True, help="feature files (.h5) to write, in the same order")
    add("--pooling", choices=("cls", "mean", "cls+mean", "cls+storage"), default="cls", help="tokens that make a row")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored features")
    add("--batch-size", type=positive, default=64, help="tiles a forward pass")
    add("--workers", type=int, default=2, help="threads that read tiles ahead; 0 reads and embeds in turns")
    add("--dense", action="store_true", help="also store the features of every patch (large: h·w rows a tile)")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: a slide that cannot be read gets no rows")
    add("--skip-records", type=Path, metavar="DIR", help="where to write why slides were skipped")
    add("--attempt", nargs="+", type=int, help="number of this attempt, one a slide, for the records")
    add("--keep-finished", action="store_true", help="leave outputs alone that already hold the same")
    return parser.parse_args()


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def zip_jobs(slides: list[Path], tiles: list[Path], outputs: list[Path]) -> list[tuple[Path, Path, Path]]:
    """One (slide, tiles, output) a slide."""
    if not len(slides) == len(tiles) == len(outputs):
        raise ConfigError(
            f"{len(slides)} --slide, {len(tiles)} --tiles and {len(outputs)} --output: give as many of each"
        )
    return list(zip(slides, tiles, outputs, strict=True))


if __name__ == "__main__":
    run_script(main)
