"""Random numbers that depend on a sample's own seed, not on its batch mates, the chunk or the global random state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attrbox.errors import OptionError, shown


def check_seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One seed for all of `count` samples, or one each, as a tuple of one or of `count`.

    Raises:
        OptionError: it is neither.
    """
    seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in seeds):
        raise OptionError(f"Expected the seed to be a whole number, or one per image, got {shown(seed)}.")
    if isinstance(seed, Sequence) and len(seeds) != count:
        raise OptionError(f"Expected one seed per image, {count} in all, got {len(seeds)}.")
    return seeds


def mixed(seed: int, draw: int) -> int:
    """A seed of 63 bits for one draw of one stream (SplitMix64's finaliser, so that neighbours are unrelated)."""
    z = (seed * 0x9E3779B97F4A7C15 + (draw + 1) * 0xD1B54A32D192ED03) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def numbers(seeds: Sequence[int], draw: int, shape: Sequence[int], like: Tensor, uniform: bool = False) -> Tensor:
    """Standard normal numbers, or uniform ones in [0, 1): draw `draw` of each seed's stream, [len(seeds), *shape].

    Their dtype and device are those of `like`.
    """
    if like.is_meta:
        return like.new_empty((len(seeds), *shape))
    generator = torch.Generator(like.device)
    drawn = []
    for seed in seeds:
        generator.manual_seed(mixed(seed, draw))
        function = torch.rand if uniform else torch.randn
        drawn.append(function(*shape, generator=generator, device=like.device, dtype=like.dtype))
    return torch.stack(drawn)


def permutations(seeds: Sequence[int], draw: int, size: int, device: torch.device) -> Tensor:
    """A random order of `size` things: draw `draw` of each seed's stream, [len(seeds), size]."""
    generator = torch.Generator(device)
    drawn = []
    for seed in seeds:
        generator.manual_seed(mixed(seed, draw))
        drawn.append(torch.randperm(size, generator=generator, device=device))
    return torch.stack(drawn)
