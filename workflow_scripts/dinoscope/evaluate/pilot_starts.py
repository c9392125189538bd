"""Whether the arms of a pilot began from the very weights that they are held against."""

from collections.abc import Sequence
from pathlib import Path

from dinoscope.errors import SealError
from dinoscope.evaluate.pilot import Arm
from dinoscope.models.weights import read_model_file, state_digest
from dinoscope.train.seal import read_seal

__all__ = ["check_starts"]


def check_starts(runs: Path, arms: Sequence[Arm], base: Path) -> None:
    """Refuses a comparison with other weights than the arms were adapted from.

    Finished runs keep what they began with, whatever becomes of the file: the starting weights that are measured may
    be newer than the arms.

    Args:
        runs: Folder of the runs.
        arms: Of the pilot.
        base: The starting weights as they are now.

    Raises:
        SealError: Names the arm and the way out.
    """
    now = state_digest(read_model_file(base).backbone)
    for arm in arms:
        seal = read_seal(runs / arm.run)
        before = None if seal is None else seal["inputs"].get("weights")
        if before != now:
            raise SealError(
                f"{arm.run} began from other weights ({str(before)[:8]}) than {base} has now ({now[:8]}), so that "
                "nothing can be said of what adaptation did: give the pilot another name (pilot.name), or put the "
                "weights back"
            )
