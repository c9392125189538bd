"""Writes which slides train and which are held out, case by case: slide_id, case_id and use (train or eval).

Follows the table where it names any eval slide; otherwise a share of the training cases is held out, stratified by site
and stain. Slides that are used for features alone are not listed.
"""

import argparse
import csv
import io
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.files import write_text
from dinoscope.slides.table import read_slide_table, split_cases


def main() -> None:
    """Reads the slide table and writes the split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--slides", required=True, help="slide table (.tsv), folder or glob")
    parser.add_argument(
        "--fraction", type=float, default=0.15, help="share of the training cases to hold out, 0 to 0.9"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other cases")
    parser.add_argument("--output", required=True, type=Path, help="table to write (.tsv)")
    arguments = parser.parse_args()
    records = read_slide_table(arguments.slides)
    split = split_cases(records, arguments.fraction, arguments.seed)
    case_of = {record.slide_id: record.case_id for record in records}
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["slide_id", "case_id", "use"])
    writer.writerows([slide_id, case_of[slide_id], use] for slide_id, use in split.items())
    write_text(arguments.output, text.getvalue())
    counts = {use: len({case_of[s] for s, u in split.items() if u == use}) for use in ("train", "eval")}
    print(f"{counts['train']} cases to train on, {counts['eval']} held out")


if __name__ == "__main__":
    run_script(main)
