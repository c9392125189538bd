"""What the report says on top where nothing was judged, and of whom a task was asked."""

import pytest

from dinoscope.files import write_json
from dinoscope.visualize.evaluation_section import evaluation_facts


def row(model, seen="no"):
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "cases": 40, "units": 50, "smallest_class": 12}
    return {"measure": "linear", "score": "s", "model": model, "seen": seen, "seeds": None, "by_seed": []} | numbers


def facts(folder, *tasks):
    told = [
        {"task": f"task{place}", "kind": kind, "rows": rows, "numbers": {}, "about": {}, "notes": []}
        for place, (kind, rows) in enumerate(tasks)
    ]
    (folder / "evaluation").mkdir()
    write_json(folder / "evaluation" / "summary.json", {"primary": None, "tasks": told, "verdicts": []})
    return evaluation_facts(folder)


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([("none", [])], "No label, tile set or mask was given"),
        ([("classes", []), ("none", [])], "what was given could not be asked about"),
        ([("classes", [row("base"), row("pretrain", "yes")])], "on cases that training never saw"),
        ([("classes", [row("pretrain")])], "the starting weights (base) are not among the models"),
    ],
)
def test_why_nothing_was_judged(tmp_path, tasks, sentence):
    (on_top,) = facts(tmp_path, *tasks).on_top
    assert sentence in on_top


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("classes", "40 cases, 50 units, at least 12 cases a class"),
        ("survival", "40 cases, 50 units, 12 with the event"),
        ("masks", "40 cases, 50 units"),
    ],
)
def test_of_whom_it_was_asked(tmp_path, kind, told):
    assert facts(tmp_path, (kind, [row("base")])).tasks[0].asked == told
