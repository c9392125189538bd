"""What the jobs of segmentation are told while planning: tasks, encoders, what is tuned, and which pictures are wanted.

Nothing here imports torch: `snakemake -n` must answer in seconds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.plan import Plan
from dinoscope.plan_features import FeatureJobs
from dinoscope.segment.settings import FINAL_NAME, TrainSettings, check_segment_seal, default_views, variant_name

__all__ = ["SegmentJobs", "Variant"]

# Of a task, what is a setting of its trainings under the same name.
_SAME = (
    *("last_n", "rank", "alpha", "targets", "blocks", "img_dim", "epochs", "batch_size", "lr", "decoder_lr", "min_lr"),
    *("weight_decay", "warmup_epochs", "clip_grad", "dice_weight", "class_weights", "views", "augmentation"),
    *("inference", "overlap", "eval_epochs", "precision"),
)


@dataclass(frozen=True)
class Variant:
    """One way to train: what is tuned, the decoder, the seed."""

    trainable: str
    decoder: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return variant_name(self.trainable, self.decoder, self.seed)


class SegmentJobs:
    """Arguments and inputs of the segmentation jobs of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._features = plan, FeatureJobs(plan)
        self.tasks: dict[str, dict[str, Any]] = plan.config["segmentation"]["tasks"]
        for name in self.tasks:
            self._check(name)

    def check_options(self) -> None:
        """Refuses what only data sets, views and corruptions know; this imports torch, and only where there are tasks.

        Raises:
            ConfigError: An unknown option, with the nearest known one, or a data set that is not there.
        """
        if not self.tasks:
            return
        from dinoscope.segment.arguments import data_root
        from dinoscope.segment.datasets import dataset_settings
        from dinoscope.segment.engine import view_settings
        from dinoscope.segment.robustness import kinds_of

        for task, of in self.tasks.items():
            try:
                dataset_settings(of["dataset"], of["data"])
                view_settings(self.settings(task, next(iter(self.variants(task)))))
                kinds_of(of["corruptions"])
                root = data_root(of["dataset"], None if of["root"] is None else Path(of["root"]))
                if not root.exists() and not self.data_files(task):
                    raise ConfigError(f"root {root} does not exist; give the folder of the data set")
                if of["slides"] and of["mpp"] is None:
                    raise ConfigError("slides are to be segmented, but mpp is not said; give the images' mpp")
            except ConfigError as error:
                raise ConfigError(f"config: segmentation.tasks.{task}: {error}") from None

    def models(self, task: str) -> list[str]:
        """Encoders of a task."""
        chosen = self.tasks[task]["models"]
        return list(self._plan.models if chosen is None else chosen)

    def variants(self, task: str) -> dict[str, Variant]:
        """Ways to train of a task, by name."""
        of = self.tasks[task]
        found = [Variant(*each) for each in _product(of["train"], of["decoders"], of["seeds"])]
        return {variant.name: variant for variant in found}

    @property
    def all_variants(self) -> list[str]:
        """Names of all ways to train, of all tasks."""
        return list(dict.fromkeys(name for task in self.tasks for name in self.variants(task)))

    def folders(self, *, corrupted: bool = False) -> list[str]:
        """Folders of all trainings; or of those that are asked about corrupted images."""
        return [
            f"<results>/segmentation/{task}/{model}/{variant}"
            for task in self.tasks
            if self.tasks[task]["corruptions"] or not corrupted
            for model in self.models(task)
            for variant in self.variants(task)
        ]

    def slide_maps(self) -> list[str]:
        """Class maps of whole slides that are wanted, by the first seed of each way to train."""
        return [
            f"<results>/segmentation/{task}/{model}/{name}/slides/{slide}.tiff"
            for task, of in self.tasks.items()
            for model in self.models(task)
            for name, variant in self.variants(task).items()
            if variant.seed == of["seeds"][0]
            for slide in self._slides(task)
        ]

    def settings(self, task: str, variant: str) -> TrainSettings:
        """What a training is told; raises ConfigError, naming the task."""
        of, way = self.tasks[task], self._variant(task, variant)
        given = {name: _frozen(of[name]) for name in _SAME if of[name] is not None}
        given |= {"dataset": of["dataset"], "data": of["data"], "trainable": way.trainable}
        given.setdefault("views", default_views(of["dataset"]))
        try:
            return TrainSettings(decoder=way.decoder, seed=way.seed, **given)
        except ConfigError as error:
            raise ConfigError(f"config: segmentation.tasks.{task}: {error}") from None

    def run_dir(self, task: str, model: str, variant: str) -> Path:
        """Folder of a training."""
        return self._plan.results / "segmentation" / task / model / variant

    def check_seal(self, task: str, model: str, variant: str) -> None:
        """Refuses, while planning, to train on under other settings than a training was begun with.

        Raises:
            SealError: Names the key, the old and the new value, and the way out.
        """
        check_segment_seal(self.run_dir(task, model, variant), self.settings(task, variant))

    def is_finished(self, task: str, model: str, variant: str) -> bool:
        """Whether the training is done: news of its encoder do not rerun it then."""
        return (self.run_dir(task, model, variant) / FINAL_NAME).is_file()

    def encoder_files(self, model: str) -> list[str]:
        """Files of an encoder."""
        return self._features.encoder_files(model)

    def data_files(self, task: str) -> list[str]:
        """Files of a task's images that the workflow itself makes: the manifest of tiles."""
        of = self.tasks[task]
        made = of["dataset"] == "slides" and Path(of["root"] or "").parent == self._plan.results / "manifests"
        return [of["root"]] if made else []

    def train_arguments(self, task: str, model: str, variant: str) -> list[str]:
        """Arguments of segment_train.py for what changes the weights."""
        settings = self.settings(task, variant)
        told = [*self._features.encoder_arguments(model), *self._data(task), "--no-round-img-dim"]
        told += ["--train", settings.trainable, "--decoder", settings.decoder, "--seed", str(settings.seed)]
        for name in _SAME:
            value = getattr(settings, name)
            if value is not None and name != "augmentation":
                words = value if isinstance(value, tuple) else (value,)
                told += [f"--{name.replace('_', '-')}", *map(str, words)]
        for key, value in settings.augmentation.items():
            told += ["--augmentation", f"{key}={json.dumps(value)}"]
        mpp = self.tasks[task]["mpp"]
        return told + ([] if mpp is None else ["--mpp", str(mpp)])

    def asked_arguments(self, task: str, model: str) -> list[str]:
        """Arguments of segment_evaluate.py and segment_corruptions.py for encoder and images."""
        split = self.tasks[task]["split"]
        return [
            *self._features.encoder_arguments(model),
            *self._data(task),
            *([] if split is None else ["--split", split]),
            *("--precision", self.tasks[task]["precision"]),
        ]

    def corruption_arguments(self, task: str) -> list[str]:
        """Arguments of segment_corruptions.py for what is done to images."""
        of = self.tasks[task]
        return ["--kinds", *of["corruptions"], "--severities", *map(str, of["severities"])]

    def slide_arguments(self, task: str, slide: str) -> list[str]:
        """Arguments of segment_predict_slide.py for how closely a slide is looked at, and where.

        The mpp may have been written into the config after the training, whose card does not tell it then.
        """
        told = ["--mpp", str(self.tasks[task]["mpp"])]
        annotations = self._plan.annotation_files.get(slide)
        if annotations is None:
            return [*told, "--tissue-method", self._plan.tissue_method(slide)]
        included = self._plan.config["tissue"]["include"]
        return [*told, "--tissue-method", "annotations", "--annotations", annotations, "--include", *included]

    def _data(self, task: str) -> list[str]:
        of = self.tasks[task]
        root = [] if of["root"] is None else ["--data-root", of["root"]]
        options = [
            part for key, value in of["data"].items() for part in ("--data-option", f"{key}={json.dumps(value)}")
        ]
        return ["--dataset", of["dataset"], *root, *options]

    def _slides(self, task: str) -> list[str]:
        return [self._plan.slide(slide).slide_id for slide in self.tasks[task]["slides"]]

    def _variant(self, task: str, name: str) -> Variant:
        variants = self.variants(task)
        if name not in variants:
            raise ConfigError(
                f"task {task} has no variant {name!r}{nearest(name, variants)}; it has {', '.join(variants)}"
            )
        return variants[name]

    def _check(self, task: str) -> None:
        known = ["base", *self._plan.runs, *self._plan.encoders]
        for model in self.tasks[task]["models"] or ():
            if model not in known:
                raise ConfigError(
                    f"config: segmentation.tasks.{task}.models names {model!r}, which is no model"
                    f"{nearest(model, known)}; known are {', '.join(known)}"
                )
        for variant in self.variants(task):
            self.settings(task, variant)
        self._slides(task)


def _product(trained: list[str], decoders: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    for trainable in trained:
        for decoder in decoders:
            for seed in seeds:
                yield trainable, decoder, seed


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
