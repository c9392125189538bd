"""What the workflow is asked to do, checked in full before any job starts; rules/common.smk builds its rules on it.

Nothing here imports torch or Snakemake: `snakemake -n` must answer in seconds.
"""

import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dinoscope.config import RunConfig
from dinoscope.errors import ConfigError, DinoscopeError, ManifestError
from dinoscope.files import read_json
from dinoscope.models.registry import settings_from_config
from dinoscope.names import nearest
from dinoscope.plan_checks import (
    BASE,
    base_problems,
    check_config,
    file_problems,
    process_problems,
    remote_problems,
    window_problems,
)
from dinoscope.plan_runs import PlannedRun, planned_runs
from dinoscope.recipe import flatten, load_recipe, recipe_chain
from dinoscope.slides.find import slide_files
from dinoscope.slides.remote import remote_address
from dinoscope.slides.table import SlideRecord, check_labels, read_slide_table, split_cases
from dinoscope.train.run_folder import complete_checkpoints
from dinoscope.train.seal import read_seal

__all__ = ["DEMO_SLIDES", "Plan", "Run", "make_plan", "one_sentence"]

_TRAINING_ONLY = (
    "student.drop_path_rate",
    "student.pos_embed_rope_shift_coords",
    "student.pos_embed_rope_jitter_coords",
    "student.pos_embed_rope_rescale_coords",
    "student.trainable",
    "student.unfrozen_blocks",
    "student.lora_rank",
    "student.lora_alpha",
    "student.lora_targets",
)
# The names of dinoscope.slides.demo, without its imports.
DEMO_SLIDES = ("demo_he_1", "demo_he_2", "demo_he_3", "demo_ihc_1", "demo_cyto_1")
# Of dinoscope.slides.demo_biopsies, likewise.
_BIOPSY = re.compile(r"demo_biopsy_\d{3}\.tiff")
# What `stain` says about a slide's looks, where the tissue method is auto.
_METHOD_OF_STAIN = {"HE": "otsu", "IHC": "otsu", "Pap": "cytology", "MGG": "cytology", "IF": "fluorescence"}
# Option of tile_slide.py, key of a tile set, and its default, which needs no option.
_READING_OPTIONS = (("--edge", "edge", "drop"), ("--max-upsample", "max_upsample", 1.05))
_SET_OPTIONS = (("--min-tissue", "min_tissue", None), ("--stride", "stride_px", None), *_READING_OPTIONS)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training run of the config.

    Attributes:
        recipes: The recipe and all that it extends, most basic first.
        settings: The recipe, resolved, with `changes`.
        continues: Name of the run that this one carries on with, if any.
        gram_teacher: "last", an iteration, a teacher file, or None.
        changes: What differs from the recipe, key=value; nothing in runs of the config.
        of: The run of the config that this one follows from (a repeat, a control); None, it is one itself.
        repeats: The run that this one repeats with another seed, if it does.
    """

    name: str
    recipes: tuple[Path, ...]
    settings: RunConfig
    tile_set: str
    continues: str | None
    gram_teacher: str | None
    changes: tuple[str, ...] = ()
    of: str | None = None
    repeats: str | None = None

    @property
    def recipe(self) -> Path:
        """The recipe that the config names."""
        return self.recipes[-1]

    @property
    def own_data(self) -> str | None:
        """The image folder or data set that the recipe names in place of tiles of slides."""
        return self.settings.train.dataset_path

    @property
    def gram_teacher_file(self) -> Path | None:
        """The gram teacher if it is a file."""
        teacher = self.gram_teacher
        return None if teacher is None or teacher == "last" or teacher.isdecimal() else Path(teacher)

    @property
    def distilled_file(self) -> Path | None:
        """The file that tells of the teacher which the run distils: itself, or the final.json of its run."""
        if not self.settings.distillation.enabled:
            return None
        path = Path(self.settings.distillation.checkpoint_path)
        return path / "final.json" if (path / "final.json").is_file() else path

    @property
    def start(self) -> dict[str, Any]:
        """The settings that the starting weights depend on."""
        settings = flatten(self.settings)
        kept = {key: value for key, value in settings.items() if key.startswith("student.")}
        for key in _TRAINING_ONLY:
            del kept[key]
        return kept | {key: settings[key] for key in ("MODEL.WEIGHTS", "train.seed")}


@dataclass(frozen=True)
class Plan:
    """The checked config, and what follows from it.

    Attributes:
        config: With all defaults filled in.
        slides: All slides, by slide_id.
        split: slide_id -> "train" or "eval" of the slides that serve one of them.
        runs: By name, in the order of the config, each followed by its repeats and its control.
    """

    config: dict[str, Any]
    slides: dict[str, SlideRecord]
    split: dict[str, str]
    runs: dict[str, Run]

    @functools.cached_property
    def results(self) -> Path:
        """Folder of all results."""
        return Path(self.config["results"])

    @property
    def written_runs(self) -> dict[str, Run]:
        """Runs of the config itself, without repeats and controls."""
        return {name: run for name, run in self.runs.items() if run.of is None}

    @property
    def models(self) -> list[str]:
        """Models that features of all slides are extracted with, and that pictures show."""
        chosen = self.config["features"]["models"]
        return [BASE, *self.written_runs, *self.encoders] if chosen is None else list(chosen)

    @property
    def measured_models(self) -> list[str]:
        """Models that are measured: these, and the repeats and controls of their runs."""
        found = {}
        for model in self.models:
            further = [name for name, run in self.runs.items() if run.of is not None and run.of == model]
            found |= dict.fromkeys([model, *further])
        return list(found)

    @property
    def own_models(self) -> list[str]:
        """Those of the models that are ours: the starting weights and runs."""
        return [name for name in self.models if name not in self.encoders]

    @property
    def encoders(self) -> dict[str, dict[str, Any]]:
        """Encoders of other origin, by name, with their settings."""
        return self.config["features"]["encoders"]

    @property
    def base_run(self) -> Run:
        """The run whose recipe says what the starting weights are."""
        return next(run for run in self.runs.values() if run.continues is None)

    @property
    def trained_runs(self) -> list[str]:
        """Runs whose model is measured, with all that they continue, in the order of the config."""
        wanted: set[str] = set()
        for name in self.measured_models:
            current = name if name in self.runs else None
            while current is not None:
                wanted.add(current)
                current = self.runs[current].continues
        return [name for name in self.runs if name in wanted]

    @property
    def train_slides(self) -> list[str]:
        """Slides that training sees."""
        return [slide_id for slide_id, use in self.split.items() if use == "train"]

    def slides_to_train_on(self) -> list[str]:
        """Slides that training sees; raises ConfigError when there are none."""
        if not self.train_slides:
            source = self.config["slides"]["source"]
            raise ConfigError(f"{source} has no slide to train on: give some slides use=train, or ask for base only")
        return self.train_slides

    @property
    def training_sets(self) -> list[str]:
        """Tile sets that the trained runs take their crops from."""
        runs = (self.runs[name] for name in self.trained_runs)
        return list(dict.fromkeys(run.tile_set for run in runs if run.own_data is None))

    @property
    def split_digest(self) -> str:
        """Changes when any slide moves between training and evaluation."""
        return _digest(sorted(self.split.items()))

    @property
    def table_digest(self) -> str:
        """Changes when the slide table says anything else of a slide than where it lies."""
        records = (replace(record, path=Path(), use=frozenset()) for record in self.slides.values())
        return _digest([[str(record), sorted(self.slides[record.slide_id].use)] for record in records])

    @property
    def base_digest(self) -> str:
        """Changes with any setting that the starting weights depend on."""
        return _digest(self.base_run.start)

    @property
    def base_weights(self) -> list[str]:
        """The published file or folder that the starting weights come from, if any."""
        weights = self.base_run.settings.MODEL.WEIGHTS
        return [weights] if weights else []

    @property
    def feature_slides(self) -> list[str]:
        """Slides that features and PCA maps are made of."""
        return [slide_id for slide_id, record in self.slides.items() if "features" in record.use]

    @property
    def remote_slides(self) -> list[str]:
        """Slides that lie on object storage."""
        return [slide_id for slide_id, record in self.slides.items() if remote_address(record.path)]

    def slide(self, slide_id: str) -> SlideRecord:
        """The slide of that name; raises ConfigError with the nearest known name."""
        if slide_id not in self.slides:
            source = self.config["slides"]["source"]
            raise ConfigError(f"slide {slide_id!r} is not in {source}{nearest(slide_id, self.slides)}")
        return self.slides[slide_id]

    def slide_mpp(self, slide_id: str) -> float | None:
        """Micrometres a pixel that table or config give; None, the file is asked."""
        return self.slide(slide_id).mpp or self.config["slides"]["mpp"]

    def slide_members(self, slide_id: str) -> list[str]:
        """The files of a slide besides the one that is opened."""
        if slide_id not in self._members:
            self._members[slide_id] = [str(path) for path in slide_files(self.slide(slide_id).path)]
        return self._members[slide_id]

    @functools.cached_property
    def _members(self) -> dict[str, list[str]]:
        """What `slide_members` has found: each job of a slide asks, and the disk may be far away."""
        return {}

    def tissue_method(self, slide_id: str) -> str:
        """How tissue is found on a slide; "auto" leaves it to the slide's looks."""
        method, stain = self.config["tissue"]["method"], self.slide(slide_id).stain or ""
        return _METHOD_OF_STAIN.get(stain.partition(":")[0], "auto") if method == "auto" else method

    @functools.cached_property
    def annotation_files(self) -> dict[str, str]:
        """slide_id -> GeoJSON file, of the slides that have one in tissue.annotations."""
        folder = self.config["tissue"]["annotations"]
        there = {path.name for path in Path(folder).iterdir()} if folder and Path(folder).is_dir() else set()
        return {slide: str(Path(folder) / f"{slide}.geojson") for slide in self.slides if f"{slide}.geojson" in there}

    def tiling_arguments(self, slide_id: str, outputs: Sequence[str]) -> list[str]:
        """Arguments of tile_slide.py for all tile sets, `outputs` being their files in the order of the config."""
        arguments = [*self._tissue_arguments(slide_id), *self._quality_arguments()]
        for (name, tiles), output in zip(self.config["tiling"]["sets"].items(), outputs, strict=True):
            mpps = tiles["mpp"] if isinstance(tiles["mpp"], list) else [tiles["mpp"]]
            arguments += ["--set", name, str(tiles["tile_px"]), ",".join(map(str, mpps)), output]
            arguments += _set_options(name, tiles, _SET_OPTIONS)
        return arguments

    def tile_set_arguments(self) -> list[str]:
        """Arguments of report_slides.py: each tile set that is wanted, at each of its mpps."""
        arguments = []
        for name, tiles in self.config["tiling"]["sets"].items():
            mpps = tiles["mpp"] if isinstance(tiles["mpp"], list) else [tiles["mpp"]]
            arguments += [part for mpp in mpps for part in ("--set", name, str(tiles["tile_px"]), str(mpp))]
            arguments += _set_options(name, tiles, _READING_OPTIONS)
        return arguments

    def _tissue_arguments(self, slide_id: str) -> list[str]:
        tissue, annotations = self.config["tissue"], self.annotation_files.get(slide_id)
        arguments = ["--tissue-method", "annotations" if annotations else self.tissue_method(slide_id)]
        for key in ("min_area_um2", "max_hole_um2"):
            if tissue[key] is not None:
                arguments += [f"--{key.replace('_', '-')}", str(tissue[key])]
        if annotations:
            arguments += [
                "--annotations",
                annotations,
                "--include",
                *tissue["include"],
                "--exclude",
                *tissue["exclude"],
            ]
        return arguments

    def _quality_arguments(self) -> list[str]:
        arguments = []
        for key, value in self.config["tiling"]["quality"].items():
            if value is not None and value is not False:
                arguments += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        return arguments

    def demo_slides(self) -> list[str]:
        """Paths of the slides that the demo makes, if it is enabled."""
        if not self.config["demo"]["enabled"]:
            return []
        demo = {self.results / "demo" / f"{name}.tiff" for name in DEMO_SLIDES}
        return [str(record.path) for record in self.slides.values() if record.path in demo]

    def demo_biopsies(self) -> list[str]:
        """Paths of the biopsies that the pilot's demo makes, if it is enabled."""
        if not self.config["demo"]["enabled"]:
            return []
        paths = (record.path for record in self.slides.values())
        return [str(path) for path in paths if path.parent == self.results / "demo" and _BIOPSY.fullmatch(path.name)]

    def visible_gpus(self, environment: Mapping[str, str]) -> dict[str, str]:
        """What the environment of all jobs must say besides, where launch.gpus names GPUs.

        Raises:
            ConfigError: It names one that the environment's CUDA_VISIBLE_DEVICES does not.
        """
        wanted, allowed = self.config["launch"]["gpus"], environment.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return {}
        refused = [gpu for gpu in wanted if allowed is not None and str(gpu) not in allowed.split(",")]
        if refused:
            raise ConfigError(
                f"launch.gpus asks for GPU {refused[0]}, but CUDA_VISIBLE_DEVICES is {allowed!r}: name GPUs that it "
                "has, or unset one of both"
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, wanted))}

    def kept_exports(self, run: str) -> list[int]:
        """Iterations of a run whose exported teacher another run takes as its gram teacher."""
        named = (other.gram_teacher or "" for other in self.runs.values() if other.continues == run)
        return sorted({int(teacher) for teacher in named if teacher.isdecimal()})

    def basis_slides(self, model: str) -> list[str]:
        """Slides that the model's PCA is fitted on: those of the basis that exists, else the training slides.

        A basis is kept when slides come, so that colours stay comparable; a slide that goes takes part no more.
        """
        try:
            fitted = set(read_json(self.results / "pca" / model / "basis.json")["slides"])
        except (FileNotFoundError, KeyError, ValueError):
            fitted = set()
        kept = [slide_id for slide_id in self.slides if slide_id in fitted]
        return kept or self.train_slides or self.feature_slides

    def sampled_slides(self, model: str) -> list[str]:
        """Slides whose tiles the viewer seeks neighbours among: those of the sample that exists, else all.

        A sample is kept when slides come, so that no other slide's jobs run again; a slide that goes takes part
        no more.
        """
        try:
            sampled = set(read_json(self.results / "neighbours" / f"{model}.json")["slides"])
        except (FileNotFoundError, KeyError, ValueError):
            sampled = set()
        return [slide_id for slide_id in self.feature_slides if slide_id in sampled] or self.feature_slides

    def is_packed(self, run: Run) -> bool:
        """Whether a run is trained on packed tiles: as it was begun, or else as the config says now."""
        if run.own_data is not None:
            return False
        seal = next((seal for started, seal in self._started_runs() if started.name == run.name), None)
        return self.config["packing"]["enabled"] if seal is None else seal["inputs"].get("pixels") is not None

    def notes(self) -> list[str]:
        """What the user should know before anything runs, a sentence each."""
        return [*self.split_notes(), *self.manifest_notes(), *self.packing_notes(), *self.leak_notes()]

    def split_notes(self) -> list[str]:
        """Which slides are held out although nobody said so."""
        if any("eval" in record.use for record in self.slides.values()):
            return []
        held_out = sorted(slide for slide, use in self.split.items() if use == "eval")
        if not held_out:
            return []
        shown = ", ".join(held_out[:5]) + (f" and {len(held_out) - 5} more" if len(held_out) > 5 else "")
        return [f"no slide has use=eval, so split.fraction holds out of training: {shown}"]

    def leak_notes(self) -> list[str]:
        """Slides that a run has trained on and that are held out by now."""
        notes = []
        for run, seal in self._started_runs():
            leaked = sorted(slide for slide in seal.get("slides", []) if self.split.get(slide) == "eval")
            if leaked:
                notes.append(
                    f"run {run.name} was trained on {leaked[0]}, which is held out by now: it is no test of this run; "
                    "set its use to train, or train anew under a new run name"
                )
        return notes

    def manifest_notes(self) -> list[str]:
        """A sentence for each run that was started on another manifest than there is now; it keeps its own."""
        notes = []
        for run, seal in self._started_runs():
            manifest = self.results / "manifests" / f"{run.tile_set}.parquet"
            if run.own_data is not None or not manifest.is_file():
                continue
            from dinoscope.slides.manifest import manifest_digest  # pyarrow takes its time

            trained = seal["inputs"]["manifest"]
            if trained is None:  # it was trained on other images
                continue
            try:
                current = manifest_digest(manifest)
            except ManifestError:  # planning must go on, so that it can be made again
                continue
            if trained != current:
                notes.append(
                    f"run {run.name} was trained on manifest {trained[:8]}, current is {current[:8]}: "
                    "give a new run name to use it"
                )
        return notes

    def packing_notes(self) -> list[str]:
        """A sentence for each run that keeps the pixels it was started with although packing.enabled has changed."""
        changed = self.config["packing"]["enabled"]
        return [
            f"run {run.name} was started on {'tiles of the slides' if changed else 'packed tiles'} and keeps to them: "
            f"give a new run name to train with packing.enabled: {str(changed).lower()}"
            for run, _ in self._started_runs()
            if run.own_data is None and self.is_packed(run) != changed
        ]

    def _started_runs(self) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Runs that have a checkpoint, with their seals."""
        for run in self.runs.values():
            seal = read_seal(self.results / "runs" / run.name)
            if seal is not None and complete_checkpoints(self.results / "runs" / run.name):
                yield run, seal


def make_plan(config: Mapping[str, Any], workflow_dir: Path, *, check_files: bool = True) -> Plan:
    """Checks the config and all that it names.

    Args:
        config: As read from config/config.yaml.
        workflow_dir: Folder of the Snakefile, with the schemas and the recipes that come with the workflow.
        check_files: Whether weights, images and teachers must be there; jobs on other machines need not look again.

    Raises:
        ConfigError: One sentence a problem.
    """
    checked = check_config(config, workflow_dir)
    records = read_slide_table(checked["slides"]["source"])
    split = split_cases(records, checked["split"]["fraction"], checked["split"]["seed"])
    runs = {planned.name: _run(planned, workflow_dir) for planned in planned_runs(checked["runs"])}
    plan = Plan(checked, {record.slide_id: record for record in records}, split, runs)
    found = [*base_problems(plan), *window_problems(plan), *process_problems(plan), *remote_problems(plan)]
    if check_files:
        found += file_problems(plan)
    if found:
        raise ConfigError("\n".join(found))
    if checked["labels"] is not None:
        check_labels(checked["labels"], records)
    return plan


def one_sentence(function: Callable[P, T]) -> Callable[P, T]:
    """Ends the program with the sentence of a user's error instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except DinoscopeError as error:
            sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))

    # Snakemake asks for it several times a job, and to work it out anew took a tenth of all planning.
    wrapped.__signature__ = inspect.signature(function)
    return wrapped


def _run(planned: PlannedRun, workflow_dir: Path) -> Run:
    name, settings = planned.name, planned.settings
    recipe = Path(settings["recipe"])
    if not recipe.exists() and (workflow_dir / recipe).exists():
        recipe = workflow_dir / recipe
    teacher = settings["gram_teacher"]
    try:
        chain, resolved = recipe_chain(recipe), load_recipe(recipe, planned.changes)
        settings_from_config(resolved.student)
    except ConfigError as error:
        raise ConfigError(f"runs.{name}: {error}") from None
    if planned.of is None:
        _check_wishes(name, settings, recipe, resolved)
    return Run(
        name=name,
        recipes=tuple(chain),
        settings=resolved,
        tile_set=settings["tile_set"],
        continues=settings["continues"],
        gram_teacher=None if teacher is None else str(teacher),
        changes=planned.changes,
        of=planned.of,
        repeats=planned.repeats,
    )


def _check_wishes(name: str, settings: Mapping[str, Any], recipe: Path, resolved: RunConfig) -> None:
    """Raises ConfigError where repeats or a control do not suit the recipe."""
    seeds, own = settings["seeds"], resolved.train.seed
    if seeds and seeds[0] != own:
        raise ConfigError(
            f"config: runs.{name}.seeds begins with {seeds[0]}, but train.seed of {recipe} is {own}, and the first "
            f"seed is that of {name} itself: begin the list with {own}, or set train.seed to {seeds[0]}"
        )
    if settings["control"] and not resolved.gram.use_loss:
        raise ConfigError(
            f"config: runs.{name}.control is true, but gram.use_loss of {recipe} is false: a control does the same as "
            "a run with gram loss, without it; leave out `control`, or set gram.use_loss to true"
        )


def _set_options(name: str, tiles: Mapping[str, Any], options: Sequence[tuple[str, str, Any]]) -> list[str]:
    """Arguments for what a tile set says of itself, its defaults left out."""
    said = [(option, tiles[key]) for option, key, default in options if tiles[key] != default]
    return [part for option, value in said for part in (option, f"{name}={value}")]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
