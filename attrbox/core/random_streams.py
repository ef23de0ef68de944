"""Random numbers of each sample's own stream, whatever its batch mates, the chunk or the global random state.

`seed` means the same in `explain`, `compare`, `evaluate` and `export`: a whole number gives the sample at each position
a stream of its own, derived from both; a sequence names the stream of each sample. So sample i of a batch, of an
exported folder and of an evaluation draws the same numbers, and alone it does so with `seed=[streams(seed, i + 1)[i]]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attrbox.errors import OptionError, shown


def streams(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The stream of each of `count` samples.

    Args:
        seed: a number, from which each position derives its own, or the streams themselves.
        count: how many samples there are.

    Raises:
        OptionError: the seed is neither.
    """
    seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in seeds):
        raise OptionError(f"Expected the seed to be a whole number, or one per image, got {shown(seed)}.")
    if isinstance(seed, Sequence) and len(seeds) != count:
        raise OptionError(f"Expected one seed per image, {count} in all, got {len(seeds)}.")
    return seeds if isinstance(seed, Sequence) else tuple(mixed(seeds[0], position) for position in range(count))


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
