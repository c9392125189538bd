"""CITATION.cff, by the rules of the Citation File Format 1.2.0; and what the README says of citing and licences."""

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import dinoscope

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = {"type": "string", "minLength": 1}
AUTHORS = {
    "type": "array",
    "minItems": 1,
    "uniqueItems": True,
    "items": {
        "anyOf": [
            {  # a person
                "type": "object",
                "properties": dict.fromkeys(("family-names", "given-names", "affiliation"), TEXT),
                "required": ["family-names"],
                "additionalProperties": False,
            },
            {  # an entity
                "type": "object",
                "properties": {"name": TEXT},
                "required": ["name"],
                "additionalProperties": False,
            },
        ]
    },
}
IDENTIFIER = {
    "type": "object",
    "properties": {"type": {"enum": ["doi", "url", "swh", "other"]}, "value": TEXT, "description": TEXT},
    "required": ["type", "value"],
    "additionalProperties": False,
}
REFERENCE = {
    "type": "object",
    "properties": {
        "type": {"enum": ["article", "software", "conference-paper", "report"]},
        "title": TEXT,
        "authors": AUTHORS,
        "year": {"type": "integer"},
        "journal": TEXT,
        "url": {"type": "string", "pattern": "^https://"},
        "identifiers": {"type": "array", "minItems": 1, "uniqueItems": True, "items": IDENTIFIER},
    },
    "required": ["authors", "title", "type"],
    "additionalProperties": False,
}
SCHEMA = {  # of the keys that are used here
    "type": "object",
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "type": {"enum": ["software", "dataset"]},
        "authors": AUTHORS,
        **dict.fromkeys(("message", "title", "abstract", "license"), TEXT),
        "version": {"anyOf": [TEXT, {"type": "number"}]},
        "keywords": {"type": "array", "minItems": 1, "uniqueItems": True, "items": TEXT},
        "references": {"type": "array", "minItems": 1, "uniqueItems": True, "items": REFERENCE},
    },
    "required": ["authors", "cff-version", "message", "title"],
    "additionalProperties": False,
}


@pytest.fixture
def citation() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_is_valid(citation: dict[str, Any]) -> None:
    jsonschema.validate(citation, SCHEMA)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.pop("message"),
        lambda c: c.update({"cff-version": 1.2}),
        lambda c: c.update(licence="Apache-2.0"),
        lambda c: c["authors"].append("someone"),
        lambda c: c["references"][0].pop("authors"),
        lambda c: c["references"][0].update(year="2025"),
        lambda c: c["references"][1]["identifiers"][0].update(type="arxiv"),
    ],
)
def test_what_the_format_does_not_know_would_be_noticed(
    citation: dict[str, Any], spoil: Callable[[dict[str, Any]], Any]
) -> None:
    spoiled = copy.deepcopy(citation)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, SCHEMA)


def test_it_speaks_of_this_version_and_licence(citation: dict[str, Any]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == dinoscope.__version__
    assert citation["license"] == project["license"]


@pytest.mark.parametrize(
    ("title", "first", "year", "arxiv"),
    [
        ("DINOv3", "Siméoni", 2025, "2508.10104"),
        ("DINOv2: Learning Robust Visual Features without Supervision", "Oquab", 2023, "2304.07193"),
    ],
)
def test_the_methods_papers_are_cited_here_and_in_the_readme(
    citation: dict[str, Any], title: str, first: str, year: int, arxiv: str
) -> None:
    (paper,) = [reference for reference in citation["references"] if reference["title"] == title]
    assert (paper["authors"][0]["family-names"], paper["year"]) == (first, year)
    assert paper["url"] == f"https://arxiv.org/abs/{arxiv}"
    assert [identifier["value"] for identifier in paper["identifiers"]] == [f"arXiv:{arxiv}"]
    section = cited_section()
    assert f"https://arxiv.org/abs/{arxiv}" in section and first in section and str(year) in section


def test_the_readme_says_what_the_license_of_the_weights_asks() -> None:
    section = cited_section()
    for words in ("DINOv3 License", "copy", "acknowledge", "derived from", "not legal advice", "CITATION.cff"):
        assert words in section, words
    assert "https://ai.meta.com/resources/models-and-libraries/dinov3-license" in section


def cited_section() -> str:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return text.split("## How to cite, and licences\n")[1].split("\n## ")[0]
