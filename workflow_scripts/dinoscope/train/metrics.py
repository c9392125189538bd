"""`training_metrics.json`: one JSON object a line, appended while training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscope.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS_NAME", "append_metrics", "read_metrics"]

METRICS_NAME = "training_metrics.json"


def append_metrics(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Appends one line; a line that a kill cut short before is closed first, so that it spoils nothing after it."""
    path = run_dir / METRICS_NAME
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(values).encode() + b"\n")


def read_metrics(run: str | Path) -> "pd.DataFrame":
    """Metrics of a run, ours or the published trainer's.

    Args:
        run: A run's folder or its training_metrics.json.

    Returns:
        One row an iteration (the index); where a restart repeated an iteration the later line counts. Lines with a key
        "event" (starts, resumes, gram teacher updates) are in `frame.attrs["events"]`, in file order.

    Raises:
        RunError: There is no such file, or it holds no iteration.
    """
    import pandas as pd

    path = Path(run)
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise RunError(f"{path} does not exist; give a run's folder or its {METRICS_NAME}")
    lines = [line for text in path.read_text(encoding="utf-8").splitlines() if (line := _parse(text)) is not None]
    rows = [line for line in lines if "event" not in line and "iteration" in line]
    if not rows:
        raise RunError(f"{path} holds no iteration yet")
    frame = pd.DataFrame(rows).drop_duplicates("iteration", keep="last").set_index("iteration").sort_index()
    frame.attrs["events"] = [line for line in lines if "event" in line]
    return frame


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:  # cut short by a kill
        return None
    return line if isinstance(line, dict) else None
