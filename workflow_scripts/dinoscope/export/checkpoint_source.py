"""What a training checkpoint is of: its DCP folder, the run around it, and the networks that it holds.

Ours, and those laid out as the published trainer writes them: tensors named `student.…`, `teacher.…` (or `model_ema.…`,
the same under another name) and `gram_teacher.…`, with or without `model.` before them, each with the children
`backbone`, `dino_head` and `ibot_head`; an optimizer beside them; and sharded exports of a teacher alone.
"""

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscope.errors import CheckpointError, ConfigError
from dinoscope.files import read_json
from dinoscope.models.tensor_files import listed
from dinoscope.recipe import load_recipe
from dinoscope.train.checkpoint_files import require_whole
from dinoscope.train.dcp_files import stored_tensors
from dinoscope.train.run_folder import newest_checkpoint
from dinoscope.train.seal import SEAL_NAME, read_seal

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["NETWORKS", "Source", "locate"]

_log = logging.getLogger(__name__)
NETWORKS = ("teacher", "student", "gram_teacher")
_CHILDREN = ("backbone.", "dino_head.", "ibot_head.")
_ALIASES = {"teacher": ("teacher.", "model_ema.")}
# What wrappers put into names: FSDP, torch.compile, activation checkpointing, DDP.
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


@dataclass(frozen=True)
class Source:
    """A DCP folder, and the folder of the run that it lies in (None for a folder that was copied out of one)."""

    folder: Path
    run_dir: Path | None

    @property
    def iteration(self) -> int | None:
        """The 0-based index of the last iteration in it: as the folder, or the one around it, is called."""
        names = (self.folder.name, self.folder.parent.name)
        matches = (re.fullmatch(r"(?:training_)?(\d+)(?:_keep)?", name) for name in names)
        return next((int(match[1]) for match in matches if match), None)

    @functools.cached_property
    def seal(self) -> dict[str, Any]:
        """The seal of the run; empty where the run is not ours."""
        return (read_seal(self.run_dir) or {}) if self.run_dir else {}

    @functools.cached_property
    def config(self) -> "RunConfig | None":
        """The settings of the run, None if there are none that we can read.

        Raises:
            ConfigError, CheckpointError: They are ours, and damaged or gone.
        """
        path = self.run_dir / "config.yaml" if self.run_dir else None
        if path is None or not path.is_file():
            if self.seal:
                raise CheckpointError(f"{self.run_dir} has no config.yaml; put it back")
            return None
        try:
            return load_recipe(path)
        except ConfigError as error:
            if self.seal:
                raise
            _log.warning("config.yaml of the run cannot be read, so what no tensor tells is assumed: %s", error)
            return None

    def networks(self) -> list[str]:
        """Those of NETWORKS that the folder holds."""
        return [network for network in NETWORKS if self.names(network)]

    def names(self, network: str) -> dict[str, str]:
        """Name within a network, e.g. "backbone.cls_token" -> name in the folder; empty if it is not there.

        Raises:
            CheckpointError: The network has a child that none of ours has.
        """
        for alias in _ALIASES.get(network, (f"{network}.",)):
            if found := _below(alias, self._plain_names):
                return found
        # an export of a teacher alone says no more than the children
        return _below("", self._plain_names) if network == "teacher" else {}

    @functools.cached_property
    def _plain_names(self) -> dict[str, str]:
        """Names without `model.` and what wrappers put into them -> names in the folder, of all tensors."""
        plain: dict[str, str] = {}
        for name in stored_tensors(self.folder):
            short = _WRAPPERS.sub("", name).removeprefix("model.")
            if short in plain and not name.startswith("optimizer."):
                raise CheckpointError(
                    f"checkpoint {self.folder} has both {plain[short]} and {name}; they mean the same"
                )
            plain[short] = name
        return plain


def locate(checkpoint: Path) -> Source:
    """What a path stands for.

    Args:
        checkpoint: final.json of a run, the run's folder (its newest complete checkpoint, also while it is training),
            a folder `ckpt/<it>`, or a sharded teacher export.

    Raises:
        CheckpointError: None of these, or damaged.
    """
    checkpoint = checkpoint.expanduser().resolve()
    if checkpoint.name == "final.json" and checkpoint.is_file():
        final = read_json(checkpoint)
        if not isinstance(final, dict) or "checkpoint" not in final:
            raise CheckpointError(f"{checkpoint} names no checkpoint; it is not what a finished run writes")
        source = Source(checkpoint.parent / final["checkpoint"], checkpoint.parent)
    elif (checkpoint / ".metadata").is_file():
        source = Source(checkpoint, _run_around(checkpoint))
    elif (newest := newest_checkpoint(checkpoint, "checksums")) is not None:
        return Source(newest[1], checkpoint)  # looked through already
    else:
        raise CheckpointError(
            f"{checkpoint} is neither a final.json, nor a complete checkpoint folder (ckpt/<it> with .metadata), "
            "nor the folder of a run that has one"
        )
    require_whole(source.folder, "checksums")
    return source


def _run_around(folder: Path) -> Path | None:
    """The run's folder: the nearest above (run/ckpt/<it>, run/eval/training_<it>/…) with a seal or settings."""
    marks = (SEAL_NAME, "config.yaml")
    return next((up for up in folder.parents[:3] if any((up / mark).is_file() for mark in marks)), None)


def _below(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    children = tuple(prefix + child for child in _CHILDREN)
    found = {name.removeprefix(prefix): names[name] for name in names if name.startswith(children)}
    unknown = [name for name in names if prefix and found and name.startswith(prefix) and not name.startswith(children)]
    if unknown:
        raise CheckpointError(f"{prefix.removesuffix('.')} has tensors that are unknown: {listed(unknown)}")
    return found
