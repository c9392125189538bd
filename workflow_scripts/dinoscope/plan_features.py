"""What the jobs that make features are told while planning: encoder, tiles, what is taken, which slides are wanted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.features.sharing import cards_beside, write_wanted
from dinoscope.plan import Plan
from dinoscope.slides.remote import remote_address
from dinoscope.user_code import function_file, is_function_name

__all__ = ["EXPORT_FILES", "FeatureJobs"]

# Files of a slide, in the layout that each tool expects, under RESULTS/exports/FORMAT/MODEL.
EXPORT_FILES = {
    "clam": ("pt_files/{slide}.pt", "h5_files/{slide}.h5"),
    "anndata": ("{slide}.h5ad",),
    "stamp": ("{slide}.h5",),
    "parquet": ("{slide}.parquet",),
    "wsidata": ("{slide}.zarr",),
}
_BASELINES_VERSION = "1"  # of evaluate/baseline_encoders.py, whose file is not watched
# Files of a model's folder that its features depend on.
_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pth", ".pt")


class FeatureJobs:
    """Arguments and inputs of the jobs that make features of a plan's slides."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._settings = plan, plan.config["features"]

    def tiles(self, model: str) -> str:
        """Pattern of the tile manifests that a model's features are taken from."""
        return f"<results>/tiles/{self.tile_set(model)}/{{slide}}.parquet"

    def tile_set(self, model: str) -> str:
        """The tile set that they are of."""
        return self._encoder(model).get("set") or self._settings["set"]

    def pooling(self, model: str) -> str:
        """What is taken of a tile with this model."""
        return self._encoder(model).get("pooling") or self._settings["pooling"]

    def encoder_files(self, model: str) -> list[str]:
        """The files that an encoder consists of, as far as they are known; when they change, features are made anew."""
        if not self._encoder(model):
            return [f"<results>/models/{model}/teacher.pth", f"<results>/models/{model}/model.json"]
        encoder = self._encoder(model)
        source = Path(encoder["source"])
        if is_function_name(encoder["source"]) and not source.exists():
            function = function_file(encoder["source"])
            files = [] if function is None else [function]
        elif source.is_dir():
            files = sorted(path for path in source.iterdir() if path.suffix in _MODEL_SUFFIXES)
        else:
            files = [source, *cards_beside(source)]
        return [*map(str, files), *encoder["files"]]

    def source(self, model: str) -> str:
        """Where the encoder is loaded from."""
        return self.encoder_arguments(model)[1]

    def architecture(self, model: str) -> str | None:
        """timm's name of the encoder, where its file does not tell it."""
        return self._encoder(model).get("architecture")

    def encoder_arguments(self, model: str) -> list[str]:
        """Arguments of extract_features.py that name the encoder."""
        if not self._encoder(model):
            return ["--weights", str(self._plan.results / "models" / model / "teacher.pth")]
        encoder = self._encoder(model)
        arguments = ["--weights", encoder["source"]]
        if encoder["architecture"] is not None:
            arguments += ["--architecture", encoder["architecture"]]
        if encoder["files"]:
            arguments += ["--encoder-files", *encoder["files"]]
        return arguments + (["--encoder-version", encoder["version"]] if encoder["version"] else [])

    def taken(self) -> list[str]:
        """Arguments of extract_features.py that change the features of all models; defaults need none."""
        dense = ["--dense"] if self._settings["dense"] else []
        precision = self._settings["precision"]
        return dense + ([] if precision == "auto" else ["--precision", precision])

    def speed(self) -> list[str]:
        """Arguments that change nothing but speed."""
        arguments = ["--compile"] if self._settings["compile"] else []
        for key in ("batch_size", "workers", "slides_per_job"):
            arguments += [f"--{key.replace('_', '-')}", str(self._settings[key])]
        return arguments

    def exports(self) -> list[str]:
        """Patterns of the files that features are exported to."""
        return [
            f"<results>/exports/{name}/{{model}}/{file}"
            for name in self._settings["export"]
            for file in EXPORT_FILES[name]
        ]

    def write_wanted(self, jobs: Iterable[Any], folder: Path) -> None:
        """Lists the slides whose features are about to be made, for jobs that go on with others (features/sharing.py).

        Slides on object storage are left out: they are brought for their own job alone.

        Args:
            jobs: Snakemake's, those that are to run.
            folder: Of the lists.
        """
        wanted, tiles_to_come = [], []
        for job in jobs:
            if job.rule.name == "extract_features" and not remote_address(self._plan.slide(job.wildcards.slide).path):
                slide = self._plan.slide(job.wildcards.slide).path
                wanted.append((job.wildcards.model, slide, str(job.input.tiles), str(job.output.features)))
            elif job.rule.name == "tile_slide":
                tiles_to_come += map(str, job.output.tiles)
        write_wanted(folder, wanted, tiles_to_come)

    def _encoder(self, model: str) -> dict[str, Any]:
        """Settings of an encoder of other origin, a baseline of evaluation among them; nothing for models of ours."""
        if BASELINES.get(model) is not None:
            source = {"source": BASELINES[model], "architecture": None, "set": None, "pooling": "cls"}
            return source | {"files": [], "version": _BASELINES_VERSION}
        return self._plan.encoders.get(model, {})
