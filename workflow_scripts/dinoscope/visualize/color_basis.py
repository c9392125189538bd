"""A colour space for features: their first three principal components as red, green and blue.

Fitted once over all that is to be compared, so that a colour means the same everywhere. Each component is stretched
from its 1st to its 99th percentile, which keeps outliers from taking all the contrast. Order (by variance) and sign
(the largest loading is positive) are fixed, so that reruns give the same colours.

With `background` other than "keep", what the first component sets apart is left out first, as in the DINO papers: its
scores are split at Otsu's threshold (Otsu 1979), and components and colours are fitted on the other part alone.

Shapes: N rows (tiles or patches), D feature dimensions, K components.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoscope.errors import ConfigError, FeaturesError
from dinoscope.features.writers import FeatureInfo

__all__ = ["BACKGROUNDS", "DARKEST", "ColorBasis", "fit_colors", "kind_of", "otsu_threshold"]

BACKGROUNDS = ("keep", "low", "high")
MAX_COMPONENTS = 50
MIN_VARIANCE = 1e-10  # of component 3 beside component 1: below, it is rounding
DARKEST = 36
BACKGROUND_COLOR = 200
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0
MIN_FOREGROUND = 4
TILES_HINT = "check the weights of this model, or take other features of tiles (--pooling mean, --dtype float32)"


@dataclass(frozen=True)
class ColorBasis:
    """A colour space for the features of one model.

    Attributes:
        mean: (D,) of the rows that it was fitted on.
        components: (K, D), orthonormal rows, the largest variance first; K is at most 50.
        low: (3,) 1st percentile of the first three components on those rows: least red, green, blue.
        high: (3,) 99th percentile: full red, green, blue.
        info: What basis.json holds: model, digests, numbers of tiles and slides, explained variance, versions.
        gate: (D,) direction along which background is told, None where none is.
        gate_below: Rows whose distance from `mean` along `gate` is below this are background.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray
    info: dict[str, Any]
    gate: np.ndarray | None = None
    gate_below: float = 0.0

    def project(self, features: np.ndarray) -> np.ndarray:
        """Coordinates (N, K) of features (N, D) on the components."""
        return (features.astype(np.float32) - self.mean) @ self.components.T

    def is_background(self, features: np.ndarray) -> np.ndarray:
        """Which of the rows (N, D) are background, bool (N,); none where background is kept."""
        if self.gate is None:
            return np.zeros(len(features), bool)
        return (features.astype(np.float32) - self.mean) @ self.gate < self.gate_below

    def colors(self, features: np.ndarray) -> np.ndarray:
        """RGB (N, 3) uint8 of features (N, D); values outside the percentiles are clipped, background is pale grey.

        The scale begins at 36, not at 0, so that no tile is black and what lies under it stays visible.
        """
        colors = self.colors_of_scores((features.astype(np.float32) - self.mean) @ self.components[:3].T)
        colors[self.is_background(features)] = BACKGROUND_COLOR
        return colors

    def colors_of_scores(self, scores: np.ndarray) -> np.ndarray:
        """RGB (…, 3) uint8 of coordinates (…, 3) on the first three components."""
        scaled = (scores - self.low) / (self.high - self.low)
        return np.rint(DARKEST + (255 - DARKEST) * scaled.clip(0, 1)).astype(np.uint8)

    def share_outside(self, features: np.ndarray) -> float:
        """Share of the tiles that lie far outside the colours' range, so that their colours no longer tell them apart.

        Far means by more than a quarter of the range of a component. Background does not count.
        """
        features = features[~self.is_background(features)]
        scores = (features.astype(np.float32) - self.mean) @ self.components[:3].T
        scaled = (scores - self.low) / (self.high - self.low)
        return float(((scaled < -0.25) | (scaled > 1.25)).any(axis=1).mean()) if len(features) else 0.0

    def check_fits(self, info: FeatureInfo, path: str | os.PathLike[str]) -> None:
        """Refuses features of another model or tile kind.

        Raises:
            FeaturesError: They differ in model, weights, pooling, mpp or tile size.
        """
        for key, value in kind_of(info).items():
            if value != self.info[key]:
                raise FeaturesError(
                    f"{path}: its features have {key} {value}, but the PCA basis was fitted on {key} {self.info[key]}; "
                    "fit a basis of its own, or extract the features again"
                )


def kind_of(info: FeatureInfo) -> dict[str, Any]:
    """What files must have in common to be compared."""
    return {name: getattr(info, name) for name in ("model", "weights_sha256", "pooling", "mpp", "tile_px")}


def fit_colors(sample: np.ndarray, what: str, *, background: str = "keep", hint: str = TILES_HINT) -> ColorBasis:
    """Fits a colour space on rows of features.

    Args:
        sample: (N, D) float32; changed.
        what: What the rows are of, for messages, e.g. "model 'gram'".
        background: "keep"; or which side of the first component is background and left out, "low" or "high". Features
            alone do not tell which: now glass, now tissue is the more uniform side, so the user has to look.
        hint: What to do where the rows do not differ enough, for that message.

    Returns:
        The basis; its info holds numbers of rows and dimensions and the explained variance.

    Raises:
        ConfigError: `background` is none of these.
        FeaturesError: The rows differ in fewer than three directions.
    """
    if background not in BACKGROUNDS:
        raise ConfigError(
            f"background {background!r} is none of {', '.join(BACKGROUNDS)}; look at a map made with keep"
        )
    # centred here, in float64, because the covariance solver loses digits when means are large beside the spread
    mean = sample.mean(axis=0, dtype=np.float64)
    sample -= mean.astype(np.float32)
    gate, gate_below = None, 0.0
    if background != "keep":
        gate, gate_below = _background_gate(sample, what, background, hint)
        sample = sample[sample @ gate >= gate_below]
        shift = sample.mean(axis=0, dtype=np.float64)
        sample -= shift.astype(np.float32)
        mean, gate_below = mean + shift, gate_below - float(gate @ shift)
    pca = _principal_components(sample, what, MAX_COMPONENTS, hint)
    components = _with_fixed_signs(pca.components_)
    low, high = np.percentile(sample @ components[:3].T, [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    if pca.explained_variance_[2] < MIN_VARIANCE * pca.explained_variance_[0] or not (high > low).all():
        raise _too_flat(what, hint)
    ratios = pca.explained_variance_ratio_.astype(float)
    return ColorBasis(
        mean=(mean + pca.mean_).astype(np.float32),
        components=components.astype(np.float32),
        low=low.astype(np.float32),
        high=high.astype(np.float32),
        info={
            "num_tiles_fitted": len(sample),
            "num_dimensions": sample.shape[1],
            "explained_variance_ratio": [round(float(ratio), 6) for ratio in ratios],
            "explained_by_top_3": round(float(ratios[:3].sum()), 6),
            "explained_by_top_50": round(float(ratios[:50].sum()), 6),
            "background": background,
        },
        gate=gate,
        gate_below=gate_below,
    )


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that parts values into two groups with the largest variance between them (Otsu 1979), exactly."""
    ordered = np.sort(values.astype(np.float64))
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    gap = below / count - (ordered.sum() - below) / (len(ordered) - count)
    split = int(np.argmax(count * (len(ordered) - count) * gap**2))
    return float((ordered[split] + ordered[split + 1]) / 2)


def _background_gate(centred: np.ndarray, what: str, side: str, hint: str) -> tuple[np.ndarray, float]:
    """Direction and threshold below which rows are background."""
    gate = _with_fixed_signs(_principal_components(centred, what, 3, hint).components_)[0].astype(np.float32)
    scores = centred @ gate
    threshold = otsu_threshold(scores)
    if side == "high":
        gate, threshold, scores = -gate, -threshold, -scores
    if np.count_nonzero(scores >= threshold) < MIN_FOREGROUND:
        raise FeaturesError(
            f"the first component of {what} sets apart all but {np.count_nonzero(scores >= threshold)} rows as "
            "background; keep the background (background: keep)"
        )
    return gate, threshold


def _principal_components(centred: np.ndarray, what: str, most: int, hint: str) -> Any:
    from sklearn.decomposition import PCA

    num_rows, width = centred.shape
    num_components = min(most, num_rows - 1, width)
    if num_components < 3 or not centred.any():
        raise _too_flat(what, hint)
    solver = "covariance_eigh" if num_rows > width else "full"
    return PCA(num_components, svd_solver=solver).fit(centred)


def _too_flat(what: str, hint: str) -> FeaturesError:
    return FeaturesError(f"the features of {what} differ in fewer than 3 directions; {hint}")


def _with_fixed_signs(components: np.ndarray) -> np.ndarray:
    """Makes the largest loading of every component positive, so that reruns give the same colours."""
    largest = np.abs(components).argmax(axis=1)
    return components * np.sign(components[np.arange(len(components)), largest])[:, None]
