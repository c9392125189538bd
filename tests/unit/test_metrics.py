"""training_metrics.json."""

from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import RunError
from dinoscope.train.metrics import append_metrics, best_iteration, metrics_at, read_events, read_metrics


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
    assert read_events(tmp_path) == frame.attrs["events"]


def test_a_full_disk_costs_a_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "training_metrics.json").symlink_to("/dev/full")
    append_metrics(tmp_path, {"iteration": 4})
    assert f"run {tmp_path.name}: a line of metrics cannot be written" in caplog.text


def test_what_a_restart_undid_is_left_out_until_it_is_done_again(tmp_path: Path) -> None:
    for iteration in (9, 19, 29, 39):
        append_metrics(tmp_path, {"iteration": iteration, "total_loss": 1.0})
    append_metrics(tmp_path, {"event": "skipped", "iteration": 33})
    append_metrics(tmp_path, {"event": "resume", "iteration": 20})
    assert list(read_metrics(tmp_path).index) == [9, 19]
    append_metrics(tmp_path, {"iteration": 29, "total_loss": 2.0})
    append_metrics(tmp_path, {"event": "resume", "iteration": 30})
    append_metrics(tmp_path, {"iteration": 39, "total_loss": 3.0})
    assert read_metrics(tmp_path)["total_loss"].to_dict() == {9: 1.0, 19: 1.0, 29: 2.0, 39: 3.0}
    assert [event["iteration"] for event in read_events(tmp_path)] == [33, 20, 30]


def test_lines_need_not_say_the_same(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"iteration": 0, "total_loss": 1.0})
    append_metrics(tmp_path, {"iteration": 1, "total_loss": float("nan"), "rankme": 20.0})
    frame = read_metrics(tmp_path / "training_metrics.json")
    assert frame.columns.tolist() == ["total_loss", "rankme"]
    np.testing.assert_array_equal(frame.to_numpy(), [[1.0, np.nan], [np.nan, 20.0]])


def test_the_published_trainers_lines_are_read_and_restarts_seen(tmp_path: Path) -> None:
    """It writes no events: a restart shows in iterations that go back, and what it undid is not mixed in."""
    path = tmp_path / "training_metrics.json"
    path.write_text("".join(f'{{"iteration": {it}, "total_loss": {it}.0}}\n' for it in (10, 20, 30, 40)))
    assert read_metrics(tmp_path).attrs["events"] == []
    with open(path, "a") as file:
        file.write('{"iteration": 30, "total_loss": -1.0}\n{"iteration": 30, "total_loss": -2.0}\n')
    frame = read_metrics(tmp_path)
    assert frame["total_loss"].to_dict() == {10: 10.0, 20: 20.0, 30: -2.0}
    assert [(event["event"], event["iteration"]) for event in frame.attrs["events"]] == [("resume", 30)]
    assert read_events(tmp_path) == []


def test_a_run_that_starts_over_has_only_what_it_did_since(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"event": "start", "iteration": 0})
    append_metrics(tmp_path, {"iteration": 9, "total_loss": 1.0})
    append_metrics(tmp_path, {"event": "start", "iteration": 0})
    with pytest.raises(RunError, match="no iteration yet"):
        read_metrics(tmp_path)
    append_metrics(tmp_path, {"iteration": 4, "total_loss": 2.0})
    assert read_metrics(tmp_path)["total_loss"].to_dict() == {4: 2.0}


def test_only_numbers_are_metrics(tmp_path: Path) -> None:
    line = '{"iteration": %s, "total_loss": %s, "note": "text", "sizes": [1, 2], "more": {"a": 1}, "none": null}\n'
    text = (line % ("0", "NaN")) + (line % ("10.0", "Infinity")) + (line % ("20", "3")) + (line % ("25.5", "4"))
    (tmp_path / "training_metrics.json").write_text(text)
    frame = read_metrics(tmp_path)
    assert frame.columns.tolist() == ["total_loss"] and frame.index.tolist() == [0, 10, 20]
    np.testing.assert_array_equal(frame["total_loss"], [np.nan, np.inf, 3])


@pytest.mark.parametrize(
    "rest",
    [b"\0\0\0\0", b'{"iteration": 5, "note": "\xc3', b"[1]\n", b'{"iteration": "x"}', b"\xff\xfe", b"[" * 100_000],
)
def test_whatever_a_power_cut_left_at_the_end_spoils_nothing(tmp_path: Path, rest: bytes) -> None:
    append_metrics(tmp_path, {"iteration": 4, "total_loss": 1.0})
    with open(tmp_path / "training_metrics.json", "ab") as file:
        file.write(rest)
    assert read_metrics(tmp_path)["total_loss"].to_dict() == {4: 1.0}
    append_metrics(tmp_path, {"iteration": 5, "total_loss": 2.0})
    assert read_metrics(tmp_path)["total_loss"].to_dict() == {4: 1.0, 5: 2.0}


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    for read in (read_metrics, read_events):
        with pytest.raises(RunError, match="does not exist"):
            read(tmp_path)
    (tmp_path / "training_metrics.json").touch()
    with pytest.raises(RunError, match=r"is empty: .*try again later"):
        read_metrics(tmp_path)
    append_metrics(tmp_path, {"event": "start", "iteration": 0})
    with pytest.raises(RunError, match="no iteration yet"):
        read_metrics(tmp_path)
    (tmp_path / "other.json").write_text('[\n  {"loss": 3}\n]\n')
    with pytest.raises(RunError, match=r"no line of it is a JSON object .* give a run's training_metrics\.json"):
        read_metrics(tmp_path / "other.json")


def test_the_best_of_some_iterations(tmp_path: Path) -> None:
    for iteration, value in ((9, 3.0), (19, 5.0), (29, None), (39, 1.0)):
        line = {"iteration": iteration} | ({} if value is None else {"rankme": value})
        append_metrics(tmp_path, line)
    assert best_iteration(tmp_path, [9, 19, 39], "rankme") == 19
    assert best_iteration(tmp_path, [9, 19, 39], "-rankme") == 39
    # an export counts with what was logged last before it
    assert best_iteration(tmp_path, [14, 35, 45], "rankme") == 35
    assert best_iteration(tmp_path, [5, 14], "-rankme") == 14
    assert best_iteration(tmp_path, [5], "rankme") is None
    assert best_iteration(tmp_path, [9, 19], "accuracy") is None
    assert best_iteration(tmp_path / "none", [9], "rankme") is None


def test_metrics_at_an_iteration_are_the_last_ones_known_then_and_finite(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"iteration": 4, "total_loss": 3.0, "lr": 0.5})
    append_metrics(tmp_path, {"iteration": 9, "total_loss": float("inf"), "lr": 0.25, "rankme": float("nan")})
    assert metrics_at(tmp_path, 8) == {"total_loss": 3.0, "lr": 0.5}
    assert metrics_at(tmp_path) == metrics_at(tmp_path, 9) == {"lr": 0.25}
    assert metrics_at(tmp_path, 3) == {}
    with pytest.raises(RunError, match="does not exist"):
        metrics_at(tmp_path / "none")
