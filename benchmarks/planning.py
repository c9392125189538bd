"""What planning costs: a dry run for 1,000 and 10,000 slides, as far as the manifest and as far as everything.

    python benchmarks/planning.py [--slides 1000 10000] [--targets manifest bare all] [--option=--group-components ...]

The slides are empty files, which no dry run opens; config and recipes are those of the demo, with two training runs.
Beside it stands what Snakemake takes for as many jobs of a workflow of two rules without a function, a check or a
table of slides ("bare"). Prints the table for benchmarks/README.md: processor seconds are what planning costs, the
clock shows the machine's other jobs as well. In milliseconds a job counts the whole dry run, Python's start and the
printing included.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


BARE = """
SLIDES = [f"slide_{number:05d}" for number in range(COUNT)]

rule bare:
    input: expand("results/tiles/{set}/{slide}.parquet", set=["train", "features"], slide=SLIDES)
    output: "results/manifest.parquet"
    shell: "merge {output}"

rule tile:
    input: "scans/{slide}.svs"
    output: "results/tiles/train/{slide}.parquet", "results/tiles/features/{slide}.parquet", "results/tiles/{slide}.jpg", "results/tiles/{slide}.geojson"
    log: "logs/{slide}.log"
    benchmark: "logs/{slide}.tsv"
    group: "tiles"
    resources: mem_mb=2000, runtime=30
    params: script="tile_slide.py", arguments=["--set", "train", "256", "0.5", "--set", "features", "224", "0.5"]
    shell: "python {params.script:q} --slide {input:q} --slide-id {wildcards.slide:q} {params.arguments:q} --outputs {output:q} > {log:q} 2>&1"
"""  # noqa: E501


class Cost(NamedTuple):
    """Of one dry run: jobs, seconds by the clock and of the processor, peak memory in MB."""

    jobs: int
    clock: float
    processor: float
    megabytes: float


def make_project(folder: Path, slides: int) -> None:
    """A working directory with a table of stub slides, two a case, every tenth case held out."""
    shutil.copytree(REPOSITORY / "config", folder / "config")
    (folder / "scans").mkdir()
    (folder / "bare.smk").write_text(BARE.replace("COUNT", str(slides)), encoding="utf-8")
    rows = ["slide_id\tpath\tcase_id\tstain\tuse"]
    for number in range(slides):
        path = Path("scans", f"slide_{number:05d}.svs")
        (folder / path).touch()
        use = "eval,features" if number // 2 % 10 == 9 else "train,features"
        rows.append(f"{path.stem}\t{path}\tcase_{number // 2:05d}\tHE\t{use}")
    (folder / "config" / "slides.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = yaml.safe_load((folder / "config" / "config.yaml").read_text(encoding="utf-8"))
    config["demo"] = {"enabled": False}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def plan(folder: Path, target: str, options: list[str]) -> Cost:
    """Plans in a process of its own."""
    snakefile = folder / "bare.smk" if target == "bare" else REPOSITORY / "Snakefile"
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(snakefile), "--cores", "2"]
    command += ["--dry-run", "--quiet", "rules", "--directory", str(folder), *options]
    with open(folder / "planned.txt", "w", encoding="utf-8") as said:
        started = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        clock = time.perf_counter() - started
    text = (folder / "planned.txt").read_text(encoding="utf-8")
    counted = re.search(r"^total +(\d+)$", text, re.MULTILINE)
    if status or not counted:
        sys.exit(f"error: planning {target} failed:\n{text[-3000:]}")
    return Cost(int(counted[1]), clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    """Makes the stubs, plans, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--targets", nargs="+", default=["manifest", "bare", "all"])
    parser.add_argument("--option", action="append", default=[], help="handed on to Snakemake; may be repeated")
    arguments = parser.parse_args()
    print("| target | slides | jobs | processor, s | clock, s | processor, ms a job | peak memory, MB | load |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for slides in arguments.slides:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "project")
            folder.mkdir()
            make_project(folder, slides)
            for target in arguments.targets:
                load, cost = os.getloadavg()[0], plan(folder, target, arguments.option)
                each = 1e3 * cost.processor / cost.jobs
                print(
                    f"| {target} | {slides:,} | {cost.jobs:,} | {cost.processor:.1f} | {cost.clock:.1f} | {each:.2f} |"
                    f" {cost.megabytes:,.0f} | {load:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
