"""Selective copying: what the batches hold, and that a seed fixes them."""

import pytest
import torch

from minrnn.data.synthetic import MARKER, NOISE, NUM_CLASSES, VOCABULARY, selective_copying


def test_data_come_back_in_their_order() -> None:
    batch = selective_copying(50, 16, 30, seed=(3,))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (30, 66)
    assert (batch.inputs[:, 50:] == MARKER).all()
    for row, targets in zip(batch.inputs[:, :50], batch.targets, strict=True):
        assert torch.equal(row[row != NOISE], targets[50:])
    assert torch.equal(batch.mask, (batch.inputs == MARKER))
    assert batch.num_targets == 30 * 16


def test_classes_and_places_are_uniform() -> None:
    batch = selective_copying(40, 10, 4000, seed=(0,))
    body = batch.inputs[:, :40]
    counts = torch.bincount(body.flatten(), minlength=VOCABULARY)
    assert counts[NOISE] == 4000 * 30
    assert counts[MARKER] == 0
    # 40,000 draws of 14 classes: a standard deviation is some 52
    assert ((counts[1:MARKER] - 40_000 / NUM_CLASSES).abs() < 5 * 52).all()
    # each of 40 places is taken in a quarter of 4,000 rows: a standard deviation is some 27
    assert (((body != NOISE).sum(0) - 1000).abs() < 5 * 28).all()


def test_a_batch_is_a_function_of_its_seed() -> None:
    one, same, other = (selective_copying(20, 4, 8, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)


def test_all_places_may_be_taken() -> None:
    batch = selective_copying(5, 5, 2, seed=(0,))
    assert torch.equal(batch.inputs[:, :5], batch.targets[:, 5:])


@pytest.mark.parametrize("num_data", [0, 6])
def test_data_must_have_room(num_data: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[1, length\] = \[1, 5\], got {num_data}"):
        selective_copying(5, num_data, 2, seed=(0,))
