"""The order of samples: computed from the step number, never stored.

Sample number k counts all samples that a run ever sees, over all ranks. Step s of W ranks with B tiles each takes the
numbers s·W·B … (s+1)·W·B - 1, rank after rank. Sampled uniformly (sampling.py has the tempered order) sample k is tile
number k mod N of pass k div N over the N tiles, in an order that is a pseudo-random permutation of its own for every
pass, evaluated at one index in O(1) time and memory.
"""

from collections.abc import Iterator

__all__ = ["StepSampler", "mix64", "permuted_index", "tile_of_sample"]

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


def tile_of_sample(sample: int, num_tiles: int, seed: int) -> int:
    """Row of the manifest that sample number `sample` is cut from."""
    epoch, position = divmod(sample, num_tiles)
    return permuted_index(position, num_tiles, seed, epoch)


def permuted_index(index: int, size: int, seed: int, epoch: int) -> int:
    """Where a pseudo-random permutation of 0 … size-1, chosen by (seed, epoch), sends `index`.

    A Feistel network over the next even number of bits, walked until it lands inside the range (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside 0 … {size - 1}")
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    low_bits = (1 << half) - 1
    key = mix64(mix64(seed & _MASK64) ^ epoch)
    while True:
        left, right = index >> half, index & low_bits
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (turn << 56) ^ right) & low_bits)
        index = left << half | right
        if index < size:
            return index


def mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit changes every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class StepSampler:
    """A batch sampler: for every step from `first` to before `last`, the sample numbers of this rank."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.last, self.batch_size, self.rank, self.world_size = first, last, batch_size, rank, world_size

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))
