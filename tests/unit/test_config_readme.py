"""config/README.md against schemas and recipe keys: each with its default and description, so that neither drifts."""

import ast
import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

from dinoscope import config as recipe_schema
from dinoscope.recipe import load_recipe
from dinoscope.recipe_keys import IGNORED_KEYS, ONLY_VALUES
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


def recipe_table():
    """Keys of RunConfig with their defaults, and the comments of their fields."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def visit(cls, prefix):
        for field in dataclasses.fields(cls):
            section = section_of(field)
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            if section is None:
                lines.append(f"| `{prefix}{field.name}` | `{json.dumps(default)}` | {comments(cls)[field.name]} |")
            elif section is recipe_schema.LinearCosineConfig:
                shown = "null" if default is None else json.dumps(dataclasses.asdict(default))
                lines.append(f"| `{prefix}{field.name}` | `{shown}` | {comments(cls).get(field.name, 'as lr')} |")
            else:
                words = " ".join(inspect.getdoc(section).split("\n\n")[0].split())
                lines.append(f"| **`{prefix}{field.name}`** | {'`null`' if default is None else ''} | {words} |")
                visit(section, f"{prefix}{field.name}.")

    visit(recipe_schema.RunConfig, "")
    return "\n".join(lines)


def section_of(field):
    candidates = getattr(field.type, "__args__", (field.type,))
    return next((candidate for candidate in candidates if dataclasses.is_dataclass(candidate)), None)


def comments(cls):
    """Field -> the comment behind it, or the lines of comment above it."""
    found = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        source = inspect.getsource(base)
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                _, mark, words = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
                first = node.lineno - 1
                while not mark and lines[first - 1].strip().startswith("#"):
                    first -= 1
                above = " ".join(line.strip(" #") for line in lines[first : node.lineno - 1])
                if mark or above:
                    found[node.target.id] = (words.strip() if mark else above).replace("|", r"\|").replace("<", r"\<")
    return found


def refused_table():
    rows = [f"| `{key}` | `{json.dumps(only.value)}` | {only.instead} |" for key, only in sorted(ONLY_VALUES.items())]
    return "\n".join(["| key | only value | instead |", "|---|---|---|", *rows])


def ignored_table():
    rows = [f"| `{key}` | {reason} |" for key, reason in sorted(IGNORED_KEYS.items())]
    return "\n".join(["| key | why |", "|---|---|", *rows])


@pytest.mark.parametrize("table", [recipe_table, refused_table, ignored_table])
def test_the_readme_has_every_recipe_key(table):
    readme = (CONFIG / "README.md").read_text(encoding="utf-8")
    assert table() in readme, f"paste this into config/README.md:\n\n{table()}"


def test_the_recipes_shown_can_be_used(tmp_path):
    readme = (CONFIG / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", readme, re.DOTALL)
    assert [name for name, _ in shown] == ["heads.yaml", "small.yaml"]
    shutil.copytree(CONFIG / "runs", tmp_path, dirs_exist_ok=True)
    for name, text in shown:
        (tmp_path / name).write_text(text, encoding="utf-8")
    heads, small = (load_recipe(tmp_path / name) for name, _ in shown)
    for key in ("dino", "ibot"):  # what is distilled has as many prototypes
        assert heads[key].head_n_prototypes == small[key].head_n_prototypes


def test_each_recipe_is_in_the_readme():
    readme = (CONFIG.parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (CONFIG / "runs").glob("*.yaml") if f"`{path.name}`" not in readme] == []


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
