"""SplitMix64: from 64 bits to 64 that look drawn, without a state to keep."""

import numpy as np

# the golden ratio, in 64 bits: what its counter is raised by
GAMMA = 0x9E3779B97F4A7C15


def mixed(x: np.ndarray) -> np.ndarray:
    """The finish of SplitMix64: every bit that goes in moves every bit that comes out.

    Steele, Lea and Flood 2014, section 3; a permutation of the numbers of 64 bits.

    Args:
        x: uint64, any shape.

    Example:
        >>> f"{int(mixed(np.array([GAMMA], dtype=np.uint64))[0]):x}"
        'e220a8397b1dcdaf'
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
