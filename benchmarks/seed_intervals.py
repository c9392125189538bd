"""How often intervals of runs with several training seeds hold the truth: docs/evaluation.md, "Several seeds".

    python benchmarks/seed_intervals.py

Simulated differences of G cases with S seeds, normal with a mean of 0: what a case does, what a seed does, and what a
seed does to a case. Beside the intervals of evaluate/seeds.py: one seed and the mean of all seeds resampled over cases
alone, and seeds drawn with replacement as cases are (two levels).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))
from dinoscope.evaluate.intervals import case_weights, interval_of
from dinoscope.evaluate.seeds import seed_errors

SPREADS = ((1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 0.1, 0.5), (1.0, 0.3, 0.5), (0.5, 0.5, 0.5))
DRAWS = 1000


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1500, help="simulated comparisons a row")
    parser.add_argument("--cases", type=int, default=60, help="of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5], help="of each run")
    arguments = parser.parse_args()
    print("| cases | seeds | both | seeds a run | one seed | mean, cases alone | two-level bootstrap | ours |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for spreads in SPREADS:
        for number in arguments.seeds:
            rng = np.random.default_rng(0)
            held = [trial(rng, number, arguments.cases, spreads) for _ in range(arguments.trials)]
            shown = " | ".join(f"{share:.1%}" for share in np.mean(held, axis=0))
            print(f"| {' | '.join(f'{each:g}' for each in spreads)} | {number} | {shown} |", flush=True)


def trial(rng: np.random.Generator, seeds: int, cases: int, spreads: tuple[float, float, float]) -> list[bool]:
    """Which of the four intervals of one comparison hold 0."""
    of_cases, of_seeds, of_both = spreads
    given = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_cases, (1, cases))
    given = given + rng.normal(0, of_both, (seeds, cases))
    by_seed = case_weights(cases, DRAWS) @ given.T / cases
    drawn = np.random.default_rng(1).integers(seeds, size=by_seed.shape)
    found = (
        by_seed[:, 0],
        by_seed.mean(axis=1),
        np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1),
        by_seed.mean(axis=1) + seed_errors(tuple(given.mean(axis=1)), cases, DRAWS),
    )
    ends = [interval_of(resampled, 0.95, cases) for resampled in found]
    return [low <= 0 <= high for low, high in ends]


if __name__ == "__main__":
    main()
