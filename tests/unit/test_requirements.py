"""Pins: exact, complete, and the same wherever they stand."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]


def pins(name):
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in found)
    return dict(line.split("==") for line in found)


def needed_by(names):
    """Names of all installed packages that these need, directly or not, themselves included."""
    seen, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in seen or re.match(r"nvidia-|cuda-|triton", name):
            continue
        seen.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return seen


def test_requirements_are_what_the_project_needs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [Requirement(text) for text in project["dependencies"]]
    pinned = pins("requirements.txt")
    for requirement in direct:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    assert needed_by(requirement.name for requirement in direct) - set(pinned) == set()


def test_what_submits_to_slurm_is_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (plugin,) = map(Requirement, project["optional-dependencies"]["slurm"])
    pinned = pins("requirements.txt")
    assert plugin.specifier.contains(pinned[plugin.name])
    assert needed_by([plugin.name]) - set(pinned) == set()


def test_the_libraries_of_exports_are_pinned_for_the_tests():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins("requirements-test.txt")
    environment = yaml.safe_load((REPOSITORY / "envs" / "export.yaml").read_text(encoding="utf-8"))
    for requirement in map(Requirement, project["optional-dependencies"]["export"]):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version)
        assert f"{requirement.name}=={version}" in environment["dependencies"][-1]["pip"]


def test_the_storage_plugin_is_pinned_for_the_tests():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (plugin,) = map(Requirement, project["optional-dependencies"]["s3"])
    assert plugin.specifier.contains(pins("requirements-test.txt")[plugin.name])


def test_every_environment_that_a_rule_names_is_there_and_used():
    text = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "rules").glob("*.smk"))
    named = set(re.findall(r'"\.\./envs/(\w+)\.yaml"', text))
    assert named == {path.stem for path in (REPOSITORY / "envs").glob("*.yaml")}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "envs").glob("*.yaml")), ids=lambda path: path.stem)
def test_conda_environments_are_whole(path):
    """pip resolves what is left open; that may be no more than what requirements.txt pins besides."""
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    python, _, packages = environment["dependencies"]
    assert python == "python =3.11"
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    names = [line.partition("==")[0] for line in packages["pip"]]
    assert names == sorted(set(names))
    assert needed_by(names) <= set(pins("requirements.txt") | pins("requirements-test.txt"))


def test_test_requirements_are_complete():
    tools = pins("requirements-test.txt")
    assert needed_by(tools) - set(tools) - set(pins("requirements.txt")) == set()
    assert set(tools).isdisjoint(pins("requirements.txt"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "envs").glob("*.yaml")), ids=lambda path: path.stem)
def test_conda_environments_have_the_same_pins(path):
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    pinned = pins("requirements.txt") | pins("requirements-test.txt")
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert len(pip) >= 5
    for line in pip:
        name, _, version = line.partition("==")
        assert pinned[name] == version
