"""Kinds of tiles: k-means on the principal components of their features.

Finds the kinds of one model, draws a slide by several models (and writes what QuPath reads), and shows examples:
    python workflow_scripts/clusters.py fit --features results/features/gram --basis results/pca/gram \\
        --clusters results/clusters/gram
    python workflow_scripts/clusters.py map --features results/features/base/A.h5 results/features/gram/A.h5 \\
        --basis results/pca/base results/pca/gram --clusters results/clusters/base results/clusters/gram \\
        --thumbnail results/slides/A.jpg --output A.png --geojson base.geojson gram.geojson
    python workflow_scripts/clusters.py examples --clusters results/clusters/gram --slides config/slides.tsv \\
        --tiles results/tiles/features --output examples.png
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.features.writers import read_features
from dinoscope.file_lists import files_among
from dinoscope.visualize.cluster_pages import draw_cluster_maps, draw_examples
from dinoscope.visualize.clusters import (
    MAX_CLUSTERS,
    fit_clusters,
    load_clusters,
    save_clusters,
    write_geojson,
    write_labels,
)
from dinoscope.visualize.pca import MAX_TILES, load_basis
from dinoscope.visualize.pca_map import read_thumbnail


def main() -> None:
    """Finds clusters, draws them, or shows examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    parser.epilog = "@FILE reads arguments from a file, one a line."
    commands = parser.add_subparsers(required=True)
    add_fit(commands.add_parser("fit", help="find the clusters of a model", formatter_class=HelpFormatter))
    add_map(commands.add_parser("map", help="draw the clusters of a slide", formatter_class=HelpFormatter))
    add_examples(commands.add_parser("examples", help="contact sheet of tiles", formatter_class=HelpFormatter))
    arguments = parser.parse_args()
    arguments.run(arguments)


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Options of `fit`."""
    add = parser.add_argument
    add("--features", nargs="+", type=Path, required=True, help="feature files (.h5) of one model, or a folder of them")
    add("--basis", type=Path, required=True, help="folder that `pca.py fit` wrote")
    add("--clusters", type=Path, required=True, help="folder for clusters.json and clusters.npz")
    add("--number", type=number_of_clusters, default=8, help=f"of clusters, 2 to {MAX_CLUSTERS}")
    add("--seed", type=int, default=0, help="of k-means, and of the sample of tiles when there are many")
    add("--max-tiles", type=int, default=MAX_TILES, help="fit on at most so many tiles")
    parser.set_defaults(run=run_fit)


def add_map(parser: argparse.ArgumentParser) -> None:
    """Options of `map`."""
    add = parser.add_argument
    add("--features", nargs="+", type=Path, required=True, help="feature files of the slide, one a model")
    add("--basis", nargs="+", type=Path, required=True, help="a basis folder each, in the same order")
    add("--clusters", nargs="+", type=Path, required=True, help="a folder of clusters each, in the same order")
    add("--thumbnail", type=Path, required=True, help="picture of the whole slide")
    add("--slide-name", help="shown in the title; the slide's id when not given")
    add("--output", type=Path, required=True, help="the PNG to write")
    add("--geojson", nargs="+", type=Path, help="a file each, in the same order: tiles and their clusters, for QuPath")
    add("--labels", nargs="+", type=Path, help="a file (.npz) each, in the same order: number of each tile's cluster")
    parser.set_defaults(run=run_map)


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Options of `examples`."""
    add = parser.add_argument
    add("--clusters", type=Path, required=True, help="folder that `clusters.py fit` wrote")
    add("--slides", required=True, help="where the slides are: table, folder or glob")
    add("--slide-mpp", type=float, help="micrometres a pixel of slides that the table gives none for")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--tiles", type=Path, required=True, help="folder with the tile manifest of each slide, SLIDE.parquet")
    add("--output", type=Path, required=True, help="the PNG to write")
    parser.set_defaults(run=run_examples)


def run_fit(arguments: argparse.Namespace) -> None:
    """Writes clusters.npz and clusters.json."""
    files, basis = files_among(arguments.features, ".h5"), load_basis(arguments.basis)
    clusters = fit_clusters(
        files, basis, num_clusters=arguments.number, seed=arguments.seed, max_tiles=arguments.max_tiles
    )
    save_clusters(clusters, arguments.clusters)
    info = clusters.info
    logging.info(
        "%d clusters of model %s: %d tiles, between clusters lies %.0f %% of the variance",
        *(info["num_clusters"], info["model"], info["num_tiles_fitted"], 100 * info["explained"]),
    )


def run_map(arguments: argparse.Namespace) -> None:
    """Writes the maps of one slide side by side, and GeoJSON."""
    none = [None] * len(arguments.features)
    given = [
        arguments.features,
        arguments.basis,
        arguments.clusters,
        arguments.geojson or none,
        arguments.labels or none,
    ]
    if len({len(files) for files in given}) > 1:
        raise ConfigError("give as many --basis, --clusters, --geojson and --labels as --features, one a model")
    models = []
    for features, folder, kinds, geojson, labels_path in zip(*given, strict=True):
        file, basis, clusters = read_features(features), load_basis(folder), load_clusters(kinds)
        basis.check_fits(file.info, features)
        labels = clusters.assign(file.features, basis)
        models.append((file, labels, clusters))
        if geojson is not None:
            write_geojson(geojson, file, labels, clusters)
        if labels_path is not None:
            write_labels(labels_path, labels)
    thumbnail = read_thumbnail(arguments.thumbnail)
    draw_cluster_maps(arguments.output, models, thumbnail, slide_name=arguments.slide_name)


def run_examples(arguments: argparse.Namespace) -> None:
    """Writes the contact sheet."""
    # here, because the other commands read no slides
    from dinoscope.slides.manifest import read_metadata
    from dinoscope.slides.reader import SlidePool
    from dinoscope.slides.table import read_slide_table
    from dinoscope.visualize.cluster_examples import read_examples

    clusters = load_clusters(arguments.clusters)
    wanted = {example["slide"] for kind in clusters.info["clusters"] for example in kind["examples"]}
    records = [record for record in read_slide_table(arguments.slides) if record.slide_id in wanted]
    if missing := sorted(wanted - {record.slide_id for record in records}):
        raise ConfigError(
            f"{arguments.slides} has no slide {missing[0]}, of which a tile is an example; fit the clusters again"
        )
    mpp = {record.slide_id: record.mpp or arguments.slide_mpp for record in records}
    pool = SlidePool(
        {record.slide_id: record.path for record in records},
        {slide_id: value for slide_id, value in mpp.items() if value},
        reader=arguments.slide_reader,
    )
    tiles = {slide_id: arguments.tiles / f"{slide_id}.parquet" for slide_id in wanted}
    try:
        examples = read_examples(clusters, pool, tiles)
    finally:
        pool.close()
    about = read_metadata(next(iter(tiles.values())))
    draw_examples(arguments.output, clusters, examples, about["tile_px"] * about["requested_mpp"])


def number_of_clusters(text: str) -> int:
    """A number of clusters that there are colours for."""
    if not 2 <= (number := int(text)) <= MAX_CLUSTERS:
        raise argparse.ArgumentTypeError(f"{number} is not between 2 and {MAX_CLUSTERS}")
    return number


if __name__ == "__main__":
    run_script(main)
