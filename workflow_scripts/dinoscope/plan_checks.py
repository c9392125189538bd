"""The checks behind plan.make_plan: each yields one sentence a problem."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscope.data.sources import is_class_name
from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.recipe import flatten, require_weights
from dinoscope.recipe_checks import check_processes
from dinoscope.schema import problems, read_schema, with_defaults

if TYPE_CHECKING:
    from dinoscope.plan import Plan

__all__ = [
    "BASE",
    "TARGETS",
    "base_problems",
    "check_config",
    "file_problems",
    "process_problems",
    "window_problems",
]

BASE = "base"
# Rules of the workflow; a run's name is a target too and must differ from them.
TARGETS = (
    "all", "convert", "demo_slides", "extract_features", "features", "initial_weights", "inspect",
    "inspect_slide", "manifest", "merge_manifest", "pack_index", "pack_slide", "pca", "pca_fit", "pca_map",
    "plot_metrics", "report", "slide_table", "slides_report", "split_slides", "tile_slide", "tiles", "train",
)  # fmt: skip

_CROPS = ("crops.global_crops_size", "crops.local_crops_size", "crops.gram_teacher_crops_size")
_SHOWN_FILES = 3


def check_config(config: Mapping[str, Any], workflow_dir: Path) -> dict[str, Any]:
    """The config with its defaults filled in.

    Raises:
        ConfigError: One sentence for each key that is unknown (with the nearest known one), missing or of a wrong
            value, and for names that refer to nothing.
    """
    schema = read_schema(workflow_dir / "config" / "schemas" / "config.schema.yaml")
    checked = with_defaults(dict(config), schema)
    found = [f"config: {problem}" for problem in problems(checked, schema)]
    if not found:
        found = [f"config: {problem}" for problem in _reference_problems(checked)]
    if found:
        raise ConfigError("\n".join(found))
    return checked


def base_problems(plan: "Plan") -> Iterator[str]:
    """Starting weights that are missing, or other than the first run's; there is one set a workflow."""
    first = plan.base_run
    for run in plan.runs.values():
        if run.continues is not None:
            continue
        try:
            require_weights(run.recipe, run.settings)
        except ConfigError as error:
            yield f"runs.{run.name}: {error}"
        differing = [key for key, value in run.start.items() if value != first.start[key]]
        if differing:
            key = differing[0]
            yield (
                f"runs.{run.name} starts from other weights than runs.{first.name} ({key} is {run.start[key]!r} and "
                f"{first.start[key]!r}): all runs of a config start from one base; give it a config with "
                "results of its own"
            )


def process_problems(plan: "Plan") -> Iterator[str]:
    """Batches that do not suit the number of training processes, where the config says it."""
    processes = plan.config["launch"]["processes"]
    if not str(processes).isdecimal():
        return
    for run in plan.runs.values():
        try:
            check_processes(run.settings, int(processes))
        except ConfigError as error:
            yield f"runs.{run.name}, launch.processes {processes}: {error}"


def window_problems(plan: "Plan") -> Iterator[str]:
    """Crops larger than the tiles that they are cut from."""
    for run in plan.runs.values():
        if run.own_data is not None:
            continue
        settings = flatten(run.settings)
        tile_px = plan.config["tiling"]["sets"][run.tile_set]["tile_px"]
        crops = _CROPS if settings["gram.use_loss"] else _CROPS[:2]
        key = max(crops, key=lambda key: settings[key] or 0)
        if settings[key] > tile_px:
            yield (
                f"runs.{run.name}: {key} is {settings[key]} px, but tiles of set {run.tile_set} have {tile_px}: "
                f"raise tiling.sets.{run.tile_set}.tile_px or take smaller crops"
            )


def file_problems(plan: "Plan") -> Iterator[str]:
    """Slides and teachers that do not exist."""
    made = set(plan.demo_slides())
    missing = [r for r in plan.slides.values() if str(r.path) not in made and not r.path.exists()]
    for record in missing[:_SHOWN_FILES]:
        source = plan.config["slides"]["source"]
        yield f"slide {record.slide_id}: {record.path} does not exist; correct column path of {source}"
    if len(missing) > _SHOWN_FILES:
        yield f"… and {len(missing) - _SHOWN_FILES} more slides do not exist"
    weights = plan.base_run.settings.MODEL.WEIGHTS
    if weights and not Path(weights).exists():
        yield f"recipe {plan.base_run.recipe}: MODEL.WEIGHTS {weights} does not exist"
    for run in plan.runs.values():
        data = run.own_data
        if data is not None and not Path(data).is_dir() and not is_class_name(data):
            yield f"recipe {run.recipe}: train.dataset_path {data} is neither a folder of images nor module:Class"
        teacher = run.gram_teacher_file
        if teacher is not None and not teacher.exists():
            yield f"config: runs.{run.name}.gram_teacher {teacher} does not exist; give last, an iteration or a file"


def _reference_problems(config: dict[str, Any]) -> Iterator[str]:
    """Names that refer to nothing, and runs that clash or go round in circles."""
    sets, runs = config["tiling"]["sets"], config["runs"]
    references = [("features.set", config["features"]["set"], sets)]
    references += [(f"runs.{name}.tile_set", run["tile_set"], sets) for name, run in runs.items()]
    references += [(f"runs.{name}.continues", run["continues"], runs) for name, run in runs.items() if run["continues"]]
    references += [("features.models", model, [BASE, *runs]) for model in config["features"]["models"] or ()]
    for key, name, known in references:
        if name not in known:
            yield f"{key} is {name!r}, which is not defined{nearest(name, known)}; known are {', '.join(known)}"
    for name, run in runs.items():
        if name in TARGETS or name == BASE:
            yield f"runs.{name}: this name is taken by a part of the workflow; give the run another"
        teacher = run["gram_teacher"]
        if run["continues"] is None and (teacher == "last" or str(teacher).isdecimal()):
            yield f"runs.{name}.gram_teacher is {teacher}, but the run continues none: name a file or set `continues`"
    yield from _circle_problems(runs)


def _circle_problems(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in runs:
        seen, current = [name], runs[name]["continues"]
        while current in runs and current not in seen:
            seen.append(current)
            current = runs[current]["continues"]
        if current == name:
            circle = " -> ".join([*seen, name])
            yield f"runs.{name}.continues leads back to itself: {circle}; one run must continue none"
            return
