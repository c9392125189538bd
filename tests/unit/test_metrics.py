"""training_metrics.json."""

from pathlib import Path

import pytest

from dinoscope.errors import RunError
from dinoscope.train.metrics import append_metrics, read_metrics


def test_the_later_line_of_an_iteration_counts_and_cut_lines_spoil_nothing(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"event": "start", "iteration": 0})
    for iteration in (4, 9, 14):
        append_metrics(tmp_path, {"iteration": iteration, "total_loss": float(iteration)})
    with open(tmp_path / "training_metrics.json", "a") as file:
        file.write('{"iteration": 19, "total_l')  # a kill in the middle of a write
    append_metrics(tmp_path, {"event": "resume", "iteration": 10})
    append_metrics(tmp_path, {"iteration": 14, "total_loss": -1.0})
    frame = read_metrics(tmp_path)
    assert frame["total_loss"].to_dict() == {4: 4.0, 9: 9.0, 14: -1.0}
    assert [event["event"] for event in frame.attrs["events"]] == ["start", "resume"]


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        read_metrics(tmp_path)
    append_metrics(tmp_path, {"event": "start", "iteration": 0})
    with pytest.raises(RunError, match="no iteration yet"):
        read_metrics(tmp_path)
