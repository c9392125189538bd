"""The page of the slide viewer, which finds its data in files beside it.

VIEWER/index.html                    the page: styles, program, names of slides and models
VIEWER/slides/SLIDE/pyramid.js       and tiles/: the slide's picture (pyramid.py)
VIEWER/models/MODEL/sample.js        tiles that neighbours are looked for among (neighbours.py)
VIEWER/models/MODEL/slides/SLIDE.js  a model's tiles on a slide (tiles.py)

The folder works wherever it is copied to. It names slides by slide_id alone and holds no paths.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import dinoscope
from dinoscope.errors import ConfigError
from dinoscope.files import write_text
from dinoscope.visualize.pca import load_basis, rounding_note
from dinoscope.visualize.viewer.scripts import as_json

__all__ = ["PROGRAM", "write_page"]

# in the order in which the page needs them
PROGRAM = ("data.js", "camera.js", "slide.js", "overlay.js", "minimap.js", "panel.js", "controls.js", "app.js")


def write_page(
    output: str | os.PathLike[str],
    slides: Sequence[str],
    bases: Mapping[str, str | os.PathLike[str]],
    *,
    report: str | None = None,
) -> None:
    """Writes the page for the slides and models whose data lie beside it.

    A slide is shown without the overlay of a model that has no data of it.

    Args:
        output: VIEWER/index.html.
        slides: Names of slides, in the order in which they are listed.
        bases: Folder of the PCA basis of each model, in the order in which they are listed.
        report: Address of the report as seen from the page, for a link to it.

    Raises:
        ConfigError: A slide has no picture there.
        FeaturesError: A basis is missing or damaged.
    """
    viewer = Path(output).parent
    for slide_id in slides:
        if not (viewer / "slides" / slide_id / "pyramid.js").is_file():
            raise ConfigError(f"{viewer} has no pyramid of slide {slide_id!r}: run build_viewer.py pyramid on it first")
    contents = {
        "slides": [[slide_id, _models_of(viewer, slide_id, bases)] for slide_id in slides],
        "models": [_model(model, folder, viewer) for model, folder in bases.items()],
    }
    assets = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    program = "\n".join((assets / name).read_text(encoding="utf-8") for name in PROGRAM)
    html = environment.get_template("viewer.html.j2").render(
        contents=Markup(as_json(contents)),
        style=Markup((assets / "viewer.css").read_text(encoding="utf-8")),
        program=Markup(program),
        report=report,
        version=dinoscope.__version__,
    )
    write_text(output, html)


def _models_of(viewer: Path, slide_id: str, models: Mapping[str, Any]) -> list[int]:
    """Numbers of the models that have data of a slide."""
    return [
        number
        for number, model in enumerate(models)
        if (viewer / "models" / model / "slides" / f"{slide_id}.js").is_file()
    ]


def _model(model: str, folder: str | os.PathLike[str], viewer: Path) -> dict[str, Any]:
    info = load_basis(folder).info
    return {
        "name": model,
        "explained": info["explained_variance_ratio"][:3],
        "explained_by_top_3": info["explained_by_top_3"],
        "note": rounding_note(info),
        "has_sample": (viewer / "models" / model / "sample.js").is_file(),
    }
