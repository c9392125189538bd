"""Where the time of a workflow run went: sums up what Snakemake measured of each job.

    python benchmarks/stages.py [logs/benchmarks]

Prints one row a stage: jobs, their seconds together, the longest, and the largest resident memory of one job with its
children.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path


def rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Stage -> one row a job of Snakemake's benchmark files, which lie in a folder a stage."""
    found = defaultdict(list)
    for file in sorted(folder.rglob("*.tsv")):
        with open(file, newline="", encoding="utf-8") as stream:
            found[file.relative_to(folder).parts[0]] += csv.DictReader(stream, delimiter="\t")
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("logs/benchmarks"), help="what Snakemake measured")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        sys.exit(f"error: {folder} does not exist; run the workflow first, or give its logs/benchmarks")
    print("| stage | jobs | seconds together | longest, s | largest memory, MB |\n|---|---:|---:|---:|---:|")
    for stage, jobs in rows(folder).items():
        seconds = [float(job["s"]) for job in jobs]
        memory = max((float(job["max_rss"]) for job in jobs if job["max_rss"] not in ("-", "NA")), default=0)
        print(f"| {stage} | {len(jobs)} | {sum(seconds):.0f} | {max(seconds):.0f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
