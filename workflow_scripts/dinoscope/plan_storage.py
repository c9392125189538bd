"""Which results are copied to object storage."""

from collections.abc import Iterator

from dinoscope.errors import ConfigError
from dinoscope.plan import Plan
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import EXPORT_FILES
from dinoscope.plan_segmentation import SegmentJobs

__all__ = ["StorageJobs"]

_OF_MODEL = ("teacher.pth", "teacher.safetensors", "model.json")
_OF_SEGMENTER = ("final.json", "evaluation.json", "classes.tsv", "images.tsv", "examples.png")
_OF_CORRUPTIONS = ("corruptions.json", "corruptions.tsv", "corruptions.png")


class StorageJobs:
    """The objects of a plan's results."""

    def __init__(self, plan: Plan, evaluation: EvaluationJobs, segments: SegmentJobs) -> None:
        self._plan, self._settings = plan, plan.config["storage"]
        self._of_evaluation, self._of_segments = evaluation, segments

    def objects(self) -> list[str]:
        """Addresses of all that is asked for, s3://BUCKET/KEY.

        Raises:
            ConfigError: The config names no place for them.
        """
        place = self._settings["results"]
        if place is None:
            raise ConfigError("config: storage.results is null; give s3://BUCKET/PREFIX, where results are copied to")
        kinds = {
            "features": self._features,
            "models": self._models,
            "tiles": self._tiles,
            "evaluation": self._evaluation,
            "segmentation": self._segmentation,
            "report": self._report,
        }
        return [f"{place.rstrip('/')}/{file}" for kind in self._settings["upload"] for file in kinds[kind]()]

    def _features(self) -> Iterator[str]:
        for model in self._plan.models:
            for slide in self._plan.feature_slides:
                yield f"features/{model}/{slide}.h5"
                for export in self._plan.config["features"]["export"]:
                    for file in EXPORT_FILES[export]:
                        yield f"exports/{export}/{model}/{file.format(slide=slide)}"

    def _models(self) -> Iterator[str]:
        for model in self._plan.own_models:
            yield from (f"models/{model}/{file}" for file in _OF_MODEL)

    def _tiles(self) -> Iterator[str]:
        for name in self._plan.config["tiling"]["sets"]:
            yield from (f"tiles/{name}/{slide}.parquet" for slide in self._plan.slides)
        yield "slides.parquet"

    def _evaluation(self) -> Iterator[str]:
        if tasks := self._of_evaluation.tasks:
            yield from ("evaluation/summary.tsv", "evaluation/summary.json")
            yield from (f"evaluation/{task}/figure.png" for task in tasks)

    def _segmentation(self) -> Iterator[str]:
        if not self._of_segments.tasks:
            return
        yield from ("segmentation/comparison.tsv", "segmentation/runs.tsv")
        folders = [(self._of_segments.folders(), _OF_SEGMENTER)]
        folders += [(self._of_segments.folders(corrupted=True), _OF_CORRUPTIONS)]
        for each, files in folders:
            yield from (f"{_within_results(folder)}/{file}" for folder in each for file in files)
        for classes in self._of_segments.slide_maps():
            stem = _within_results(classes).removesuffix(".tiff")
            yield from (f"{stem}{suffix}" for suffix in (".tiff", ".geojson", ".tsv", ".png"))

    @staticmethod
    def _report() -> Iterator[str]:
        yield from ("report.html", "slides_report.tsv")


def _within_results(path: str) -> str:
    return path.removeprefix("<results>/")
