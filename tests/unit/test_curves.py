import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dinoscope.errors import RunError
from dinoscope.train.metrics import read_metrics
from dinoscope.visualize.curves import MAX_OTHERS, PANELS, RUN_COLORS, bin_curve, curves_svg, draw_curves, save_curves

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "plot_metrics.py"


def metrics(num_iterations: int, seed: int = 0, gram: bool = False, resumed: tuple[int, ...] = ()) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    columns = {column: generator.uniform(0.1, 2, num_iterations) for panel in PANELS for column in panel.columns}
    if not gram:
        del columns["gram_loss"]
    frame = pd.DataFrame(columns, index=pd.RangeIndex(num_iterations, name="iteration"))
    frame.attrs["events"] = [
        {"event": "start", "iteration": 0},
        *({"event": "resume", "iteration": i} for i in resumed),
    ]
    return frame


def published_lines(iterations, seed: int = 0) -> str:
    """Lines with the keys that the published trainer writes."""
    generator = np.random.default_rng(seed)
    keys = ["iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "teacher_temp", "total_loss"]
    keys += ["dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "backbone_grad_norm"]
    rows = [{"iteration": i} | dict(zip(keys, generator.uniform(0.1, 2, len(keys)), strict=True)) for i in iterations]
    return "".join(json.dumps(row | {"batch_size": 64.0}) + "\n" for row in rows)


def panels_of(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def curves_of(axes, color):
    """The lines of one run, without those that mark restarts."""
    return [line for line in axes.lines if line.get_color() == color and len(line.get_xdata()) > 2]


def test_each_panel_shows_what_was_logged():
    frame = metrics(30)
    panels = panels_of(draw_curves({"pretrain": frame}))
    assert set(panels) == {panel.title for panel in PANELS} - {"Gram loss"}
    for panel in PANELS:
        if panel.title not in panels:
            continue
        lines = curves_of(panels[panel.title], RUN_COLORS[0])
        assert len(lines) == len(panel.columns)
        for line, column in zip(lines, panel.columns, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), frame.index)
            np.testing.assert_array_equal(line.get_ydata(), frame[column])


def test_runs_have_colours_of_their_own_and_restarts_are_marked():
    runs = {"pretrain": metrics(40, resumed=(12, 30)), "gram": metrics(20, seed=1, gram=True)}
    figure = draw_curves(runs)
    panels = panels_of(figure)
    for title, count in (("Total loss", 2), ("Gram loss", 0)):
        markers = [line for line in panels[title].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in markers] == [12, 30][:count]
        assert {line.get_color() for line in markers} <= {RUN_COLORS[0]}
    np.testing.assert_array_equal(
        curves_of(panels["Total loss"], RUN_COLORS[1])[0].get_ydata(), runs["gram"]["total_loss"]
    )
    assert not curves_of(panels["Gram loss"], RUN_COLORS[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pretrain", "gram", "resumed"]


def test_events_are_marked_by_kind_each_place_once():
    frame = metrics(1000, gram=True, resumed=(300, 300, 600))
    frame.attrs["events"] += [{"event": "gram_teacher_update", "iteration": i} for i in (250, 500, 250)]
    frame.attrs["events"] += [{"event": "extended", "iteration": 800, "lr_before": 1.0}]
    frame.attrs["events"] += [{"event": "skipped", "iteration": i} for i in range(100, 200)]
    frame.attrs["events"] += [{"event": "another", "iteration": 7}, {"event": "resume"}]
    figure = draw_curves({"gram": frame})
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["gram", "resumed", "gram teacher updated", "extended", "step skipped"]
    for axes in panels_of(figure).values():
        marks = {}
        for line in axes.lines:
            if line.get_gid():
                kind, _, iteration = line.get_gid().split("-")
                marks.setdefault(kind, []).append(int(iteration))
                assert set(line.get_xdata()) == {int(iteration)}
                assert line.get_ydata()[1] == (1 if kind != "skipped" else pytest.approx(0.07))
        skipped = marks.pop("skipped")
        assert marks == {"resume": [300, 600], "gram_teacher_update": [250, 500], "extended": [800]}
        assert skipped[0] == 100 and 20 < len(skipped) <= 30 and skipped[-1] > 190  # ticks, not a hundred lines


def test_old_runs_have_no_panels_for_what_they_did_not_log():
    frame = metrics(30)[["total_loss", "lr", "last_layer_lr"]]
    panels = panels_of(draw_curves({"old": frame}))
    assert set(panels) == {"Total loss", "Learning rate"}
    assert [text.get_text() for text in panels["Learning rate"].get_legend().get_texts()] == ["backbone", "last"]


def test_a_run_of_the_published_trainer_has_its_panels_and_restarts(tmp_path, caplog):
    path = tmp_path / "training_metrics.json"
    lines = published_lines([0, 10, 20, 30, 40]) + published_lines([20, 30, 40, 50], seed=1)
    path.write_text(lines.replace("koleo_loss", "koleo", 3) + '{"iteration": 60, "iter_')
    caplog.set_level(logging.INFO)
    figure = draw_curves({"theirs": read_metrics(path)})
    panels = panels_of(figure)
    assert list(panels) == [
        *("Total loss", "DINO loss, global crops", "DINO loss, local crops", "iBOT loss, masked patches", "KoLeo loss"),
        *("Learning rate", "Weight decay", "Teacher momentum", "Teacher temperature", "Gradient norm"),
        *("Seconds an iteration", "koleo"),
    ]
    assert curves_of(panels["Total loss"], RUN_COLORS[0])[0].get_xdata().tolist() == [0, 10, 20, 30, 40, 50]
    assert len(curves_of(panels["Seconds an iteration"], RUN_COLORS[0])) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["theirs", "resumed"]
    assert "not drawn, as they never change: batch_size 64" in caplog.text
    assert len({axes.get_xlim() for axes in panels.values()}) == 1


def test_ours_beside_theirs(tmp_path):
    (tmp_path / "training_metrics.json").write_text(published_lines(range(0, 300, 10)))
    ours = metrics(40).assign(iter_time=0.5)
    assert "Seconds an iteration" not in panels_of(draw_curves({"ours": ours}))
    panels = panels_of(draw_curves({"ours": ours, "theirs": read_metrics(tmp_path)}))
    assert {"Seconds an iteration", "Throughput, tiles/s"} <= set(panels)
    assert len(curves_of(panels["Total loss"], RUN_COLORS[1])[0].get_xdata()) == 30


def test_values_that_are_not_finite_are_left_out_and_marked():
    frame = metrics(400)
    frame.loc[100:102, "total_loss"] = np.nan
    frame.loc[300, "total_loss"] = -np.inf
    frame.loc[300, "koleo_loss"] = np.inf
    frame["ibot_loss"] = np.nan
    frame["backbone_grad_norm"] = 0.0
    figure = draw_curves({"a": frame})
    figure.canvas.draw()
    panels = panels_of(figure)
    assert "iBOT loss, masked patches" not in panels
    for title in ("Total loss", "KoLeo loss"):
        (curve,) = curves_of(panels[title], RUN_COLORS[0])
        assert np.isfinite(curve.get_ydata()).all() and np.isfinite(panels[title].get_ylim()).all()
    marks = {line.get_gid() for line in panels["Total loss"].lines if line.get_gid()}
    assert marks == {"not finite-a-100", "not finite-a-102", "not finite-a-300"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "loss not finite"]


def test_of_many_unknown_quantities_the_first_are_drawn(caplog):
    others = {f"loss_{number}": np.arange(30.0) * number for number in range(40)}
    panels = panels_of(draw_curves({"a": metrics(30)[["total_loss"]].assign(**others)}))
    assert list(panels) == ["Total loss", *(f"loss_{number}" for number in range(1, 1 + MAX_OTHERS))]
    assert f"loss_{MAX_OTHERS + 1}, " in caplog.text and "loss_39" in caplog.text


def test_titles_and_legends_do_not_overlap():
    figure = draw_curves({"pretrain": metrics(30, gram=True, resumed=(5,))})
    figure.canvas.draw()
    renderer, checked = figure.canvas.get_renderer(), 0
    for axes in figure.axes:
        if axes.axison and axes.get_legend() is not None:
            title, legend = axes._left_title.get_window_extent(renderer), axes.get_legend().get_window_extent(renderer)
            assert title.x1 < legend.x0, axes.get_title(loc="left")
            checked += 1
    assert checked == 4


@pytest.mark.parametrize(("count", "num_bins"), [(1000, 100), (1003, 200), (7, 200), (1, 200), (201, 200)])
def test_bins_are_those_of_a_plain_loop(count, num_bins):
    generator = np.random.default_rng(0)
    curve = pd.Series(generator.normal(size=count), index=np.sort(generator.choice(10 * count, count, replace=False)))
    bins = bin_curve(curve, num_bins)
    members = [[] for _ in range(min(num_bins, count))]
    for position in range(count):
        members[position * len(members) // count].append(position)
    assert max(map(len, members)) - min(map(len, members)) <= 1
    for row, positions in zip(bins.itertuples(), members, strict=True):
        values = curve.iloc[positions]
        expected = (np.mean(curve.index[positions]), values.mean(), values.min(), values.max())
        np.testing.assert_allclose((row.x, row.mean, row.low, row.high), expected)


def test_a_spike_in_a_long_run_stays_visible():
    frame = metrics(50_000)
    frame.loc[12_345, "total_loss"] = 99.0
    axes = panels_of(draw_curves({"long": frame}))["Total loss"]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 99.0
    assert len(curves_of(axes, RUN_COLORS[0])[0].get_xdata()) == 200


def test_gaps_and_single_points_are_drawn():
    frame = metrics(10)
    frame.loc[3:5, "ibot_loss"] = np.nan
    panels = panels_of(draw_curves({"a": frame}))
    assert curves_of(panels["iBOT loss, masked patches"], RUN_COLORS[0])[0].get_xdata().tolist() == [
        0,
        1,
        2,
        6,
        7,
        8,
        9,
    ]
    alone = panels_of(draw_curves({"b": metrics(1)}))["Total loss"]
    assert alone.lines[0].get_marker() == "o"


def test_files_are_of_the_kind_that_their_name_says(tmp_path):
    runs = {"pretrain": metrics(300, resumed=(100,)), "gram": metrics(100, 1, gram=True)}
    for name in ("curves.gif", "curves", "curves.json"):
        with pytest.raises(RunError, match=r"drawn as \.png, \.svg, \.pdf"):
            save_curves(runs, tmp_path / name)
    assert not list(tmp_path.iterdir())
    save_curves(runs, tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    for name in ("curves.png", "curves.svg"):
        save_curves(runs, tmp_path / name)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1500
        assert np.asarray(image.convert("L")).std() > 10
    svg = (tmp_path / "curves.svg").read_bytes()
    assert svg == curves_svg(runs) and b"<svg" in svg and b"<text" not in svg


def test_script_reads_what_training_wrote(tmp_path):
    for name, rows in (("pretrain", 30), ("gram", 10)):
        (tmp_path / name).mkdir()
        lines = metrics(rows).reset_index().to_dict("records")
        lines.insert(5, {"event": "resume", "iteration": 5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "training_metrics.json").write_text(text + '{"iteration": 3')
    files = [tmp_path / "pretrain" / "training_metrics.json", tmp_path / "gram"]
    assert len(read_metrics(files[0])) == 30
    command = [sys.executable, str(SCRIPT), "--output", tmp_path / "out" / "curves.png", "--metrics"]
    subprocess.run([*command, *files], check=True)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 50_000
    twice = subprocess.run([*command, files[0], tmp_path / "pretrain"], capture_output=True, text=True)
    assert twice.returncode == 1 and "two runs called 'pretrain'" in twice.stderr
    gone = subprocess.run([*command, tmp_path / "base"], capture_output=True, text=True)
    assert gone.returncode == 1 and "base" in gone.stderr and "Traceback" not in gone.stderr


def test_script_takes_a_file_alone(tmp_path):
    (tmp_path / "theirs.json").write_text(published_lines(range(0, 300, 10)))
    (tmp_path / "mine.json").write_text(published_lines(range(0, 200, 10), seed=1)[:-30])
    (tmp_path / "notes.txt").write_text("nothing of the kind\n")
    command = [sys.executable, SCRIPT, "--output", "curves.svg", "--metrics"]
    done = subprocess.run([*command, "theirs.json", "mine.json"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "not drawn, as they never change: batch_size 64\n")
    assert (tmp_path / "curves.svg").read_bytes().startswith(b"<?xml")
    wrong = subprocess.run([*command, "theirs.json", "notes.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: notes.txt holds no iteration") and wrong.stderr.count("\n") == 1
