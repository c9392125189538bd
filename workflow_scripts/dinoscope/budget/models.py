"""Widths, sizes and operations of the models of a plan, and what its training runs will take (train/forecast.py)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoscope.errors import DinoscopeError
from dinoscope.files import read_json
from dinoscope.models.registry import ViTSettings, settings_from_config
from dinoscope.plan import Plan, Run
from dinoscope.train.forecast import Forecast, forecast

__all__ = ["Device", "FeatureShape", "ModelSizes"]

_USUAL_WIDTH, _USUAL_PARAMETERS, _USUAL_PATCH = 1024, 304_000_000, 16  # of an encoder that no file tells of: a ViT-L


@dataclass(frozen=True)
class Device:
    """What training and extraction will compute on.

    Attributes:
        kind: "cuda", "cpu", …
        count: Devices of all machines together; on CPUs, processes.
        flops: Of matrix products, FLOP/s of all of them together.
        source: Where `flops` comes from, in words.
        bytes: Memory of one of them; None where that is unknown.
        per_machine: How many of them a machine has.
        training_share: Of `flops` that a training reaches.
        extraction_share: Of `flops` that a forward pass reaches.
    """

    kind: str
    count: int
    flops: float
    source: str
    bytes: int | None
    per_machine: int
    training_share: float
    extraction_share: float


@dataclass(frozen=True)
class FeatureShape:
    """Features that a model makes of a tile: `width` numbers, and `patches` numbers where every patch is kept."""

    width: int
    patches: int
    guessed: bool


class ModelSizes:
    """What is known of the models of a plan without making any."""

    def __init__(self, plan: Plan, device: Device, num_images: Mapping[str, int]) -> None:
        """Of a plan.

        Args:
            plan: The plan.
            device: What it is computed on.
            num_images: Run -> number of tiles that it is trained on.
        """
        self._plan, self._device, self._num_images = plan, device, num_images

    def settings(self, model: str) -> ViTSettings | None:
        """The backbone of one of our models; None for an encoder of other origin."""
        if model in self._plan.encoders:
            return None
        run = self._plan.runs.get(model, self._plan.base_run)
        return settings_from_config(run.settings.student)

    def features(self, model: str, pooling: str, tile_px: int) -> FeatureShape:
        """Of one tile.

        Args:
            model: The model.
            pooling: What is taken of a tile.
            tile_px: Its side.
        """
        settings = self.settings(model)
        if settings is None:
            width, storage, patch, guessed = self._of_encoder(model)
        else:
            width, storage = settings.embed_dim, settings.num_storage_tokens
            patch, guessed = settings.patch_size, False
        times = {"cls+mean": 2, "cls+storage": 1 + storage}.get(pooling, 1)
        return FeatureShape(width * times, (tile_px // patch) ** 2 * width, guessed)

    def num_parameters(self, model: str) -> int:
        """Of the backbone."""
        run = self._plan.runs.get(model, self._plan.base_run)
        return _USUAL_PARAMETERS if model in self._plan.encoders else self.forecast(run.name).parameters.backbone

    @functools.cache  # noqa: B019 - lives as long as the program
    def forecast(self, run: str) -> Forecast:
        """What the run will take."""
        planned, device = self._plan.runs[run], self._device
        return forecast(
            planned.settings,
            settings_from_config(planned.settings.student),
            device.count,
            max(1, self._num_images[run]),
            device.kind,
            min(device.per_machine, device.count),
            self._distilled(planned),
        )

    def _distilled(self, run: Run) -> object | None:
        if run.distilled_file is None:
            return None
        from dinoscope.train.distillation import read_teacher, teacher_shape

        try:
            return teacher_shape(read_teacher(Path(run.settings.distillation.checkpoint_path)), run.settings)
        except (DinoscopeError, OSError):  # not trained yet
            return None

    def _of_encoder(self, model: str) -> tuple[int, int, int, bool]:
        """Width, further tokens, side of a patch; and whether they are guessed."""
        source = Path(self._plan.encoders[model]["source"])
        try:
            told = read_json(source / "config.json")
        except (DinoscopeError, OSError):
            return _USUAL_WIDTH, 4, _USUAL_PATCH, True
        width = told.get("hidden_size") or told.get("num_features")
        if not isinstance(width, int):
            return _USUAL_WIDTH, 4, _USUAL_PATCH, True
        return width, told.get("num_register_tokens") or 0, told.get("patch_size") or _USUAL_PATCH, False
