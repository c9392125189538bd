"""The pilot while planning: short runs of different adaptation at equal compute, as a plan beside the config's.

An arm is the config's first run continued for so many iterations with another `student.trainable`: all arms need the
same floating-point operations, counted by train/flops.py, so that what trains less does more iterations. Nothing of it
is planned unless it is asked for: snakemake pilot.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dinoscope.config import RunConfig
from dinoscope.errors import ConfigError, SealError
from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.evaluate.cohort import Cohort
from dinoscope.evaluate.labels import labels_of_units, read_labels
from dinoscope.models.registry import settings_from_config
from dinoscope.plan import Plan, Run
from dinoscope.plan_checks import BASE
from dinoscope.plan_evaluation import DESCRIPTIVE, LABEL, EvaluationJobs
from dinoscope.plan_features import FeatureJobs
from dinoscope.recipe import flatten, load_recipe
from dinoscope.recipe_keys import REPLACED_BY_SCHEDULES
from dinoscope.resolutions import resolutions
from dinoscope.train.flops import adapted_step_flops, num_masked_patches
from dinoscope.train.run_folder import complete_checkpoints
from dinoscope.train.seal import check_seal

__all__ = ["PilotJobs", "equal_iterations"]

_FEWEST_CASES = 30  # MIN_CASES of evaluate/intervals.py, without its imports
_FEWEST_ITERATIONS = 10  # an arm of fewer says nothing of what it would come to


class PilotJobs:
    """Arms, their recipes and the evaluation of all of them."""

    def __init__(self, plan: Plan) -> None:
        self._base, self._settings = plan, plan.config["pilot"]

    @functools.cached_property
    def arms(self) -> dict[str, str]:
        """Name of the run -> what of the backbone it trains; of random weights nothing but all can be trained."""
        has_weights = bool(self._base.base_run.settings.MODEL.WEIGHTS)
        wanted = [arm for arm in self._settings["arms"] if has_weights or arm == "full"]
        return {f"{self._settings['name']}-{arm}": arm for arm in wanted}

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan with the arms as further runs, the only ones whose models are asked.

        Raises:
            ConfigError: The budget is too small.
        """
        arms = {name: self._run(name, arm) for name, arm in self.arms.items()}
        features = self._base.config["features"] | {"models": [BASE, *arms, *self._base.encoders]}
        return replace(self._base, config=self._base.config | {"features": features}, runs={**self._base.runs, **arms})

    @functools.cached_property
    def features(self) -> FeatureJobs:
        """Jobs that make features of the arms."""
        return FeatureJobs(self.plan)

    @functools.cached_property
    def evaluation(self) -> EvaluationJobs:
        """Jobs that measure the arms."""
        return EvaluationJobs(self.plan, self.features)

    @property
    def tasks(self) -> list[str]:
        """Tasks that the arms are asked: all that have a verdict."""
        return [task for task in self.evaluation.tasks if task != DESCRIPTIVE]

    def check(self) -> None:
        """Raises what keeps the pilot from being of use.

        Raises:
            ConfigError: One sentence.
        """
        if not self.arms:
            raise ConfigError(
                f"config: pilot.arms is {self._settings['arms']}, but MODEL.WEIGHTS of {self._base.base_run.recipe} is "
                "empty, and of random weights all must be trained: name published weights, or add full to pilot.arms"
            )
        if not self.tasks:
            raise ConfigError(f"the pilot has nothing to judge by: {self._why_nothing()}")
        if self._base.config["evaluation"]["probe"]["source"] is None and not self._cohort.cases("selection"):
            raise ConfigError(
                f"the pilot has no case to follow its runs on while they train: {len(self._cohort.cases('test'))} are "
                "held out, all for the verdict; hold out three or more (use=eval), name some in "
                "evaluation.selection.cases, or set evaluation.probe.source"
            )
        self.evaluation.check()
        for name in self.arms:
            self._check_begun(name)

    def _why_nothing(self) -> str:
        table = self._base.config["labels"]
        if table is not None and not self._cohort.cases("test"):
            return f"{table} has labels, but no case is held out to be asked about; give some cases use=eval,features"
        return (
            "name a table in `labels` and hold cases out (use=eval), or give evaluation.tile_sets or evaluation.masks"
        )

    def _check_begun(self, name: str) -> None:
        """Refuses to go on with an arm under other settings than it was begun with; another length is one too."""
        run_dir, overrides = self._base.results / "runs" / name, self.overrides(name)
        if not complete_checkpoints(run_dir):
            return
        way_out = "put the config and the recipe back, or give the changed pilot a name of its own (pilot.name)"
        try:
            check_seal(run_dir, self._base.base_run.recipe, overrides)
        except SealError as error:
            told = str(error).partition(": ")[2].rpartition("; ")[0] or str(error)
            raise ConfigError(f"{name} of the pilot was begun with other settings: {told}; {way_out}") from None
        before, now = load_recipe(run_dir / "config.yaml"), self.plan.runs[name].settings
        lengths = {
            "iterations": (before.optim.epochs, now.optim.epochs),
            "iterations between probes": (before.evaluation.probe_every, now.evaluation.probe_every),
        }
        for what, (was, wanted) in lengths.items():
            if was != wanted:
                raise ConfigError(
                    f"{name} of the pilot was begun with {was} {what}, and the config now comes to {wanted}: {way_out}"
                )

    def notes(self) -> list[str]:
        """What the pilot will not tell, a sentence each, before anything is spent on it."""
        notes = []
        if left_out := [arm for arm in self._settings["arms"] if arm not in self.arms.values()]:
            recipe = self._base.base_run.recipe
            notes.append(f"the pilot leaves out {' and '.join(left_out)}: {recipe} names no MODEL.WEIGHTS")
        of_slides = [task for task in self.tasks if task.startswith(LABEL)]
        test = self._cohort.slides_of("test")
        if of_slides and len({self._base.slides[slide].site for slide in test} - {None, ""}) < 2:
            source = self._base.config["slides"]["source"]
            notes.append(f"the pilot has no site read-out: the test cases are of one site (column site of {source})")
        return [*notes, *self._few_cases()]

    def _few_cases(self) -> Iterator[str]:
        """Labels with fewer test cases in a class than a verdict takes."""
        test = self._cohort.slides_of("test")
        names = [task.removeprefix(LABEL) for task in self.tasks if task.startswith(LABEL)]
        table = self._base.config["labels"]
        for label in read_labels(table, names) if table is not None else []:
            if label.kind != "classes":
                continue
            cases: dict[str, set[str]] = {}
            for unit in labels_of_units(label, test, self._cohort.case_of):
                cases.setdefault(str(unit.value), set()).add(unit.case)
            fewest = min((len(of) for of in cases.values()), default=0)
            if fewest < _FEWEST_CASES:
                yield (
                    f"the pilot will find too few cases to judge {label.name}: {fewest} test cases in the smallest "
                    f"class, {_FEWEST_CASES} are needed"
                )

    @property
    def _cohort(self) -> Cohort:
        return self.evaluation.cohort

    def overrides(self, name: str) -> list[str]:
        """What an arm has in place of the first run's settings, key=value each.

        Raises:
            ConfigError: The budget is too small.
        """
        arm = self.arms[name]
        iterations = self.iterations[arm]
        between = math.ceil(iterations / self._settings["probes"])
        base = self._base.base_run.settings
        epochs, by_schedules = base.optim.epochs, base.schedules is not None
        changes: dict[str, Any] = {
            key: math.floor(value * iterations / epochs)
            for key, value in flatten(base).items()
            if key.endswith("_epochs")
            and isinstance(value, int | float)
            and not (by_schedules and key in REPLACED_BY_SCHEDULES)
        }
        # one iteration an epoch, so that the length is exact
        changes |= {"optim.epochs": iterations, "train.OFFICIAL_EPOCH_LENGTH": 1}
        rate = "schedules.lr.peak" if by_schedules else "optim.lr"
        changes[rate] = flatten(base)[rate] * self._settings["lr_factors"][arm]
        changes |= self._trained(arm) | {
            "MODEL.WEIGHTS": str(self._base.results / "models" / BASE / "teacher.pth"),
            "gram.use_loss": False,
            "checkpointing.period": between,  # so that little is lost with a run that is killed
            "evaluation.eval_period_iterations": 0,
            "evaluation.best_by": "null",
            "evaluation.select": "last",
            "evaluation.stop_when_worse": False,
            "evaluation.probe_every": between,
        }
        return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]

    @functools.cached_property
    def iterations(self) -> dict[str, int]:
        """What of the backbone is trained -> iterations of its arm.

        Raises:
            ConfigError: The budget is too small.
        """
        costs = {arm: self.step_flops(arm) for arm in {*self.arms.values(), "full"}}
        of_all = self._settings["gpu_minutes"] * 60 * self._settings["tflops"] * 1e12
        budget = min(of_all / max(1, len(self.arms)), self._settings["iterations"] * costs["full"])
        found = equal_iterations(budget, costs)
        if found["full"] < _FEWEST_ITERATIONS:
            raise ConfigError(
                f"config: pilot.gpu_minutes {self._settings['gpu_minutes']:g} at pilot.tflops "
                f"{self._settings['tflops']:g} and pilot.iterations {self._settings['iterations']} give full "
                f"adaptation {found['full']} iterations; {_FEWEST_ITERATIONS} are the least: raise them"
            )
        return found

    def step_flops(self, arm: str) -> float:
        """Floating-point operations of a process in a step of an arm, on average over the sizes of crops."""
        recipe = load_recipe(
            self._base.base_run.recipe, [f"{key}={value}" for key, value in self._trained(arm).items()]
        )
        return _mean_step_flops(recipe)

    def references(self, task: str) -> list[str]:
        """Arguments that say whom a model is held against: all the starting weights, encoders each arm as well."""
        models = self.evaluation.models(task)
        pairs = [f"{model}={BASE}" for model in models if model != BASE]
        pairs += [f"{encoder}={arm}" for encoder in self._base.encoders for arm in self.arms if encoder in models]
        return ["--against", *pairs]

    def summary_arguments(self) -> list[str]:
        """Arguments of pilot.py for its table and its advice."""
        published = bool(self._base.base_run.settings.MODEL.WEIGHTS)
        arguments = ["--starting-weights", "published" if published else "random", "--margin"]
        arguments += [str(self._base.config["evaluation"]["margin"])]
        costs = {name: self.step_flops(arm) for name, arm in self.arms.items()}
        arguments += ["--arms", *(f"{name}={self.arms[name]}={costs[name]:.6g}" for name in self.arms)]
        arguments += ["--encoders", *self._base.encoders] if self._base.encoders else []
        arguments += ["--baselines", *BASELINES]
        primary = self._base.config["evaluation"]["primary"]
        return arguments + (["--primary", primary] if primary is not None else [])

    def _trained(self, arm: str) -> dict[str, Any]:
        """What an arm trains of the backbone."""
        depth = settings_from_config(self._base.base_run.settings.student).depth
        blocks = {"full": 0, "lora": self._settings["lora_blocks"], "last_n": self._settings["last_blocks"]}[arm]
        return {"student.trainable": arm, "student.unfrozen_blocks": min(blocks, depth - 1)}

    def _run(self, name: str, arm: str) -> Run:
        base, changes = self._base.base_run, self.overrides(name)
        settings = load_recipe(base.recipe, changes)
        return Run(name, base.recipes, settings, base.tile_set, None, None, tuple(changes))


def equal_iterations(budget: float, costs: dict[str, float]) -> dict[str, int]:
    """Iterations that a budget of floating-point operations buys, by name; at most one iteration short of it each."""
    return {name: math.floor(budget / cost * (1 + 1e-12)) for name, cost in costs.items()}


def _mean_step_flops(config: RunConfig) -> float:
    settings = settings_from_config(config.student)
    tiles = config.train.batch_size_per_gpu
    total = sum(
        sizes.share * adapted_step_flops(config, settings, tiles, num_masked_patches(config, tiles, sizes), sizes)
        for sizes in resolutions(config)
    )
    return total * config.train.accumulation_steps
