"""What models see inside a region of a slide: PCA of its patches side by side, and how alike patches are.

    python workflow_scripts/pca_regions.py --slide slides/A.svs --slide-id A --region 12000 8000 1024 0.5 \\
        --model base=results/models/base/teacher.pth gram=results/models/gram/teacher.pth \\
        --thumbnail results/slides/A.jpg --output A_pca.png --similarity A_similarity.png

With --tiles results/tiles/features/A.parquet in place of --region the place with most tissue is taken. Every model has
one colour space for the region; the order and signs of its components are those that agree best with the first model's.
"""

import argparse
import logging
from pathlib import Path

from PIL import Image

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError, FeaturesError, SlideError
from dinoscope.files import atomic_path
from dinoscope.slides.manifest import read_metadata
from dinoscope.slides.reader import Slide
from dinoscope.visualize.color_basis import BACKGROUNDS
from dinoscope.visualize.overview import placeholder
from dinoscope.visualize.pca_map import read_thumbnail
from dinoscope.visualize.regions import Region, distinct_places, most_tissue, read_region, with_box
from dinoscope.visualize.upsampling import load_upsampler


def main() -> None:
    """Draws both pictures."""
    arguments = parse_arguments()
    upsampler = load_upsampler(arguments.upsample) or (arguments.upsample if arguments.upsample == "jbu" else None)
    try:
        region = chosen_region(arguments)
        if region is None:
            was_skipped = "error" in read_metadata(arguments.tiles)
            words = "this slide cannot be read" if was_skipped else "no tissue was found on this slide"
            write_placeholders(arguments, words)
            return
        draw(arguments, region, upsampler)
    except SlideError as error:
        if arguments.on_error == "fail":
            raise
        logging.warning("warning: %s", error)
        write_placeholders(arguments, "this slide cannot be read")


def chosen_region(arguments: argparse.Namespace) -> Region | None:
    """The region that was named, or the one with most tissue; None on a slide without tissue."""
    if (arguments.region is None) == (arguments.tiles is None):
        raise ConfigError("give either --region X Y SIZE MPP or --tiles X.parquet, to say where to look")
    if arguments.region is None:
        return most_tissue(arguments.tiles, arguments.size_px, arguments.mpp, arguments.seed)
    try:
        x, y, size_px = (int(value) for value in arguments.region[:3])
        mpp = float(arguments.region[3])
    except ValueError:
        mpp = size_px = 0
    if not (size_px > 0 and 0 < mpp < float("inf")):
        raise ConfigError(
            f"--region {' '.join(arguments.region)} is no place: X and Y are whole level-0 pixels, SIZE is a number of "
            "px, MPP micrometres a pixel, both above 0, such as 12000 8000 1024 0.5"
        )
    return Region(x, y, size_px, mpp)


def draw(arguments: argparse.Namespace, region: Region, upsampler: object) -> None:
    """Reads the region and draws what the models see in it."""
    with Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide:
        image, side = read_region(slide, region)
        overview = None
        if arguments.thumbnail is not None:
            overview = with_box(read_thumbnail(arguments.thumbnail), slide, region, side)
    slide_id = arguments.slide_id or arguments.slide.stem
    places = places_inside(arguments.points or [], region, side, slide_id) or distinct_places(image)

    # here, so that --help and mistakes in the arguments need not wait for torch
    from dinoscope.visualize.patch_pages import draw_patch_colors, draw_similarity, see
    from dinoscope.visualize.patches import load_patch_encoder

    seen = []
    for name, source in arguments.model:
        encoder = load_patch_encoder(name, source, arguments.device, dict(arguments.architecture).get(name))
        if not encoder.gives_patches:
            logging.warning("warning: model %s gives no features of patches and is left out", name)
            continue
        seen.append(see(encoder, [image], reference=seen[0] if seen else None, background=arguments.background))
    if not seen:
        raise FeaturesError("none of the models gives features of patches, so there is nothing to show inside")
    about = {"title": f"{slide_id}, x {region.x}, y {region.y}", "um_per_px": region.mpp}
    draw_patch_colors(
        arguments.output,
        image,
        seen,
        subtitle="PCA of patch features, one colour space a model; order and signs of components as agrees best with "
        f"{seen[0].name}",
        upsampler=upsampler,
        overview=overview,
        **about,
    )
    if arguments.similarity is not None:
        subtitle = "Cosine of the features of every patch with those of the patch in the green ring"
        draw_similarity(arguments.similarity, image, seen, places, subtitle=subtitle, **about)


def places_inside(points: list[list[int]], region: Region, side: int, slide_id: str) -> list[tuple[float, float]]:
    """Points as fractions of the region."""
    for x, y in points:
        if not (region.x <= x < region.x + side and region.y <= y < region.y + side):
            raise ConfigError(
                f"point ({x}, {y}) of slide {slide_id!r} is not in the region from ({region.x}, {region.y}), which is "
                f"{side} level-0 pixels wide; name patches inside"
            )
    return [((x - region.x) / side, (y - region.y) / side) for x, y in points]


def write_placeholders(arguments: argparse.Namespace, words: str) -> None:
    """Pictures that say why there is nothing to see."""
    for output in (arguments.output, arguments.similarity):
        if output is not None:
            with atomic_path(output) as temporary:
                Image.fromarray(placeholder(words)).save(temporary, format="PNG")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--slide", type=Path, required=True, help="the slide")
    add("--slide-id", help="its name in titles; the file's when not given")
    add("--slide-mpp", type=float, help="micrometres a level-0 pixel, in place of what the file says")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--model", nargs="+", type=named, required=True, metavar="NAME=SOURCE", help="models, from left to right: "
        "files, folders or module:function")  # fmt: skip
    add("--architecture", nargs="*", type=named, default=[], metavar="NAME=ARCH", help="timm's name of a model, for a "
        "timm checkpoint that does not tell it")  # fmt: skip
    add("--region", nargs=4, metavar=("X", "Y", "SIZE", "MPP"), help="level-0 pixels, px, micrometres a pixel")
    add("--tiles", type=Path, help="tile manifest of the slide (.parquet): the region with most tissue is taken")
    add("--size-px", type=int, default=1024, help="side of a region chosen by --tiles, px")
    add("--mpp", type=float, help="micrometres a pixel of a region chosen by --tiles; that of the tiles when not given")
    add("--seed", type=int, default=0, help="of the choice among places with nearly as much tissue")
    add("--point", dest="points", nargs=2, type=int, action="append", metavar=("X", "Y"), help="patch to compare with,"
        " level-0 pixels; may be repeated; three that look unlike when not given")  # fmt: skip
    add("--upsample", default="jbu", metavar="jbu|none|MODULE:CALLABLE", help="how features are brought to pixels")
    add("--background", choices=BACKGROUNDS, default="keep", help="leave out a side of the first component")
    add("--thumbnail", type=Path, help="picture of the whole slide")
    add("--device", default="auto", help="auto, cpu, cuda:1 …")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: a slide that cannot be read is said to be")
    add("--output", type=Path, required=True, help="the PNG of colours to write")
    add("--similarity", type=Path, help="the PNG of similarities to write")
    return parser.parse_args()


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE as a pair."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} does not read NAME=VALUE")
    return name, file


if __name__ == "__main__":
    run_script(main)
