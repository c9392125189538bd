"""How many jobs a collection is on a cluster: what profiles/slurm would submit for 5,000 slides, rule by rule.

    python benchmarks/cluster_jobs.py [--slides 5000] [--profile profiles/slurm] [--target all]

The slides are empty files, which no dry run opens; config and recipes are those of the demo. Nothing is submitted, and
no SLURM is needed. Prints the table for benchmarks/README.md.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from planning import REPOSITORY, make_project

_LOCAL = re.compile(r"^rule (\w+):\n(?:(?!rule ).*\n)*?    localrule: True", re.MULTILINE)


class Demand(NamedTuple):
    """Jobs of a rule in the plan, and those that are submitted for them."""

    planned: int
    submitted: int


def local_rules() -> set[str]:
    """Rules whose jobs run where Snakemake runs."""
    names = {"all", "pretrain", "gram"}
    for path in (REPOSITORY / "rules").glob("*.smk"):
        text = path.read_text(encoding="utf-8")
        names.update(_LOCAL.findall(text))
        for listed in re.findall(r"^localrules:\n((?:    \w+,\n)+)", text, re.MULTILINE):
            names.update(re.findall(r"\w+", listed))
    return names


def submitted_jobs(folder: Path, profile: Path, target: str, options: tuple[str, ...] = ()) -> dict[str, Demand]:
    """Plans the target in a folder; rule -> its jobs, and how many are submitted."""
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(REPOSITORY / "Snakefile"), "--dry-run"]
    command += ["--workflow-profile", str(profile), "--directory", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"planning {target} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    planned, submitted = Counter(), Counter()
    here = local_rules()
    for block in re.split(r"^\[[A-Z][a-z]{2} [A-Z][a-z]{2} .*?\]", done.stdout + done.stderr, flags=re.MULTILINE)[1:]:
        is_group = block.startswith(" Group job")
        rules = re.findall(r"^ *(?:local)?rule (\w+):$", block, re.MULTILINE)
        if not is_group and rules[:1] and rules[0] in here:
            continue
        if is_group:
            (rule,) = set(rules)
            planned[rule] += len(rules)
            submitted[rule] += 1
        else:
            planned.update(rules)
            submitted.update(rules)
    return {rule: Demand(planned[rule], submitted[rule]) for rule in planned}


def main() -> None:
    """Makes the stubs, plans, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=5000)
    parser.add_argument("--profile", type=Path, default=REPOSITORY / "profiles" / "slurm")
    parser.add_argument("--target", default="all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "project")
        folder.mkdir()
        make_project(folder, arguments.slides)
        found = submitted_jobs(folder, arguments.profile.resolve(), arguments.target)
    print(f"| rule | jobs of the plan, {arguments.slides:,} slides | submitted |\n|---|---:|---:|")
    for rule, demand in sorted(found.items(), key=lambda item: -item[1].submitted):
        print(f"| `{rule}` | {demand.planned:,} | {demand.submitted:,} |")
    total = [sum(numbers) for numbers in zip(*found.values(), strict=True)]
    print(f"| all | {total[0]:,} | {total[1]:,} |")


if __name__ == "__main__":
    main()
