"""What of the config's section `evaluation` is refused while planning, so that no training runs into it at its end."""

import re
from collections.abc import Sequence
from pathlib import Path

from dinoscope.errors import ConfigError
from dinoscope.names import nearest

__all__ = ["MEASURES", "check_groups", "check_measure"]

# Of evaluate/measuring.py and evaluate/masked.py, by kind of label; attention MIL besides.
MEASURES = {
    "classes": ("linear", "knn_1", "knn_5", "knn_20", "few_shot_1", "few_shot_5", "few_shot_10"),
    "number": ("ridge",),
    "survival": ("cox",),
    "masks": ("dense",),
}
_CHANGES = ("linear_change", "ridge_change", "cox_change")  # what is lost under a change, MEASURE~CHANGE


def check_groups(key: str, groups: str | None) -> None:
    """Refuses a table of groups that is not there, and a pattern that is none.

    Args:
        key: Of the config, for messages.
        groups: Its value.

    Raises:
        ConfigError: One sentence.
    """
    if groups is None:
        return
    if Path(groups).suffix.lower() in (".csv", ".tsv"):
        if not Path(groups).is_file():
            raise ConfigError(f"{key}: {groups} does not exist; write a table with columns file and group")
        return
    try:
        re.compile(groups)
    except re.error as error:
        raise ConfigError(
            f"{key} is {groups!r}, which is neither a table (.csv, .tsv) nor a regular expression ({error})"
        ) from None


def check_measure(primary: str, known: Sequence[str]) -> None:
    """Refuses a primary endpoint that is no measure of its task.

    Args:
        primary: TASK/MEASURE, maybe MEASURE~CHANGE or MEASURE@SPLIT.
        known: Measures of the task on unchanged tiles.

    Raises:
        ConfigError: One sentence.
    """
    task, _, measure = primary.partition("/")
    stem = re.split("[~@]", measure)[0]
    if stem not in known and not ("~" in measure and stem in _CHANGES):
        raise ConfigError(
            f"config: evaluation.primary is {primary!r}, but {measure!r} is no measure of {task}"
            f"{nearest(measure, known)}; give {task}/ and one of {', '.join(known)}"
        )
