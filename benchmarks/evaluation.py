"""Speed and memory of the evaluation's measures, beside scikit-learn in the same run.

    python benchmarks/evaluation.py --threads 2

Nearest neighbours of 1,000 queries among a million rows of 1,024 values that lie in a file in float16; the same among
as many rows as scikit-learn has memory for, both in turns. A linear probe of 200,000 rows, penalty and scaling chosen
on inner folds, and one of its regressions beside scikit-learn's. Intervals by 10,000 resamples of cases beside a loop
over scikit-learn's score. Features are drawn: clusters with noise. Prints Markdown; files lie in a
temporary folder (2 GB). Times are CPU seconds of all threads, and wall clock.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

from dinoscope.cli import run_script
from dinoscope.evaluate.folds import grouped_folds
from dinoscope.evaluate.intervals import estimate
from dinoscope.evaluate.knn import neighbours
from dinoscope.evaluate.logistic import fit_logistic, log_probabilities
from dinoscope.evaluate.probe import CLEAN, linear_probe
from dinoscope.evaluate.scores import Predictions, score, statistic_of

WIDTH, CLASSES = 1_024, 5
K = 20


def drawn(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) float32 of overlapping clusters whose dimensions are correlated, and their classes."""
    labels = np.random.default_rng([seed, 1]).integers(0, CLASSES, num)
    centers = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)).astype(np.float32) * 0.08
    mix = np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32) / 8
    rng = np.random.default_rng([seed, 2])
    features = rng.standard_normal((num, WIDTH), np.float32)
    features += rng.standard_normal((num, 64), np.float32) @ mix + centers[labels]
    return features, labels


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """CPU time of all threads, and wall clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """GB of private memory (RssAnon) that the process gains at most meanwhile."""
    found, done, before = [0.0], threading.Event(), _private_gb()

    def watch() -> None:
        while not done.wait(0.05):
            found[0] = max(found[0], _private_gb() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _private_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6


def row(*cells: object) -> None:
    """A line of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def nearest(rows: int, shared_rows: int, queries: int, repeats: int) -> None:
    """A bank in a file, and one in memory for both."""
    asked = drawn(queries, 1)[0]
    row("nearest neighbours", "rows", "CPU s", "wall s", "private memory more, GB")
    row("---", "---:", "---:", "---:", "---:")
    with tempfile.TemporaryDirectory() as folder:
        bank = np.memmap(Path(folder) / "bank", np.float16, "w+", shape=(rows, WIDTH))
        for start in range(0, rows, 50_000):
            bank[start : start + 50_000] = drawn(min(50_000, rows - start), 100 + start)[0]
        bank.flush()
        bank = np.memmap(Path(folder) / "bank", np.float16, "r", shape=(rows, WIDTH))
        times = []
        with peak_memory() as peak:
            for _ in range(repeats):
                times.append(seconds(lambda: neighbours(asked, bank, K)))
        row("dinoscope, float16 in a file", rows, *_medians(times), f"{peak[0]:.2f}")
    held = drawn(shared_rows, 2)[0]
    theirs = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(held)
    found, peaks, answers = {"dinoscope": [], "scikit-learn": []}, {}, {}
    actions = {
        "dinoscope": lambda: answers.__setitem__("dinoscope", neighbours(asked, held, K)[0]),
        "scikit-learn": lambda: answers.__setitem__("scikit-learn", theirs.kneighbors(asked)[1]),
    }
    for _ in range(repeats):
        for name, action in actions.items():
            with peak_memory() as peak:
                found[name].append(seconds(action))
            peaks[name] = max(peaks.get(name, 0), peak[0])
    for name, values in found.items():
        row(f"{name}, float32 in memory", shared_rows, *_medians(values), f"{peaks[name]:.2f}")
    same = np.mean(answers["dinoscope"] == answers["scikit-learn"])
    print(f"\n{queries} queries, {K} neighbours, {WIDTH} values; {100 * same:.3f} % of the neighbours are the same\n")


def _medians(times: list[tuple[float, float]]) -> list[str]:
    return [f"{statistics.median(column):.1f}" for column in zip(*times, strict=True)]


def probes(rows: int, shared_rows: int) -> None:
    """The whole probe, and one regression of it on fewer rows for both."""
    features, labels = drawn(rows, 3)
    cases = np.arange(rows) // max(1, rows // 200)
    row("linear probe", "rows", "CPU s", "wall s", "private memory more, GB")
    row("---", "---:", "---:", "---:", "---:")
    folds = grouped_folds(labels, cases, folds=5, repeats=1)
    answers = []
    with peak_memory() as peak:
        times = [seconds(lambda: answers.append(linear_probe(features, labels, cases, folds)))]
    row("dinoscope: 5 folds, each with 14 choices on 3 inner folds", rows, *_medians(times), f"{peak[0]:.2f}")
    accuracy = score(answers[0].predictions[CLEAN], "balanced_accuracy")
    some, few = features[:shared_rows], labels[:shared_rows]
    some = (some - some.mean(0)) / some.std(0)
    for strength in (1.0, 0.01):
        _one_regression(some, few, strength)
    choices = ", ".join(f"{choice.scaling} {choice.penalty:g}" for choice in answers[0].choices)
    print(f"\nBalanced accuracy {accuracy:.4f}; chosen: {choices}\n")


def _one_regression(rows: np.ndarray, labels: np.ndarray, strength: float) -> None:
    """The same objective, by both with the tolerance 1e-4 of the gradient, and how far they get."""
    features, weights = torch.from_numpy(rows), torch.ones(len(rows), 1)
    penalty = 1 / (strength * len(rows))
    found = {}

    def ours() -> None:
        theta = fit_logistic(features, torch.from_numpy(labels), CLASSES, torch.tensor([penalty]), weights)
        log_loss = -log_probabilities(features, theta)[np.arange(len(rows)), 0, labels].double().mean()
        found["dinoscope"] = float(log_loss + penalty / 2 * theta[:-1].double().square().sum())

    def theirs() -> None:
        model = LogisticRegression(C=strength, max_iter=1000).fit(rows, labels)
        log_loss = -model.predict_log_proba(rows)[np.arange(len(rows)), labels].mean()
        found["scikit-learn"] = float(log_loss + penalty / 2 * np.square(model.coef_).sum())

    for name, action in (("dinoscope", ours), ("scikit-learn", theirs)):
        times = [seconds(action)]
        row(f"{name}: one regression, C = {strength:g}; objective {found[name]:.6f}", len(rows), *_medians(times), "")


def intervals(num_cases: int, tiles: int, draws: int, theirs: int) -> None:
    """AUROC with its interval; scikit-learn's from fewer resamples, and the time scaled."""
    rng = np.random.default_rng(0)
    cases = np.repeat(np.arange(num_cases), tiles)
    truth = (np.arange(num_cases) % 2)[cases]
    scores = 1 / (1 + np.exp(-(truth + rng.normal(size=num_cases)[cases] + rng.normal(size=len(cases)))))
    predictions = Predictions(truth, np.stack([1 - scores, scores], 1)[None], cases)
    row(f"interval of AUROC, {num_cases} cases of {tiles} tiles", "resamples", "CPU s", "wall s")
    row("---", "---:", "---:", "---:")
    mine = seconds(lambda: estimate(statistic_of(predictions, "auroc"), num_cases, draws=draws))
    row("dinoscope", draws, *_medians([mine]))
    rows_of = np.arange(len(cases)).reshape(num_cases, tiles)

    def loop() -> None:
        for _ in range(theirs):
            chosen = rows_of[rng.integers(num_cases, size=num_cases)].ravel()
            roc_auc_score(truth[chosen], scores[chosen])

    found = seconds(loop)
    scaled = tuple(value * draws / theirs for value in found)
    row(f"a loop over scikit-learn's score ({theirs} measured, times {draws // theirs})", draws, *_medians([scaled]))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the bank in a file")
    parser.add_argument("--shared-rows", type=int, default=200_000, help="of the bank in memory")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--probe-rows", type=int, default=200_000)
    parser.add_argument("--shared-probe-rows", type=int, default=40_000, help="of a regression by both")
    parser.add_argument("--repeats", type=int, default=3, help="of the searches")
    parser.add_argument("--only", choices=("nearest", "probes", "intervals"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = {
        "nearest": lambda: nearest(arguments.rows, arguments.shared_rows, arguments.queries, arguments.repeats),
        "probes": lambda: probes(arguments.probe_rows, arguments.shared_probe_rows),
        "intervals": lambda: intervals(200, 500, 10_000, 50),
    }
    with threadpool_limits(arguments.threads):
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn", "numpy"))
    print(f"\n{arguments.threads} threads, load {os.getloadavg()[0]:.1f}; {packages}")


if __name__ == "__main__":
    run_script(main)
