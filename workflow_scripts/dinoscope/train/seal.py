"""What a run was started with, sealed in its folder: nothing that changes the weights may differ when it goes on.

`run_config.json` holds the settings (key -> value), and the digests of the manifest, the starting weights, the run that
is continued and the gram teacher. Nothing here imports torch: the same check runs when Snakemake plans.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoscope.config import RunConfig
from dinoscope.errors import SealError
from dinoscope.files import read_json, write_json, write_text
from dinoscope.recipe import flatten, load_recipe
from dinoscope.train.metrics import METRICS_NAME
from dinoscope.train.run_folder import complete_checkpoints

__all__ = ["SEAL_NAME", "check_seal", "read_seal", "seal_or_compare", "sealed_settings"]

SEAL_NAME = "run_config.json"
_NOT_SEALED = (
    "MODEL.WEIGHTS",  # the digest of what it holds is sealed instead
    "gram.ckpt",
    "checkpointing.",
    "evaluation.",
    "compute_precision.sharding_strategy",
    "optim.epochs",  # a run may be extended
    "train.num_workers",
    "train.compile",
    "train.checkpointing",
    "train.log_every",
)
_INPUT_NAMES = {
    "manifest": "the tile manifest",
    "weights": "the starting weights",
    "continues": "the run that is continued",
    "gram_teacher": "the gram teacher",
}


def sealed_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of all settings that change the weights."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(_NOT_SEALED)}


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
    seal = read_seal(Path(run_dir))
    config = load_recipe(recipe, overrides)
    if seal is not None and complete_checkpoints(Path(run_dir)):
        _compare_settings(Path(run_dir).name, seal["settings"], sealed_settings(config))


def seal_or_compare(run_dir: Path, config: RunConfig, inputs: dict[str, str | None], origin: str) -> None:
    """Seals a new run, or refuses to go on with one that was started otherwise.

    A run that has no checkpoint yet has nothing to lose and is sealed anew.

    Args:
        run_dir: The run's folder; nothing in it is changed when the run is refused.
        config: The resolved recipe.
        inputs: Digests under "manifest", "weights", "continues" and "gram_teacher"; None where there is none.
        origin: Where the weights come from in the end, for the model card.
    """
    settings = sealed_settings(config)
    seal = read_seal(run_dir)
    if seal is None or not complete_checkpoints(run_dir):
        (run_dir / METRICS_NAME).unlink(missing_ok=True)  # of an attempt that came to nothing
        write_text(run_dir / "config.yaml", _without_folders(config))
        write_json(run_dir / SEAL_NAME, {"version": 1, "origin": origin, "inputs": inputs, "settings": settings})
        return
    _compare_settings(run_dir.name, seal["settings"], settings)
    for key, name in _INPUT_NAMES.items():
        old, new = seal["inputs"].get(key), inputs.get(key)
        if old != new:
            raise SealError(
                f"run {run_dir.name} was started with another version of {name} ({_short(old)}, now {_short(new)}); "
                "a run keeps the data it started with: give a new run name, or delete the run's folder to start over"
            )


def _without_folders(config: RunConfig) -> str:
    """The resolved recipe as YAML; of weight files only their names, since results hold no absolute paths."""
    named = OmegaConf.create(OmegaConf.to_container(config))
    named.MODEL.WEIGHTS = Path(named.MODEL.WEIGHTS).name
    if named.gram.ckpt:
        named.gram.ckpt = Path(named.gram.ckpt).name
    return OmegaConf.to_yaml(named)


def _compare_settings(run: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:3])
        more = f", and {len(changed) - 3} more keys" if len(changed) > 3 else ""
        raise SealError(
            f"run {run} was started with other settings: {shown}{more}; change them back, give a new run name, "
            "or delete the run's folder to start over"
        )


def _short(digest: str | None) -> str:
    return digest[:8] if digest else "none"
