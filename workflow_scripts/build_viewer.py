"""A slide viewer that opens from disk in a browser: slides to zoom into, models' colours on them, nearest tiles.

    build=workflow_scripts/build_viewer.py
    python $build pyramid --slide slides/A.svs --slide-id A --output results/viewer/slides/A/pyramid.js
    python $build sample --features results/features/gram --output results/neighbours/gram.npz \\
        --script results/viewer/models/gram/sample.js
    python $build tiles --features results/features/gram/A.h5 --basis results/pca/gram \\
        --sample results/neighbours/gram.npz --output results/viewer/models/gram/slides/A.js
    python $build page --pyramids results/viewer/slides/*/pyramid.js --models gram --bases results/pca/gram \\
        --output results/viewer/index.html

The folder results/viewer can be copied anywhere; open its index.html.
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.file_lists import files_among
from dinoscope.slides.privacy import without_file_name


def main() -> None:
    """Does one of the four steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.epilog = "sample and page: @FILE reads arguments from a file, one a line."
    commands = parser.add_subparsers(required=True)
    # no @FILE where an argument may be a slide's name, which may begin with @
    for name, what, prefix, add_arguments, run in (
        ("pyramid", "picture of a slide, as JPEG tiles", None, add_pyramid_arguments, run_pyramid),
        ("sample", "tiles of a model that neighbours are looked for among", "@", add_sample_arguments, run_sample),
        ("tiles", "colours, clusters and neighbours of a slide's tiles", None, add_tiles_arguments, run_tiles),
        ("page", "the page itself", "@", add_page_arguments, run_page),
    ):
        command = commands.add_parser(
            name, help=what, description=what, formatter_class=HelpFormatter, fromfile_prefix_chars=prefix
        )
        add_arguments(command)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


def add_pyramid_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `pyramid`."""
    add = parser.add_argument
    add("--slide", type=Path, required=True, help="file, or folder of a DICOM series")
    add("--slide-id", required=True, metavar="ID", help="name of the slide in all results")
    add("--slide-mpp", type=float, metavar="M", help="micrometres a level-0 pixel; what the file says when not given")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--mpp", type=float, default=2.0, help="micrometres a pixel of the finest tiles; disk use goes with 1/mpp²")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: write down why a slide cannot be read")
    add("--output", type=Path, required=True, metavar="SLIDE/pyramid.js", help="file to write, beside its tiles/")


def run_pyramid(arguments: argparse.Namespace) -> None:
    """Writes the picture of a slide."""
    from dinoscope.slides.reader import Slide
    from dinoscope.slides.skipping import failure_of
    from dinoscope.visualize.viewer.pyramid import write_placeholder, write_pyramid

    def work() -> None:
        with Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide:
            write_pyramid(slide, arguments.output, arguments.mpp)

    if arguments.on_error == "fail":
        work()
    elif (reason := failure_of(work)) is not None:
        problem = without_file_name(reason, arguments.slide, arguments.slide_id)
        logging.warning("slide %r is shown without its picture: %s", arguments.slide_id, problem)
        write_placeholder(arguments.output, arguments.slide_id, problem)


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sample`."""
    add = parser.add_argument
    add("--features", nargs="+", type=Path, required=True, help="feature files (.h5) of one model, or a folder of them")
    add("--max-tiles", type=int, default=50_000, help="tiles in all, as equal as possible a slide; at most 50,000")
    add("--seed", type=int, default=0, help="of the draw, when there are more")
    add("--output", type=Path, required=True, metavar="MODEL.npz", help="file to write, with MODEL.json beside it")
    add("--script", type=Path, required=True, metavar="sample.js", help="where the sample's tiles lie, for the page")


def run_sample(arguments: argparse.Namespace) -> None:
    """Draws and writes a sample."""
    from dinoscope.visualize.viewer.neighbours import draw_sample, save_sample
    from dinoscope.visualize.viewer.tiles import write_sample_script

    files = files_among(arguments.features, ".h5")
    sample = draw_sample(files, seed=arguments.seed, max_tiles=arguments.max_tiles)
    write_sample_script(arguments.script, sample)
    save_sample(sample, arguments.output)
    total = int(sample.counts.sum())
    logging.info("model %s: %d of %d tiles of %d slides", sample.kind["model"], len(sample.slide), total, len(files))


def add_tiles_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `tiles`."""
    add = parser.add_argument
    add("--features", type=Path, required=True, help="feature file (.h5) of the slide")
    add("--basis", type=Path, required=True, help="folder that `pca.py fit` wrote for the model")
    add("--sample", type=Path, required=True, metavar="MODEL.npz", help="file that `sample` wrote for the model")
    add("--neighbours", type=int, default=6, help="nearest tiles shown of each tile")
    add("--clusters", type=Path, metavar="SLIDE.npz", help="labels, one integer a tile, -1 for none")
    add("--cluster-legend", type=Path, metavar="F.json", help="colors ('#rrggbb') and names of the clusters")
    add("--output", type=Path, required=True, metavar="MODEL/slides/SLIDE.js", help="file to write")


def run_tiles(arguments: argparse.Namespace) -> None:
    """Writes what the page shows of a model on a slide."""
    from dinoscope.features.writers import read_features
    from dinoscope.visualize.pca import load_basis
    from dinoscope.visualize.viewer.clusters import read_clusters
    from dinoscope.visualize.viewer.neighbours import load_sample
    from dinoscope.visualize.viewer.tiles import write_tiles_script

    if (arguments.clusters is None) != (arguments.cluster_legend is None):
        raise ConfigError("--clusters and --cluster-legend go together: give both, or neither")
    file, basis, sample = read_features(arguments.features), load_basis(arguments.basis), load_sample(arguments.sample)
    basis.check_fits(file.info, arguments.features)
    sample.check_fits(file.info, arguments.features)
    clusters = None
    if arguments.clusters is not None:
        legend, name = arguments.cluster_legend, file.info.slide_id
        clusters = read_clusters(arguments.clusters, legend, name, len(file.coords))
    number = arguments.neighbours
    write_tiles_script(arguments.output, file, basis, sample, num_neighbours=number, clusters=clusters)


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `page`."""
    add = parser.add_argument
    add("--pyramids", nargs="+", type=Path, required=True, help="what `pyramid` wrote, in the order of the page's list")
    add("--models", nargs="*", default=[], help="models, in the order in which they are listed")
    add("--bases", nargs="*", type=Path, default=[], help="folder of each model's PCA basis, in the same order")
    add("--report", help="address of the report as seen from the page")
    add("--output", type=Path, required=True, metavar="index.html", help="file to write, beside slides/ and models/")


def run_page(arguments: argparse.Namespace) -> None:
    """Writes the page."""
    from dinoscope.visualize.viewer.page import write_page

    if len(arguments.models) != len(arguments.bases):
        numbers = f"{len(arguments.models)} --models and {len(arguments.bases)} --bases"
        raise ConfigError(f"{numbers}: give as many of each")
    bases = dict(zip(arguments.models, arguments.bases, strict=True))
    write_page(arguments.output, [path.parent.name for path in arguments.pyramids], bases, report=arguments.report)


if __name__ == "__main__":
    run_script(main)
