"""Losses over a Batch's mask."""

import pytest
import torch
from torch.nn import functional as F

from minrnn import losses
from minrnn.data.batch import Batch


def test_loss_is_the_mean_over_what_counts() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    mask = torch.tensor([[True, True, False], [False, True, False]])
    logits.requires_grad_()
    loss = losses.next_symbol(logits, Batch(targets, targets, mask))
    each = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, each[mask].mean())
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).all()


def test_full_mask_equals_plain_cross_entropy() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    batch = Batch(targets, targets, torch.ones(2, 3, dtype=torch.bool))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.next_symbol(logits, batch), expected)


def test_loss_is_float32_for_half_precision_logits() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    targets = torch.randint(5, (2, 3))
    batch = Batch(targets, targets, torch.ones(2, 3, dtype=torch.bool))
    assert losses.next_symbol(logits, batch).dtype == torch.float32


def test_the_mask_alone_says_what_counts() -> None:
    targets = torch.randint(5, (2, 3))
    targets[0, 1] = -100
    full = torch.ones(2, 3, dtype=torch.bool)
    # torch would leave it out of the mean without a word
    with pytest.raises(IndexError, match="-100"):
        losses.next_symbol(torch.randn(2, 3, 5), Batch(targets, targets, full))
    assert losses.next_symbol(torch.randn(2, 3, 5), Batch(targets, targets, targets >= 0)) > 0


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 4, 5), (6, 5), (1, 3, 5)])
def test_outputs_of_other_axes_are_refused(shape: tuple[int, ...]) -> None:
    targets, mask = torch.randint(5, (2, 3)), torch.tensor([[True, True, False]] * 2)
    actions = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"outputs must have the shape \(B, T, \.\.\.\)"):
        losses.next_symbol(torch.randn(shape), Batch(targets, targets, mask))
    with pytest.raises(ValueError, match=r"`actions` must have the shape \(B, T, A\)"):
        losses.action_error(torch.randn(shape), Batch(actions, actions, mask))


def test_no_action_is_broadcast() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    for size in ((2, 3, 1), (2, 3)):
        targets = torch.randn(size)
        with pytest.raises(ValueError, match=r"= \(2, 3.*\) of the targets, got \(2, 3, 4\)"):
            losses.action_error(torch.randn(2, 3, 4), Batch(targets, targets, mask))


def test_a_mean_needs_a_target() -> None:
    ids, actions = torch.randint(5, (2, 3)), torch.randn(2, 3, 4)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`batch` must hold at least one target, got none"):
        losses.next_symbol(torch.randn(2, 3, 5), Batch(ids, ids, mask))
    with pytest.raises(ValueError, match="`batch` must hold at least one target, got none"):
        losses.action_error(actions, Batch(actions, actions, mask))
