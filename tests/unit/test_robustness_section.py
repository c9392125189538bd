"""Robustness in the report: clean figure, chance and class beside it, and only the sentences that say something."""

from dataclasses import asdict

from dinoscope.evaluate.comparing import Row
from dinoscope.files import write_json
from dinoscope.visualize.evaluation_section import evaluation_facts
from dinoscope.visualize.robustness_section import robustness_facts


def row(measure, model, value, score="balanced_accuracy", seen="no"):
    return asdict(Row(measure, score, model, value, value - 0.1, value + 0.1, 40, 40, seen, 40))


def verdict(measure, sentence, is_primary=False):
    return {"task": "label-x", "measure": measure, "model": "tuned", "is_primary": is_primary, "sentence": sentence}


def document():
    rows = []
    for place, model in enumerate(("base", "tuned")):
        more = place / 10
        rows += [row("linear", model, 0.8 + more), row("linear", model, 0.9, "auroc")]
        for name, value in (("unchanged", 0.7), ("stain", 0.5), ("grey", 0.3)):
            rows += [row(f"knn_5~{name}", model, value), row(f"linear~{name}", model, value + more)]
            rows.append(row(f"linear~{name}", model, 0.6, "auroc"))
        rows += [row("linear_change~stain", model, -0.2, "change"), row("retained~stain", model, 0.4, "retained")]
        rows.append(row("site_readout", model, 0.66, "site_readout"))
    rows.append(row("linear~stain", "tuned", 0.99, seen="yes"))
    numbers = {"base": {"site_chance": 0.5}}
    return {"task": "label-x", "kind": "classes", "rows": rows, "numbers": numbers, "notes": []}


def test_each_figure_stands_beside_the_one_on_unchanged_tiles():
    facts = robustness_facts(document(), [("linear~stain", "a"), ("retained~stain", "b"), ("site_readout", "c")])
    assert facts.changes == ["unchanged", "stain", "grey"]
    assert facts.rows[0] == (
        "linear probe", "base", ["0.700 [0.600, 0.800]", "0.500 [0.400, 0.600]", "0.300 [0.200, 0.400]"]
    )  # fmt: skip
    assert facts.rows[1][:2] == ("linear probe", "tuned") and facts.rows[1][2][1].startswith("0.600 ")
    assert [name for name, _, _ in facts.rows] == ["linear probe"] * 2 + ["5-NN"] * 2 + ["neighbours kept"] * 2
    assert facts.rows[-1][2] == ["–", "0.400 [0.300, 0.500]", "–"]
    base, tuned = facts.sites
    assert base == ("base", ["0.660 [0.560, 0.760]", "0.500", "0.800 [0.700, 0.900]", "–"])
    assert tuned[1][1] == "–" and tuned[1][2].startswith("0.900")
    assert facts.sentences == ["a", "c"]  # of what has a direction, and of the site beside what it must stand beside
    plain = document() | {"rows": [row("linear", "base", 0.8)]}
    assert robustness_facts(plain, []) is None


def test_the_task_keeps_its_table_and_its_primary_sentence(tmp_path):
    verdicts = [verdict("linear", "one"), verdict("linear~stain", "two"), verdict("linear~grey", "three", True)]
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "summary.json", {"tasks": [document()], "verdicts": verdicts})
    (task,) = evaluation_facts(tmp_path).tasks
    assert {measure for measure, _, _ in task.rows} == {"linear"} and task.scores == ["balanced accuracy", "auroc"]
    assert task.sentences == [("one", False), ("three", True)]
    assert task.robustness.sentences == ["two"]
