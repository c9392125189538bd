"""Pictures of clusters: maps of a slide by several models, and a contact sheet of example tiles."""

import os
from collections.abc import Sequence

import numpy as np

from dinoscope.features.writers import FeatureFile
from dinoscope.visualize.clusters import PALETTE, Clusters
from dinoscope.visualize.page import FOOTER_PX, HEADER_PX, MARGIN_PX, Page, Panel, fitted, save_panels
from dinoscope.visualize.pca_map import MapPainter
from dinoscope.visualize.side_by_side import PANEL_PX, check_same_slide, in_rows, tiles_of_all

__all__ = ["draw_cluster_maps", "draw_examples"]

EXAMPLE_PX, LABEL_PX, SHEET_GAP_PX = 176, 250, 8


def draw_cluster_maps(
    output: str | os.PathLike[str],
    models: Sequence[tuple[FeatureFile, np.ndarray, Clusters]],
    thumbnail: np.ndarray,
    *,
    slide_name: str | None = None,
) -> None:
    """Saves the slide and its tiles in the colours of their clusters, by every model, in one PNG.

    Args:
        output: The PNG.
        models: Features, labels and clusters of each model, from left to right.
        thumbnail: The whole slide, (h, w, 3) uint8.
        slide_name: For the title; the slide's id when not given.

    Raises:
        FeaturesError: The files are of different slides.
    """
    painter = MapPainter(thumbnail, PANEL_PX)
    files = [file for file, _, _ in models]
    file, tiles = check_same_slide(files), tiles_of_all(files)
    panels = [Panel(painter.canvas, "slide", "it was skipped" if painter.is_skipped(file.info) else " ")]
    for each, labels, clusters in models:
        found = len(np.unique(labels[labels >= 0]))
        about = f"{found} of {len(clusters.centres)} clusters are here" if len(labels) else "no tiles"
        panels.append(Panel(painter.tiles(each, PALETTE[labels], labels >= 0), each.info.model, about))
    most = max(len(clusters.centres) for _, _, clusters in models)
    save_panels(
        output,
        in_rows(panels),
        title=slide_name or file.info.slide_id,
        subtitle=f"Clusters of the features of {tiles}; equal numbers of different models mean nothing",
        key=[(_hex(PALETTE[n]), f"cluster {n + 1}" if n == 0 else str(n + 1)) for n in range(most)],
        um_per_px=painter.um_per_px(file.info),
    )


def draw_examples(
    output: str | os.PathLike[str], clusters: Clusters, examples: Sequence[Sequence[tuple[np.ndarray, str]]], um: float
) -> None:
    """Saves a contact sheet: a row a cluster, tiles nearest to its centre from left to right.

    Args:
        output: The PNG.
        clusters: The clusters.
        examples: Of `read_examples`.
        um: Side of a tile in micrometres.
    """
    columns = max(len(row) for row in examples)
    step = EXAMPLE_PX + SHEET_GAP_PX
    width = max(2 * MARGIN_PX + LABEL_PX + columns * step - SHEET_GAP_PX, 1000)
    page = Page(width, HEADER_PX + len(examples) * step + FOOTER_PX - SHEET_GAP_PX)
    info, room = clusters.info, width - 2 * MARGIN_PX
    page.text(MARGIN_PX, 34, f"Clusters of model {info['model']}", 13, room, weight="bold")
    about = (
        f"k-means on the principal components of {info['num_tiles_fitted']:,} tiles; the tiles nearest to each centre, "
        "from as many of their slides as there are"
    )
    page.text(MARGIN_PX, 72, about, 9.5, room, color="#444444")
    for number, (kind, row) in enumerate(zip(info["clusters"], examples, strict=True)):
        top = HEADER_PX + number * step
        page.rectangle(MARGIN_PX, top, 14, EXAMPLE_PX, _hex(kind["color"]))
        share = 100 * kind["num_tiles_fitted"] / info["num_tiles_fitted"]
        slides = f"{kind['num_slides']} slide" + ("" if kind["num_slides"] == 1 else "s")
        page.text(MARGIN_PX + 28, top + 60, kind["name"], 11, LABEL_PX - 40, weight="bold")
        page.text(MARGIN_PX + 28, top + 90, f"{share:.0f} % of these tiles", 9, LABEL_PX - 40, color="#444444")
        page.text(MARGIN_PX + 28, top + 114, f"on {slides}", 9, LABEL_PX - 40, color="#444444")
        for column, (pixels, _) in enumerate(row):
            page.picture(MARGIN_PX + LABEL_PX + column * step, top, fitted(pixels, EXAMPLE_PX))
    page.scale_bar(um / EXAMPLE_PX, 5 * EXAMPLE_PX // 2, page.height - FOOTER_PX / 2)
    page.save(output)


def _hex(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
