"""What a run was started with, sealed in its folder: nothing that changes the weights may differ when it goes on.

`run_config.json` holds the settings (key -> value), the batch over all processes, and the digests of what the run took
in when it started: tiles or images, starting weights, the run that it continues, and the gram teacher. A run goes on
with those whatever becomes of them; other settings are refused. Nothing here imports torch: the same check runs when
Snakemake plans.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoscope.config import RunConfig
from dinoscope.data.sources import name_without_folders
from dinoscope.errors import ConfigError, SealError
from dinoscope.files import read_json, write_json, write_text
from dinoscope.recipe import flatten, load_recipe
from dinoscope.train.metrics import METRICS_NAME
from dinoscope.train.run_folder import complete_checkpoints

__all__ = [
    "SEAL_NAME",
    "check_seal",
    "compare_order",
    "compare_pixels",
    "compare_reader",
    "compare_with_seal",
    "read_seal",
    "seal_run",
    "sealed_settings",
    "write_config",
]

_log = logging.getLogger(__name__)
SEAL_NAME = "run_config.json"
_NOT_SEALED = (
    "MODEL.WEIGHTS",  # the digest of what it holds is sealed instead
    "gram.ckpt",
    "distillation.checkpoint_path",
    "checkpointing.",
    "evaluation.",
    "compute_precision.sharding_strategy",
    "optim.epochs",  # a run may be extended
    "train.batch_size_per_gpu",  # the batch over all processes is sealed instead
    "train.accumulation_steps",
    "train.num_workers",
    "train.time_limit_minutes",
    "train.hang_minutes",
    "train.stop_after_skipped",
    "train.compile",
    "train.checkpointing",
    "train.log_every",
)
_DATA = "train.dataset_path"  # sealed by name; the digest of the images is sealed as well
_WAY_OUT = "give a new run name, or delete the run's folder to start over"


def sealed_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of all settings that change the weights."""
    named = flatten(config) | {_DATA: name_without_folders(config.train.dataset_path)}
    return {key: value for key, value in named.items() if not key.startswith(_NOT_SEALED)}


def read_seal(run_dir: Path) -> dict[str, Any] | None:
    """The seal of a run folder, None if the run was never started."""
    path = run_dir / SEAL_NAME
    return read_json(path) if path.is_file() else None


def check_seal(run_dir: str | Path, recipe: str | Path, overrides: Sequence[str] = ()) -> None:
    """Compares a recipe with the settings that a run was started with; a run without a checkpoint passes.

    Raises:
        SealError: Names the key, the old and the new value, and the way out.
        ConfigError: The recipe itself is wrong.
    """
    config = load_recipe(recipe, overrides)
    checkpoints = complete_checkpoints(Path(run_dir))
    if checkpoints:
        _compare(Path(run_dir), config, max(checkpoints))


def seal_run(
    run_dir: Path,
    config: RunConfig,
    global_batch: int,
    inputs: dict[str, str | None],
    origin: str,
    slides: Sequence[str] = (),
    distilled: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Seals a run that begins.

    What an earlier attempt left that came to no checkpoint is removed: it has nothing to lose.

    Args:
        run_dir: The run's folder.
        config: The resolved recipe.
        global_batch: Tiles of one step over all processes.
        inputs: Digests under "manifest" or "images", "strata", "stains", "pixels", "reader", "weights",
            "continues", "gram_teacher" and "distillation"; None where there is none.
        origin: Where the weights come from in the end, for the model card.
        slides: Ids of the slides that the run trains on, if it is slides.
        data: Sizes and mpp of tiles and crops, for model cards (`describe_windows`).
        distilled: What the teacher that it learns from is built from, if it has one (`TeacherShape.as_dict`).
    """
    (run_dir / METRICS_NAME).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "eval", ignore_errors=True)
    write_text(run_dir / "config.yaml", _without_folders(config))
    seal = {"version": 1, "origin": origin, "global_batch": global_batch, "inputs": inputs, "slides": list(slides)}
    seal |= {"batch_size_per_gpu": config.train.batch_size_per_gpu, "distilled": distilled, "data": data}
    write_json(run_dir / SEAL_NAME, seal | {"settings": sealed_settings(config)})


def compare_with_seal(run_dir: Path, config: RunConfig, global_batch: int) -> dict[str, Any]:
    """Refuses to go on with a run under other settings; nothing in its folder is changed then.

    Returns:
        The seal, and under "epochs" the `optim.epochs` that the run had until now.

    Raises:
        SealError: Settings or batch differ, or the run is shorter now than what is done of it.
    """
    seal = _compare(run_dir, config, max(complete_checkpoints(run_dir)))
    if seal["global_batch"] != global_batch:
        raise SealError(
            f"run {run_dir.name} was started with {seal['global_batch']} tiles a step over all processes and would go "
            f"on with {global_batch}: start as many processes as before (launch.processes), or set "
            f"train.batch_size_per_gpu and train.accumulation_steps so that processes × both is {seal['global_batch']}"
        )
    at_once, before = config.train.batch_size_per_gpu, seal.get("batch_size_per_gpu")
    if before not in (None, at_once):
        _log.warning(
            "run %s was started with %d tiles a forward and goes on with %d: KoLeo, kernel density and Gram over all "
            "images compare the tiles of one forward, so these losses are others from here on",
            *(run_dir.name, before, at_once),
        )
    return seal | {"epochs": _epochs_until_now(run_dir)}


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Writes the settings that a run goes on with; to be called when nothing refuses it any more."""
    write_text(run_dir / "config.yaml", _without_folders(config))


def _epochs_until_now(run_dir: Path) -> int | None:
    try:
        return load_recipe(run_dir / "config.yaml").optim.epochs
    except ConfigError:  # gone or damaged: it is written anew
        return None


def compare_order(run_dir: Path, seal: dict[str, Any], strata: str | None, stains: str | None) -> None:
    """Refuses to go on when the slides of a run have got other sites, scanners or stains that it goes by.

    Raises:
        SealError: The order of samples, or how they are distorted, would not be that of the start.
    """
    if "stains" in seal["inputs"] and seal["inputs"]["stains"] != stains:
        raise SealError(
            f"run {run_dir.name} spares colours by the stain of each slide, and column stain of the slide table has "
            f"changed since it was started; change it back, {_WAY_OUT}"
        )
    if seal["inputs"].get("strata") != strata:
        raise SealError(
            f"run {run_dir.name} samples its tiles by site, scanner and stain, and these columns of the slide table "
            f"have changed since it was started; change them back, {_WAY_OUT}"
        )


def compare_pixels(run_dir: Path, seal: dict[str, Any], pixels: str | None) -> None:
    """Refuses to go on with the same tiles in other pixels: from the slides, or packed, as JPEG, in one way or another.

    Raises:
        SealError: They are not those of the start.
    """
    before = seal["inputs"].get("pixels")
    if before == pixels:
        return
    old, new = ("those of the slides" if each is None else f"packed tiles ({each[:20]}…)" for each in (before, pixels))
    raise SealError(
        f"run {run_dir.name} was started on other pixels: {old}, and would go on with {new}; set packing as it was and "
        f"restore the packed files, {_WAY_OUT}"
    )


def compare_reader(run_dir: Path, seal: dict[str, Any], reader: str | None) -> None:
    """Refuses to go on with another slide reader of the user's own, or with the same one after a change.

    Runs from before readers were sealed go on with what there is.

    Raises:
        SealError: It is not that of the start.
    """
    before = seal["inputs"].get("reader", reader)
    if before == reader:
        return
    raise SealError(
        f"run {run_dir.name} was started with slides read by slides.reader {before or 'none'} and would go on with "
        f"{reader or 'none'} (name and digest of its file): a changed reader may give other pixels; put the reader "
        f"back as it was, {_WAY_OUT}"
    )


def _compare(run_dir: Path, config: RunConfig, last_iteration: int) -> dict[str, Any]:
    run, seal = run_dir.name, read_seal(run_dir)
    if seal is None:
        raise SealError(f"run {run} has checkpoints but its {SEAL_NAME} is gone; put it back, or {_WAY_OUT}")
    # keys that came after the run was started had the effect of their defaults
    old = sealed_settings(OmegaConf.structured(RunConfig)) | seal["settings"]
    new = sealed_settings(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:3])
        more = f", and {len(changed) - 3} more keys" if len(changed) > 3 else ""
        raise SealError(f"run {run} was started with other settings: {shown}{more}; change them back, {_WAY_OUT}")
    iterations = config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    if last_iteration + 1 > iterations:
        raise SealError(
            f"run {run} has done {last_iteration + 1} iterations and optim.epochs now asks for {iterations}; "
            f"change it back, {_WAY_OUT}"
        )
    return seal


def _without_folders(config: RunConfig) -> str:
    """The resolved recipe as YAML; weight files and images by name alone: results hold no absolute paths."""
    named = OmegaConf.create(OmegaConf.to_container(config))
    named.MODEL.WEIGHTS = Path(named.MODEL.WEIGHTS).name
    for section, key in ((named.gram, "ckpt"), (named.distillation, "checkpoint_path")):
        if section[key]:
            section[key] = Path(section[key]).name
    named.train.dataset_path = name_without_folders(named.train.dataset_path)
    return OmegaConf.to_yaml(named)
