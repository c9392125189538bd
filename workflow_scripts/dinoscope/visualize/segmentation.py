"""What the report shows of segmentation: the comparison table, and examples of each of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscope.segment.tables import read_table

__all__ = ["Segmented", "collect_segmentation"]

_SHOWN = 12  # pages of pictures


@dataclass(frozen=True)
class Segmented:
    """A row of the comparison table, in words, and the page of its examples, if it is shown."""

    cells: dict[str, str]
    page: Path | None

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.cells['task']}: {self.cells['pretraining']}, {self.cells['finetuned_components']}"

    def percent(self, name: str) -> str:
        """A share and, of several seeds, its range."""
        if not self.cells[name]:
            return "–"
        shown = f"{100 * float(self.cells[name]):.1f} %"
        low, high = (self.cells.get(f"{name}_{end}") for end in ("lowest", "highest"))
        if int(self.cells["seeds"]) < 2 or not low:
            return shown
        return f"{shown} ({100 * float(low):.1f}–{100 * float(high):.1f})"

    def count(self, name: str) -> str:
        """A number of parameters."""
        number = int(self.cells[name])
        return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def collect_segmentation(results: Path, tasks: Sequence[str] | None) -> list[Segmented]:
    """Rows of the tasks that are there, the first ones with pictures.

    Args:
        results: The results folder.
        tasks: Names of tasks; None: all that were compared.
    """
    table = results / "segmentation" / "comparison.tsv"
    if not table.is_file():
        return []
    found = []
    for cells in read_table(table):
        if tasks is None or cells["task"] in tasks:
            page = results / "segmentation" / cells["file"] / "examples.png"
            found.append(Segmented(cells, page if page.is_file() and len(found) < _SHOWN else None))
    return found
