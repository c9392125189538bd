"""Features of tiles by one model, one HDF5 file a slide (TRIDENT's layout).

    python workflow_scripts/extract_features.py --weights results/models/gram/teacher.pth --model-name gram \\
        --slide slides/A.svs --tiles results/tiles/features/A.parquet --output results/features/gram/A.h5

Several slides: give as many of --slide, --tiles and --output each; the weights load once. Long lists can stand in a
file, one word a line: @list.txt. Takes a GPU when there is one (then in bf16), else the CPU (in float32); of several
GPUs one that no other extraction has taken.

Other encoders: --weights takes a Hugging Face folder (ViT, DeiT, DINOv2, DINOv2 with registers, DINOv3), a timm
folder, a timm file with --architecture, or a function of your own that returns a torch module: my_encoders.py:uni.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.features.sharing import (
    MINUTES_FOR_OTHERS,
    MadeWith,
    SharedSlide,
    cards_beside,
    extract_shared,
    read_wanted,
)
from dinoscope.slides.skipping import Attempt
from dinoscope.user_code import function_file, is_function_name

if TYPE_CHECKING:
    from dinoscope.features.extract import Extractor


def main() -> None:
    """Extracts the features of the given slides."""
    arguments = parse_arguments()
    jobs = zip_jobs(arguments.slide, arguments.tiles, arguments.output)
    attempts = numbered_attempts(arguments)
    if arguments.slides_per_job is None:
        # here, so that --help and mistakes in the arguments need not wait for torch
        from dinoscope.features.extract import extract_slides

        extract_slides(load_extractor(arguments), jobs, keep_finished=arguments.keep_finished, attempts=attempts)
        return
    if len(jobs) != 1:
        raise ConfigError(f"--slides-per-job is for the jobs of a workflow, which name one slide each, not {len(jobs)}")
    own = SharedSlide(*jobs[0])
    others = read_wanted(arguments.wanted, own)
    extract_shared(
        own,
        others,
        made_with(arguments),
        lambda: load_extractor(arguments),
        attempts[0],
        at_most=arguments.slides_per_job,
        minutes=arguments.minutes,
    )


def load_extractor(arguments: argparse.Namespace) -> "Extractor":
    """The encoder on its device, ready for slides."""
    from dinoscope.features.encoders import load_encoder
    from dinoscope.features.extract import Extractor, ExtractSettings, choose_device

    device = choose_device(arguments.device)
    settings = ExtractSettings(
        pooling=arguments.pooling,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        dense=arguments.dense,
        slide_reader=arguments.slide_reader,
        precision=arguments.precision,
        compile=arguments.compile,
    )
    encoder = load_encoder(
        arguments.weights,
        architecture=arguments.architecture,
        device=device,
        files=arguments.encoder_files,
        version=arguments.encoder_version,
    )
    extractor = Extractor(encoder.model, arguments.model_name, encoder.sha256, settings, device)
    extractor.embedder.prepare()
    logging.info(
        "model %s (%s) on %s in %s, rows of %d numbers",
        arguments.model_name,
        encoder.kind,
        device,
        str(extractor.embedder.dtype).removeprefix("torch."),
        extractor.feature_dim,
    )
    return extractor


def made_with(arguments: argparse.Namespace) -> MadeWith:
    """What decides whether features that are finished can be taken over."""
    names = ("weights", "architecture", "encoder_version", "model_name", "pooling", "dtype", "dense", "precision")
    settings = {name: getattr(arguments, name) for name in (*names, "slide_reader")}
    source = Path(arguments.weights)
    if is_function_name(arguments.weights) and not source.exists():
        source = function_file(arguments.weights)
    files = [source, *cards_beside(source)] if source else []
    return MadeWith.of([*arguments.encoder_files, *files], **settings)


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
    add("--weights", required=True, help="teacher.pth, a published file, a model's or run's folder, or another encoder")
    add("--architecture", help="timm's name of the model, where --weights is a timm checkpoint without a config.json")
    add("--encoder-files", nargs="+", type=Path, default=[], help="further files that a function of your own reads")
    add("--encoder-version", default="", help="anything; features that were made with another one are not taken over")
    add("--model-name", required=True, help="stored in the files, e.g. gram")
    add("--slide", nargs="+", type=Path, required=True, help="slides")
    add("--tiles", nargs="+", type=Path, required=True, help="their tile manifests (.parquet), in the same order")
    add("--output", nargs="+", type=Path, required=True, help="feature files (.h5) to write, in the same order")
    add("--pooling", choices=("cls", "mean", "cls+mean", "cls+storage"), default="cls", help="tokens that make a row")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored features")
    add("--batch-size", type=positive, default=64, help="tiles a forward pass")
    add("--workers", type=not_negative, default=2, help="threads that read tiles ahead; 0 reads and embeds in turns")
    add("--dense", action="store_true", help="also store the features of every patch (large: h·w rows a tile)")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on GPUs that have it",
    )
    add("--compile", action="store_true", help="compile the forward pass (a minute; pays on large slides)")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: a slide that cannot be read gets no rows")
    add("--skip-records", type=Path, metavar="DIR", help="where to write why slides were skipped")
    add("--attempt", nargs="+", type=int, help="number of this attempt, one a slide, for the records")
    add("--keep-finished", action="store_true", help="leave outputs alone that already hold the same")
    add("--slides-per-job", type=positive, metavar="N", help="of a workflow: go on with up to N - 1 slides of --wanted")
    add("--wanted", type=Path, metavar="F.json", help="slides whose features are wanted as well")
    add("--minutes", type=float, default=MINUTES_FOR_OTHERS, metavar="M", help="begin none of these later than that")
    return parser.parse_args()


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is not at least 0")
    return value


def zip_jobs(slides: list[Path], tiles: list[Path], outputs: list[Path]) -> list[tuple[Path, Path, Path]]:
    """One (slide, tiles, output) a slide."""
    if not len(slides) == len(tiles) == len(outputs):
        raise ConfigError(
            f"{len(slides)} --slide, {len(tiles)} --tiles and {len(outputs)} --output: give as many of each"
        )
    seen = set()
    for output in outputs:
        if (place := output.resolve()) in seen:
            raise ConfigError(f"--output {output} is given twice; one slide would replace the other: give each its own")
        seen.add(place)
    return list(zip(slides, tiles, outputs, strict=True))


if __name__ == "__main__":
    run_script(main)
