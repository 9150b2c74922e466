"""Tasks that are made from a seed: selective copying."""

import numpy as np
import torch

from minrnn.data.batch import Batch

# the symbols of selective copying: noise, the data, and the marker that asks for them
NOISE, NUM_CLASSES = 0, 14
MARKER = NUM_CLASSES + 1
VOCABULARY = NUM_CLASSES + 2


def selective_copying(length: int, num_data: int, batch_size: int, seed: tuple[int, ...]) -> Batch:
    """Data among noise, to be given back in their order when markers ask for them.

    `length` symbols: `num_data` of 14 classes at random places, noise everywhere else. Then
    `num_data` markers; at each, the next of the data is to be told. Gu and Dao 2023,
    arXiv:2312.00752, section 4.1.1; Feng et al. 2024, arXiv:2410.01201, section 4.

    Args:
        length: symbols before the markers.
        num_data: data among them.
        batch_size: sequences, B.
        seed: what the batch depends on, and nothing else.

    Returns:
        inputs (B, length + num_data); the mask is True at the markers.

    Raises:
        ValueError: there is no room for the data.

    Example:
        >>> batch = selective_copying(6, 2, 1, seed=(0,))
        >>> data = batch.inputs[0, :6]
        >>> data[data != NOISE].tolist() == batch.targets[batch.mask].tolist()
        True
        >>> batch.inputs[0, 6:].tolist()
        [15, 15]
    """
    if not 1 <= num_data <= length:
        raise ValueError(f"`num_data` must be in [1, length] = [1, {length}], got {num_data}")
    random = np.random.default_rng(seed)
    data = random.integers(1, NUM_CLASSES + 1, (batch_size, num_data))
    # the places of the smallest of `length` random numbers, in order
    keys = random.random((batch_size, length))
    places = np.sort(np.argpartition(keys, num_data - 1, axis=1)[:, :num_data], axis=1)
    inputs = np.full((batch_size, length + num_data), NOISE, dtype=np.int64)
    np.put_along_axis(inputs, places, data, axis=1)
    inputs[:, length:] = MARKER
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, dtype=bool)
    targets[:, length:], mask[:, length:] = data, True
    return Batch(*map(torch.from_numpy, (inputs, targets, mask)))
