"""The crop sizes of a recipe: one set, or several of which every step draws one (high-resolution adaptation).

Nothing here imports torch: planning asks too.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dinoscope.data.sampler import mix64

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["Resolution", "aligned", "as_list", "choice_of_step", "resolutions"]

_STREAM = 0x7265736F6C757469  # keeps these draws apart from those of the order of samples


class Resolution(NamedTuple):
    """Sizes of the crops of one step.

    Attributes:
        global_px: Edge of the global crops.
        local_px: Edge of the local crops.
        gram_px: Edge of the gram teacher's crops; None where it sees the global ones, or there is none.
        share: Of the steps that have these sizes; all shares make 1.
    """

    global_px: int
    local_px: int
    gram_px: int | None
    share: float


def resolutions(config: "RunConfig") -> list[Resolution]:
    """All that the steps of a run have, in the order of the recipe; one number stands for as many as there are."""
    crops = config.crops
    columns = [as_list(crops[f"{name}_crops_size"]) for name in ("global", "local", "gram_teacher")]
    of_global, of_local, of_gram, weights = aligned(*columns, as_list(crops.global_local_crop_pairs_ratios))
    if not config.gram.use_loss:
        of_gram = [None] * len(of_gram)
    shares = [weight / sum(weights) for weight in weights]
    return [Resolution(*sizes) for sizes in zip(of_global, of_local, of_gram, shares, strict=True)]


def as_list(value: Any) -> list[Any]:
    """A setting that is one value or a list of them."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_list else [value]


def aligned(*columns: list[Any]) -> list[list[Any]]:
    """Lists of one value or of as many as the longest has, all made as long as that."""
    count = max(map(len, columns))
    return [column * count if len(column) == 1 else column for column in columns]


def choice_of_step(shares: Sequence[float], seed: int, step: int) -> int:
    """Which of several things a step gets, each as often as its share says; the same on all ranks."""
    drawn = mix64(mix64((seed ^ _STREAM) & ((1 << 64) - 1)) ^ step) / 2**64
    reached = itertools.accumulate(shares)
    return next((index for index, edge in enumerate(reached) if drawn < edge), len(shares) - 1)
