"""Draws docs/images/rulegraph.png: the workflow's rules, each below what it needs. Needs no graphviz.

    snakemake --rulegraph | python docs/draw_rulegraph.py docs/images/rulegraph.png

Reads Snakemake's graph on standard input. Edges that longer ways stand for anyhow are left out, and so is `all`.
"""

import argparse
import re
import sys
from pathlib import Path

import matplotlib as mpl
import networkx as nx

mpl.use("Agg")
import matplotlib.pyplot as plt

# name of a colour's stages, their rules, their colour (Okabe and Ito)
STAGES = {
    "slides": ("#56B4E9", ("demo", "inspect", "slide", "split", "tile", "merge", "pack")),
    "training": ("#E69F00", ("initial", "train", "convert", "plot")),
    "features": ("#009E73", ("extract", "list_features", "export")),
    "pictures": ("#CC79A7", ("pca", "cluster", "report")),
    "viewer": ("#F0E442", ("viewer", "list_sampled")),
}
_HALF_BOX = 0.22  # edges go from the lower side of a box to the upper side of another


def read_graph(text: str) -> nx.DiGraph:
    """Rule -> rules that need it."""
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', text))
    graph = nx.DiGraph()
    graph.add_nodes_from(names.values())
    graph.add_edges_from((names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", text) if a != b)
    graph.remove_nodes_from([name for name in ("all",) if name in graph])
    return nx.transitive_reduction(graph)


def places(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """A row for each longest way from the slides; within a row rules stand near what they are connected with."""
    rows = [sorted(row) for row in nx.topological_generations(graph)]
    centre: dict[str, float] = {}
    for _ in range(8):
        for row in (*rows, *reversed(rows)):
            wanted = {name: _mean(centre, [*graph.predecessors(name), *graph.successors(name)]) for name in row}
            row.sort(key=lambda name: (wanted[name], name))
            centre |= {name: index - (len(row) - 1) / 2 for index, name in enumerate(row)}
    return {name: (centre[name], -depth) for depth, row in enumerate(rows) for name in row}


def _mean(centre: dict[str, float], names: list[str]) -> float:
    known = [centre[name] for name in names if name in centre]
    return sum(known) / len(known) if known else 0.0


def colour(rule: str) -> str:
    """Of the stage that a rule belongs to."""
    return next((shade for shade, starts in STAGES.values() if rule.startswith(starts)), "#BBBBBB")


def draw(graph: nx.DiGraph, output: Path) -> None:
    """Writes the picture; its format is that of the name."""
    spots = places(graph)
    figure, axes = plt.subplots(figsize=(9, 8))
    for before, after in graph.edges:
        (x0, y0), (x1, y1) = spots[before], spots[after]
        bend = 0.0 if y0 - y1 <= 1 else 0.18 * (1 if x1 >= x0 else -1)
        style = {"arrowstyle": "-|>", "color": "#777777", "shrinkA": 0, "shrinkB": 0, "lw": 1.1}
        style["connectionstyle"] = f"arc3,rad={bend}"
        axes.annotate("", (x1, y1 + _HALF_BOX), (x0, y0 - _HALF_BOX), arrowprops=style, zorder=1)
    for rule, (x, y) in spots.items():
        box = {"boxstyle": "round,pad=0.35", "fc": colour(rule), "ec": "#333333", "lw": 0.8}
        axes.text(x, y, rule.replace("_", " "), ha="center", va="center", fontsize=8.5, bbox=box, zorder=2)
    for stage, (shade, _) in STAGES.items():
        axes.scatter([], [], marker="s", s=90, color=shade, edgecolor="#333333", label=stage)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    axes.set_axis_off()
    across, down = zip(*spots.values(), strict=True)
    axes.set(xlim=(min(across) - 0.6, max(across) + 0.6), ylim=(min(down) - 0.5, max(down) + 0.5))
    figure.savefig(output, dpi=100, bbox_inches="tight", facecolor="white")


def main() -> None:
    """Reads standard input and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write (.png or .svg)")
    arguments = parser.parse_args()
    graph = read_graph(sys.stdin.read())
    if not graph:
        sys.exit("error: standard input has no graph; give what snakemake --rulegraph prints")
    draw(graph, arguments.output)


if __name__ == "__main__":
    main()
