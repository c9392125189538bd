"""Speed and memory of the evaluation's measures, beside scikit-learn in the same run.

    python benchmarks/evaluation.py --threads 2

Nearest neighbours of 1,000 queries among a million rows of 1,024 values that lie in a file in float16, in turns with
the matrix products alone; the same among as many rows as scikit-learn has memory for, both in turns. A linear probe of
200,000 rows, penalty and scaling chosen on inner folds, and single regressions beside scikit-learn's, of features that
vary alike in all directions and of such as networks make, which vary in few. Attention MIL of 200 cases of 2,000 tiles.
Intervals by 10,000 resamples of cases beside a loop over scikit-learn's score. Features are drawn: clusters with noise.
Prints Markdown; files lie in a temporary folder (2 GB). Times are CPU seconds of all threads, and wall clock, the
least of the repeats. `--only` runs one part.
"""

import argparse
import os
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
from dinoscope.evaluate.knn import _CHUNK_ROWS, neighbours
from dinoscope.evaluate.logistic import fit_logistic, log_probabilities
from dinoscope.evaluate.mil import attention_probe
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
        some, products = torch.from_numpy(drawn(_CHUNK_ROWS, 5)[0]), torch.empty(_CHUNK_ROWS, queries)

        def products_alone() -> None:
            for start in range(0, rows, _CHUNK_ROWS):
                num = min(_CHUNK_ROWS, rows - start)
                torch.mm(some[:num], torch.from_numpy(asked).T, out=products[:num])

        alone, times, most = [], [], 0.0
        for _ in range(repeats):
            alone.append(seconds(products_alone))
            with peak_memory() as peak:
                times.append(seconds(lambda: neighbours(asked, bank, K)))
            most = max(most, peak[0])
        row("dinoscope, float16 in a file", rows, *_least(times), f"{most:.2f}")
        row("its matrix products alone", rows, *_least(alone), "")
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
        row(f"{name}, float32 in memory", shared_rows, *_least(values), f"{peaks[name]:.2f}")
    same = np.mean(answers["dinoscope"] == answers["scikit-learn"])
    print(f"\n{queries} queries, {K} neighbours, {WIDTH} values; {100 * same:.3f} % of the neighbours are the same\n")


def _least(times: list[tuple[float, float]]) -> list[str]:
    return [f"{min(column):.2f}" for column in zip(*times, strict=True)]


def probes(rows: int, repeats: int) -> None:
    """The whole probe, and single regressions of its rows by both."""
    features, labels = drawn(rows, 3)
    cases = np.arange(rows) // max(1, rows // 200)
    row("linear probe", "rows", "CPU s", "wall s", "private memory more, GB")
    row("---", "---:", "---:", "---:", "---:")
    folds = grouped_folds(labels, cases, folds=5, repeats=1)
    answers = []
    with peak_memory() as peak:
        times = [seconds(lambda: answers.append(linear_probe(features, labels, cases, folds)))]
    row("dinoscope: 5 folds, each with 14 choices on 3 inner folds", rows, *_least(times), f"{peak[0]:.2f}")
    accuracy = score(answers[0].predictions[CLEAN], "balanced_accuracy")
    choices = ", ".join(f"{choice.scaling} {choice.penalty:g}" for choice in answers[0].choices)
    print(f"\nBalanced accuracy {accuracy:.4f}; chosen: {choices}\n")
    regressions(features, labels, "alike in all directions", repeats)


def uneven(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `drawn`, turned and stretched: the size of the n-th direction falls as 1 / n, as networks' features do."""
    features, labels = drawn(num, seed)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    return (features / np.arange(1, WIDTH + 1, dtype=np.float32)) @ turn, labels


def regressions(features: np.ndarray, labels: np.ndarray, what: str, repeats: int) -> None:
    """Single ones by both, of few rows and of many."""
    row(f"one regression, features {what}", "rows", "CPU s", "wall s", "objective")
    row("---", "---:", "---:", "---:", "---:")
    for num in (len(labels) // 5, len(labels)):
        some = features[:num] - features[:num].mean(0)
        some /= some.std(0)
        for strength in (1.0, 0.01):
            _one_regression(some, labels[:num], strength, repeats)
    print()


def _one_regression(rows: np.ndarray, labels: np.ndarray, strength: float, repeats: int) -> None:
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

    times: dict[str, list] = {"dinoscope": [], "scikit-learn": []}
    for _ in range(repeats):
        times["dinoscope"].append(seconds(ours))
        times["scikit-learn"].append(seconds(theirs))
    for name, of_both in times.items():
        row(f"{name}, C = {strength:g}", len(rows), *_least(of_both), f"{found[name]:.6f}")


def attention(num_cases: int, tiles: int, repeats: int) -> None:
    """Gated attention MIL, the classes told by a twentieth of a bag's tiles."""
    rng, labels = np.random.default_rng(0), np.arange(num_cases) % 2
    shift, bags = 0.05 * rng.normal(size=WIDTH).astype(np.float32), []
    for label in labels:
        bag = rng.standard_normal((tiles, WIDTH), np.float32)
        bag[: tiles // 20] += label * shift
        bags.append(bag.astype(np.float16))
    folds = grouped_folds(labels, np.arange(num_cases), folds=5, repeats=repeats)
    row("attention MIL", "cases of tiles", "CPU s", "wall s", "private memory more, GB")
    row("---", "---:", "---:", "---:", "---:")
    answers = []
    with peak_memory() as peak:
        times = seconds(lambda: answers.append(attention_probe(bags, labels, np.arange(num_cases), folds)))
    row(f"{len(folds)} folds", f"{num_cases} of {tiles}", *_least([times]), f"{peak[0]:.2f}")
    auroc = score(answers[0].predictions, "auroc")
    print(f"\nAUROC {auroc:.4f}; epochs kept {min(answers[0].epochs)} to {max(answers[0].epochs)}\n")


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
    row("dinoscope", draws, *_least([mine]))
    rows_of = np.arange(len(cases)).reshape(num_cases, tiles)

    def loop() -> None:
        for _ in range(theirs):
            chosen = rows_of[rng.integers(num_cases, size=num_cases)].ravel()
            roc_auc_score(truth[chosen], scores[chosen])

    found = seconds(loop)
    scaled = tuple(value * draws / theirs for value in found)
    row(f"a loop over scikit-learn's score ({theirs} measured, times {draws // theirs})", draws, *_least([scaled]))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the bank in a file")
    parser.add_argument("--shared-rows", type=int, default=200_000, help="of the bank in memory")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--probe-rows", type=int, default=200_000)
    parser.add_argument("--cases", type=int, default=200, help="of attention MIL")
    parser.add_argument("--tiles", type=int, default=2_000, help="of a case of attention MIL")
    parser.add_argument("--deals", type=int, default=5, help="of five folds for attention MIL")
    parser.add_argument("--repeats", type=int, default=3, help="of searches and regressions")
    parser.add_argument("--only", choices=("nearest", "probes", "uneven", "attention", "intervals"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = {
        "nearest": lambda: nearest(arguments.rows, arguments.shared_rows, arguments.queries, arguments.repeats),
        "probes": lambda: probes(arguments.probe_rows, arguments.repeats),
        "uneven": lambda: regressions(*uneven(arguments.probe_rows // 5, 3), "as networks'", arguments.repeats),
        "attention": lambda: attention(arguments.cases, arguments.tiles, arguments.deals),
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
