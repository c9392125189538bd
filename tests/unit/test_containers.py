"""Container definitions, as far as they can be checked unbuilt: both install what is pinned, and alike."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CONTAINERS = REPOSITORY / "containers"


def dockerfile():
    """Instruction and argument, continued lines joined, comments left out."""
    text = (CONTAINERS / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def definition():
    """Header, and section -> lines."""
    sections, name = {"header": []}, "header"
    for line in (CONTAINERS / "dinoscope.def").read_text(encoding="utf-8").splitlines():
        if line.startswith("%"):
            name = line[1:]
            sections[name] = []
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def test_the_dockerfile_is_one():
    instructions = dockerfile()
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions} == known
    assert instructions[0] == ("ARG", "BASE=debian:bookworm-slim")
    assert instructions[1] == ("FROM", "${BASE}")


def test_the_definition_is_one():
    sections = definition()
    assert sections["header"] == ["Bootstrap: docker", "From: {{ BASE }}"]
    assert set(sections) == {"header", "arguments", "files", "post", "environment", "runscript", "test"}
    defaults = dict(line.split("=", 1) for line in sections["arguments"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", (CONTAINERS / "dinoscope.def").read_text(encoding="utf-8")))
    assert used == set(defaults)
    for name in ("post", "runscript", "test", "environment"):
        script = "\n".join(
            re.sub(r"\{\{ (\w+) \}\}", lambda match: defaults[match[1]], line) for line in sections[name]
        )
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_both_are_of_the_same_base_and_run_the_same():
    instructions, sections = dict(dockerfile()), definition()
    arguments = [value for name, value in dockerfile() if name == "ARG"]
    assert [value.replace('""', "") for value in arguments] == sections["arguments"]
    run = instructions["RUN"].replace("${PIP_OPTIONS}", "{{ PIP_OPTIONS }}")
    assert run in sections["post"]
    assert instructions["COPY"] == sections["files"][0] == ". /opt/dinoscope"
    assert "HF_HUB_OFFLINE=1" in instructions["ENV"]
    assert "export HF_HUB_OFFLINE=1" in sections["environment"]
    assert "DINOSCOPE_COMMIT=${COMMIT}" in instructions["ENV"]  # what provenance.json names
    assert "export DINOSCOPE_COMMIT={{ COMMIT }}" in sections["environment"]
    assert '"snakemake", "--snakefile", "/opt/dinoscope/Snakefile"' in instructions["ENTRYPOINT"]
    assert sections["runscript"] == ['exec snakemake --snakefile /opt/dinoscope/Snakefile "$@"']


def test_nothing_but_the_pins_is_installed():
    script = (CONTAINERS / "install.sh").read_text(encoding="utf-8")
    installs = re.findall(r"pip install (.*)", script)
    assert len(installs) == 2
    assert installs[0].endswith("-r requirements.txt")
    assert installs[1].endswith(" .") and "--no-deps" in installs[1]
    for file in ("Dockerfile", "dinoscope.def", "install.sh"):
        assert not re.search(r"\w==\d", (CONTAINERS / file).read_text(encoding="utf-8")), file


def test_what_is_left_out_of_the_image_is_not_needed():
    ignored = (CONTAINERS / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    (remove,) = (line for line in definition()["post"] if line.startswith("rm "))
    assert {path.rpartition("/")[2] for path in remove.split()[2:]} <= set(ignored)
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    for path in tracked.splitlines():
        assert path.split("/")[0] not in ignored


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_script_that_both_run_does_so_in_order_and_stops_at_an_error(tmp_path):
    """With programs that only write down what they were asked for."""
    log = tmp_path / "log"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "python3", "rm"):
        program = programs / name
        body = f'echo "{name} $*" >> "{log}"\n'
        if name == "python3":
            body += 'mkdir -p .venv/bin; cp "$0" .venv/bin/python\n[ "$3" != "install" ] || [ -z "$FAIL" ]\n'
        program.write_text(f"#!/bin/bash\n{body}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = (CONTAINERS / "install.sh").read_text(encoding="utf-8").replace("/opt/dinoscope", str(tmp_path))
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "FAIL": ""}
    subprocess.run(["bash", "-c", script, "install.sh", "--some-option"], env=environment, check=True)
    asked = log.read_text().splitlines()
    assert asked[0] == "apt-get update"
    assert asked[3] == "python3 -m venv .venv"
    assert "--some-option -r requirements.txt" in asked[4]
    assert "--some-option ." in asked[5]
    assert asked[6].endswith("import dinoscope, snakemake, torch")
    failed = subprocess.run(["bash", "-c", script], env=environment | {"FAIL": "1"}, check=False)
    assert failed.returncode != 0
