"""What the jobs that measure models are told while planning: tasks, their models, and what each of these is made from.

A task is what is asked: label-NAME (a column of the table of labels), tiles-NAME (a tile set from elsewhere),
masks-NAME (images with masks), and descriptive (no question at all). Each model answers each task in a job of its own;
another job compares the answers of all.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError
from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.evaluate.cohort import Cohort, make_cohort
from dinoscope.evaluate.labels import Label, check_units, labels_of_units, read_labels
from dinoscope.names import nearest
from dinoscope.plan import Plan, Run
from dinoscope.plan_checks import BASE
from dinoscope.plan_evaluation_checks import MEASURES, check_groups, check_measure
from dinoscope.plan_features import FeatureJobs
from dinoscope.recipe import flatten

__all__ = ["DESCRIPTIVE", "LABEL", "MASKS", "TILES", "EvaluationJobs"]

SHIFTS = ("stain", "blur", "jpeg", "mpp", "rotation", "grey")  # of evaluate/shifts.py, without its imports
DESCRIPTIVE, LABEL, TILES, MASKS = "descriptive", "label-", "tiles-", "masks-"
_MOST_SLIDES = 16  # that tiles to compare patches on are taken of
_FEW_CASES = 3  # of the test set, below which training slides are described as well


class EvaluationJobs:
    """Arguments and inputs of the jobs that measure a plan's models."""

    def __init__(self, plan: Plan, features: FeatureJobs) -> None:
        self._plan, self._features, self._settings = plan, features, plan.config["evaluation"]

    @functools.cached_property
    def cohort(self) -> Cohort:
        """The three sets of cases.

        Raises:
            ConfigError: A case is on two sides, or a chosen one cannot be for selection.
        """
        selection = self._settings["selection"]
        return make_cohort(
            list(self._plan.slides.values()),
            self._plan.split,
            fraction=selection["fraction"],
            seed=self._plan.config["split"]["seed"],
            selection=selection["cases"],
        )

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Names of all tasks, in the order of the report."""
        labels = [f"{LABEL}{label.name}" for label in self._labels]
        tiles = [f"{TILES}{name}" for name in self._settings["tile_sets"]]
        masks = [f"{MASKS}{name}" for name in self._settings["masks"]]
        described = self._settings["descriptive"] and self._described()
        return [*labels, *tiles, *masks, *([DESCRIPTIVE] if described else [])]

    @property
    def image_tasks(self) -> list[str]:
        """Those of images from elsewhere."""
        return [task for task in self.tasks if task.startswith((TILES, MASKS))]

    def check(self) -> None:
        """Raises what is wrong with cases, labels and folders before any job runs.

        Raises:
            ConfigError: One sentence.
        """
        for task in self.image_tasks:
            for folder in self.folders(task):
                if not Path(folder).is_dir():
                    section = "tile_sets" if task.startswith(TILES) else "masks"
                    name = task.partition("-")[2]
                    raise ConfigError(f"config: evaluation.{section}.{name}: {folder} is no folder; give one of images")
            section, (_, _, name) = "tile_sets" if task.startswith(TILES) else "masks", task.partition("-")
            check_groups(f"config: evaluation.{section}.{name}.groups", self.images(task)["groups"])
        self.summary_arguments()
        self._check_sets_of_one_folder()
        if self._settings["enabled"]:
            test = self.cohort.slides_of("test")
            for label in self._labels:
                check_units(label, labels_of_units(label, test, self.cohort.case_of), len(self.cohort.cases("test")))
        if any(self.is_probed(run) for run in self._plan.runs):
            self.probe_inputs()

    def check_tasks(self) -> None:
        """Refuses to evaluate where there is no task.

        Raises:
            ConfigError: Says what is missing.
        """
        if not self.tasks:
            raise ConfigError(
                "there is nothing to evaluate: hold cases out (use=eval,features) and name a table in `labels`, or "
                "give evaluation.tile_sets or evaluation.masks"
            )

    def models(self, task: str) -> list[str]:
        """Models that are asked, the starting weights first."""
        own = self._plan.measured_models
        if task == DESCRIPTIVE or not self._settings["baselines"]:
            return own
        names = [name for name in BASELINES if name != "random" or self._base_is_trained()]
        if task.startswith(MASKS):  # which have no patches
            names = [name for name in names if name == "random"]
        return [*own, *names]

    def slides(self, task: str) -> list[str]:
        """Slides whose features a task takes."""
        test = self.cohort.slides_of("test")
        return self._described() if task == DESCRIPTIVE else test

    def features(self, task: str, model: str) -> list[str]:
        """Files with the features that a model answers a task with."""
        if task in self.image_tasks:
            return [f"<results>/evaluation/{task}/features/{model}.npz"]
        return [f"<results>/features/{model}/{slide}.h5" for slide in self.slides(task)]

    def images(self, task: str) -> dict[str, Any]:
        """Settings of a task's images."""
        kind, _, name = task.partition("-")
        section = self._settings["tile_sets" if f"{kind}-" == TILES else "masks"]
        return section[name]

    def image_arguments(self, task: str) -> list[str]:
        """Arguments of evaluate.py that say which images a task has, and how they are taken."""
        settings = self.images(task)
        _, _, name = task.partition("-")
        arguments = ["--set-name", name]
        if task.startswith(TILES):
            arguments += ["--folder", settings["folder"], "--tile-px", str(settings["tile_px"])]
        else:
            arguments += ["--folder", settings["images"], "--masks", settings["masks"]]
            arguments += ["--enlarge", str(settings["enlarge"])] + (["--instances"] if settings["instances"] else [])
        arguments += ["--groups", settings["groups"]] if settings["groups"] else []
        return arguments + (["--grey"] if settings["grey"] else [])

    def folders(self, task: str) -> list[str]:
        """Folders that a task's images and masks lie in."""
        if task not in self.image_tasks:
            return []
        settings = self.images(task)
        return [settings["folder"]] if task.startswith(TILES) else [settings["images"], settings["masks"]]

    def image_inputs(self, task: str) -> list[str]:
        """Folders of a task's images and theirs, since a folder is only newer for what lies directly in it, and groups.

        Nothing of a task of slides.
        """
        found = []
        for folder in map(Path, self.folders(task)):
            inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
            found += [str(folder), *(str(folder / name) for name in inner if not name.startswith("."))]
        groups = self.images(task)["groups"] if found else None
        is_table = groups is not None and Path(groups).suffix.lower() in (".csv", ".tsv")
        return [*dict.fromkeys(found), *([groups] if is_table else [])]

    def cohort_digest(self, task: str) -> str:
        """Changes with what a task takes of the slide table: sets, cases and sites of the slides that have a set."""
        if task in self.image_tasks:
            return ""
        slides = self._plan.slides
        taken = [(slide, of, slides[slide].case_id, slides[slide].site) for slide, of in self.cohort.slides.items()]
        return hashlib.sha256(json.dumps(sorted(taken, key=lambda row: row[0])).encode()).hexdigest()[:16]

    def unit_arguments(self, task: str) -> list[str]:
        """Arguments of evaluate.py that say what a task asks about."""
        selection, split = self._settings["selection"], self._plan.config["split"]
        arguments = ["--seed", str(split["seed"])]
        if task in self.image_tasks:
            fraction = selection["fraction"] if self._is_probed_folder(task) else 0
            return [*arguments, *self.image_arguments(task), "--selection-fraction", str(fraction)]
        arguments += ["--split-fraction", str(split["fraction"]), "--selection-fraction", str(selection["fraction"])]
        arguments += ["--selection", *selection["cases"]] if selection["cases"] else []
        if task == DESCRIPTIVE:
            return [*arguments, "--described", *self._described()]
        return [*arguments, "--labels", self._plan.config["labels"], "--label", task.removeprefix(LABEL)]

    def reference_arguments(self, task: str) -> list[str]:
        """Arguments that say which models each model is held against, MODEL=REFERENCE."""
        models = self.models(task)
        pairs = [f"{model}={BASE}" for model in models if BASE in models and model != BASE]
        pairs += [f"{run}={control}" for run, control in self.controls.items() if {run, control} <= set(models)]
        return ["--against", *pairs] if pairs else []

    def run_arguments(self, task: str) -> list[str]:
        """Arguments that say which models are one run with several seeds, in the order of its seeds."""
        repeated: dict[str, list[str]] = {}
        for model in self.models(task):
            if (run := self._plan.runs.get(model)) is not None:
                repeated.setdefault(run.repeats or model, []).append(model)
        return [part for names in repeated.values() for part in ("--seeds-of", *names)]

    def patch_files(self, task: str, model: str) -> dict[str, str]:
        """Files with patches of the task's images: "own" of the model, and by name those that it is compared with.

        These are the starting weights and the run that it continues. Nothing where a task keeps no patches.
        """
        if task == DESCRIPTIVE and self.sampled_slides:
            pattern = f"<results>/evaluation/{DESCRIPTIVE}/patches/{{}}.npz"
        elif task.startswith(MASKS):
            pattern = f"<results>/evaluation/{task}/features/{{}}.npz"
        else:
            return {}
        chain = self._chain(model)
        others = {"base": BASE, "continued_run": chain[1] if len(chain) > 1 else None}
        others = {name: other for name, other in others.items() if other in self.models(task) and other != model}
        own = {"own": pattern.format(model)} if others else {}
        return own | {name: pattern.format(other) for name, other in others.items()}

    def patch_arguments(self, task: str, model: str) -> list[str]:
        """Arguments of evaluate.py measure that name these files."""
        files = self.patch_files(task, model)
        if not files:
            return []
        paths = {name: path.replace("<results>", str(self._plan.results), 1) for name, path in files.items()}
        own = paths.pop("own")
        arguments = ["--patches", own] if task == DESCRIPTIVE else []
        return [*arguments, "--patches-from", *(f"{name}={path}" for name, path in paths.items())]

    @functools.cached_property
    def sampled_slides(self) -> list[str]:
        """Slides that tiles are taken of to compare patches on: those that are described, a draw of many.

        Not those on object storage, of which Snakemake would bring every one for a few tiles.
        """
        slides = self._here(self._described())
        seed = self._settings["seed"]
        drawn = sorted(slides, key=lambda slide: hashlib.sha256(f"{seed}\n{slide}".encode()).digest())
        return sorted(drawn[:_MOST_SLIDES])

    def sampled_manifests(self) -> list[str]:
        """Manifests of their tiles."""
        tile_set = self._plan.config["features"]["set"]
        return [f"<results>/tiles/{tile_set}/{slide}.parquet" for slide in self.sampled_slides]

    def sample_arguments_described(self) -> list[str]:
        """Arguments of evaluate.py that say which tiles these are."""
        tiles = self._plan.results / "tiles" / self._plan.config["features"]["set"]
        arguments = ["--slides", self._plan.config["slides"]["source"], "--described", *self.sampled_slides]
        return [*arguments, "--tiles", str(tiles), "--seed", str(self._settings["seed"])]

    @functools.cached_property
    def controls(self) -> dict[str, str]:
        """Run with gram loss -> the run that does the very same iterations without it, if there is one.

        That of runs.NAME.control, else one that the config has by itself.
        """
        runs, found = self._plan.runs, {}
        for run in (run for run in runs.values() if run.settings.gram.use_loss):
            others = [other for other in runs.values() if _is_control(other, run)]
            others.sort(key=lambda other: other.of != (run.of or run.name))
            if others:
                found[run.name] = others[0].name
        return found

    def shift_arguments(self, task: str) -> list[str]:
        """Arguments of evaluate.py embed for changed copies of tiles, where robustness is asked."""
        if not (self._settings["robustness"] and task.startswith(TILES)):
            return []
        is_grey = self._settings["tile_sets"][task.removeprefix(TILES)]["grey"]
        return ["--shifts", *(kind for kind in SHIFTS if not (is_grey and kind == "grey"))]

    def samples(self, model: str) -> list[str]:
        """Samples of the test slides' tiles, of the model's tile set, that changed copies are made of."""
        tile_set = self._features.tile_set(model)
        return [f"<results>/evaluation/sampled/{tile_set}/{slide}.npz" for slide in self.slides(LABEL)]

    def sampled_features(self, task: str, model: str) -> list[str]:
        """The file with a model's features of them and of their changed copies, where robustness is asked of slides."""
        is_asked = self._settings["robustness"] and task.startswith(LABEL)
        return [f"<results>/evaluation/sampled/{model}.npz"] if is_asked else []

    def sample_arguments(self) -> list[str]:
        """Arguments of evaluate.py that say which tiles of a slide are sampled."""
        return ["--count", str(self._settings["robustness_tiles"]), "--seed", str(self._settings["seed"])]

    def pooling(self, model: str) -> str:
        """What is taken of an image with a model."""
        return "cls" if model in BASELINES and model != "random" else self._features.pooling(model)

    def history(self, task: str, model: str) -> list[str]:
        """Arguments that say what a model's training has seen: seals of its runs, folders of images, or unknown."""
        runs = self._chain(model)
        unknown = model in self._plan.encoders or (model not in BASELINES and self._base_is_trained())
        arguments = ["--unknown-origin"] if unknown else []
        for run in runs:
            arguments += ["--seal", str(self._plan.results / "runs" / run / "run_config.json")]
            data = self._plan.runs[run].own_data
            if data is None:
                continue
            if task in self.image_tasks and Path(data).is_dir():
                arguments += ["--trained-on", data]
            else:  # a data set of the user's own, or images of whatever slides
                arguments = ["--unknown-origin", *[part for part in arguments if part != "--unknown-origin"]]
        return arguments

    @property
    def probed_task(self) -> str | None:
        """The task whose images runs are asked about while they train; None, tiles of the selection's slides."""
        source = self._settings["probe"]["source"]
        if source is None:
            return None
        known = [task.partition("-")[2] for task in self.image_tasks]
        for task in self.image_tasks:
            if task.partition("-")[2] == source:
                return task
        raise ConfigError(
            f"config: evaluation.probe.source is {source!r}, which is no tile set or set of masks of evaluation"
            f"{nearest(source, known)}"
        )

    def _is_probed_folder(self, task: str) -> bool:
        """Whether the probe takes its images from the task's folder: another set of it has the same selection."""
        probed = self.probed_task
        return probed is not None and self._image_folder(task) == self._image_folder(probed)

    def _image_folder(self, task: str) -> Path:
        return Path(self.folders(task)[0]).resolve()

    def _check_sets_of_one_folder(self) -> None:
        """Refuses sets of the probe's folder that other groups are drawn of: the selection of one would test another.

        Raises:
            ConfigError: Groups of two sets of one folder are not the same.
        """
        if (probed := self.probed_task) is None:
            return
        for task in self.image_tasks:
            if self._is_probed_folder(task) and self.images(task)["groups"] != self.images(probed)["groups"]:
                raise ConfigError(
                    f"config: {probed} and {task} are of one folder, but differ in `groups`, so that images which "
                    "runs are asked about while they train would be tests of the other; give both the same"
                )

    def is_probed(self, run: str) -> bool:
        """Whether a run is asked while it trains."""
        return bool(self._plan.runs[run].settings.evaluation.probe_every)

    def probe_inputs(self) -> list[str]:
        """Files that the probe's images come from."""
        if (task := self.probed_task) is not None:
            return [f"<results>/evaluation/{task}/units.json"]
        tile_set = self._plan.config["features"]["set"]
        labels = [self._plan.config["labels"]] if self._plan.config["labels"] else []
        return [*labels, *(f"<results>/tiles/{tile_set}/{slide}.parquet" for slide in self.probed_slides)]

    def probe_arguments(self) -> list[str]:
        """Arguments of evaluate.py that say what they are."""
        arguments = ["--images", str(self._settings["probe"]["images"]), "--seed", str(self._settings["seed"])]
        if (task := self.probed_task) is not None:
            units = str(self._plan.results / "evaluation" / task / "units.json")
            return [*arguments, "--units", units, *self.image_arguments(task)]
        arguments += ["--slides", self._plan.config["slides"]["source"], "--probed", *self.probed_slides]
        arguments += ["--tiles", str(self._plan.results / "tiles" / self._plan.config["features"]["set"])]
        if self._plan.config["labels"] is None:
            return arguments
        arguments += ["--labels", self._plan.config["labels"]]
        return arguments + (["--label", *self._settings["labels"]] if self._settings["labels"] else [])

    @property
    def probed_slides(self) -> list[str]:
        """Slides that runs are asked about while they train; raises ConfigError where there are none."""
        slides = self.cohort.slides_of("selection")
        if not slides and any(self.is_probed(run) for run in self._plan.runs):
            raise ConfigError(
                "a run has evaluation.probe_every, but no case is for selection: hold out three cases or more, name "
                "some in evaluation.selection.cases, or set evaluation.probe.source"
            )
        here = self._here(slides)
        if slides and not here and any(self.is_probed(run) for run in self._plan.runs):
            raise ConfigError(
                "a run has evaluation.probe_every, but the slides of all cases for selection lie on object storage: "
                "set evaluation.probe.source to a tile set, or name cases with slides on this machine in "
                "evaluation.selection.cases"
            )
        return here

    def _here(self, slides: Sequence[str]) -> list[str]:
        """Those that lie on this machine."""
        remote = set(self._plan.remote_slides)
        return [slide for slide in slides if slide not in remote]

    def measure_arguments(self) -> list[str]:
        """Arguments that say how models are measured."""
        keys = ("seed", "folds", "repeats", "max_tiles")
        found = [part for key in keys for part in (f"--{key.replace('_', '-')}", str(self._settings[key]))]
        found += [] if self._settings["attention"] else ["--no-attention"]
        return [*found, "--splits", *self._settings["splits"]]

    def compare_arguments(self) -> list[str]:
        """Arguments that say how models are compared."""
        keys = ("seed", "bootstraps", "margin")
        return [part for key in keys for part in (f"--{key}", str(self._settings[key]))]

    def summary_arguments(self) -> list[str]:
        """Arguments for the table of all tasks."""
        primary = self._settings["primary"]
        if primary is None:
            return []
        task = primary.partition("/")[0]
        if task not in self.tasks or task == DESCRIPTIVE:
            raise ConfigError(
                f"config: evaluation.primary is {primary!r}, but {task!r} is no task with a verdict"
                f"{nearest(task, self.tasks)}; give TASK/MEASURE with a task of {', '.join(self.tasks)}"
            )
        check_measure(primary, self._measures(task))
        return ["--primary", primary]

    def _measures(self, task: str) -> list[str]:
        """Measures of a task that have a verdict, on unchanged tiles."""
        kinds = {f"{LABEL}{label.name}": label.kind for label in self._labels}
        kind = "masks" if task.startswith(MASKS) else kinds.get(task, "classes")
        is_attended = kind != "masks" and task.startswith(LABEL) and self._settings["attention"]
        return [*MEASURES[kind], *(["attention_mil"] if is_attended else [])]

    def notes(self) -> Iterator[str]:
        """What a user should know before anything runs."""
        if self._plan.config["labels"] is not None and not self.cohort.cases("test"):
            yield "labels are not predicted: no case is held out to test; give some cases use=eval,features"

    @functools.cached_property
    def _labels(self) -> list[Label]:
        """Labels that are predicted."""
        table = self._plan.config["labels"]
        if table is None:
            if self._settings["labels"]:
                raise ConfigError("config: evaluation.labels names labels, but `labels` names no table of labels")
            return []
        labels = read_labels(table, self._settings["labels"])
        return labels if self.cohort.cases("test") else []

    def _described(self) -> list[str]:
        test = self.cohort.slides_of("test")
        if len(self.cohort.cases_of_slides(test)) >= _FEW_CASES:
            return test
        wanted = {"test", "training"}
        return [slide for slide in self._plan.feature_slides if self.cohort.slides.get(slide) in wanted]

    def _base_is_trained(self) -> bool:
        """Whether the starting weights are somebody's, so that random ones are another thing."""
        return bool(self._plan.base_run.settings.MODEL.WEIGHTS)

    def _chain(self, model: str) -> list[str]:
        """A run and all that it continues; nothing for what is no run."""
        chain: list[str] = []
        current = model if model in self._plan.runs and model != BASE else None
        while current is not None:
            chain.append(current)
            current = self._plan.runs[current].continues
        return chain


def _is_control(other: Run, run: Run) -> bool:
    """Whether another run differs from one with gram loss in that loss alone."""
    same = (other.continues, other.tile_set) == (run.continues, run.tile_set)
    return same and not other.settings.gram.use_loss and _without_gram(other) == _without_gram(run)


def _without_gram(run: Run) -> dict[str, Any]:
    """Settings of a run but those of the gram loss, its teacher's crops, the draws, and what changes no weights."""
    apart = ("gram.", "crops.gram_teacher", "train.stream", "evaluation.", "checkpointing.")
    return {key: value for key, value in flatten(run.settings).items() if not key.startswith(apart)}
