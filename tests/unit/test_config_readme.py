"""config/README.md against the schemas: every key with its default and description, so that neither drifts."""

import json
import re
from pathlib import Path

import pytest

from dinoscope.schema import read_schema

CONFIG = Path(__file__).parents[2] / "config"


def key_table(schema):
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def visit(part, prefix):
        named = [("NAME", child) for child in part.get("patternProperties", {}).values()]
        for name, child in [*part.get("properties", {}).items(), *named]:
            if child.get("type") == "object":
                lines.append(f"| **`{prefix}{name}`** | | {cell(child)} |")
                visit(child, f"{prefix}{name}.")
            else:
                default = "required" if name in part.get("required", []) else f"`{json.dumps(child['default'])}`"
                lines.append(f"| `{prefix}{name}` | {default} | {cell(child)} |")

    visit(schema, "")
    return "\n".join(lines)


def cell(part):
    return part["description"].replace("|", r"\|")


def column_table(schema):
    rows = [f"| `{name}` | {cell(part)} |" for name, part in schema["properties"].items()]
    return "\n".join(["| column | meaning |", "|---|---|", *rows])


@pytest.mark.parametrize(("table", "name"), [(key_table, "config"), (column_table, "slides"), (column_table, "labels")])
def test_the_readme_has_the_schemas_words(table, name):
    expected = table(read_schema(CONFIG / "schemas" / f"{name}.schema.yaml"))
    readme = (CONFIG / "README.md").read_text(encoding="utf-8")
    assert expected in readme, f"paste this into config/README.md:\n\n{expected}"


def test_what_the_readme_names_exists():
    readme = (CONFIG / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:config|workflow_scripts|rules|profiles)/[\w./+-]+)`", readme)
    assert len(named) >= 5
    optional = {"config/labels.tsv"}
    assert [path for path in named if path not in optional and not (CONFIG.parent / path).exists()] == []
