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


@pytest.mark.parametrize("target", [-100, -1, 5])
@pytest.mark.parametrize("counted", [True, False])
def test_targets_that_count_must_be_tokens(target: int, counted: bool) -> None:
    targets = torch.tensor([[0, 4, target]])
    mask = torch.tensor([[True, True, counted]])
    logits = torch.randn(1, 3, 5)
    batch = Batch(targets.clamp(0, 4), targets, mask)
    if counted:
        # `num_targets` counts it: the mean over several batches would be wrong
        with pytest.raises(ValueError, match=rf"must be in \[0, V\) = \[0, 5\), got {target}"):
            losses.next_symbol(logits, batch)
    else:
        expected = F.cross_entropy(logits[0, :2], targets[0, :2])
        torch.testing.assert_close(losses.next_symbol(logits, batch), expected)


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 4, 5), (4, 3, 5), (6, 5)])
@pytest.mark.parametrize("full", [True, False])
def test_outputs_of_other_steps_or_rows_are_refused(shape: tuple[int, ...], full: bool) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = full
    tokens, actions = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"`logits` must begin with the shape \(B, T\) = \(2, 3\)"):
        losses.next_symbol(torch.randn(shape), Batch(tokens, tokens, mask))
    with pytest.raises(ValueError, match=r"`actions` must have the shape .*\(2, 3, 5\), got"):
        losses.action_error(torch.randn(shape), Batch(actions, actions, mask))


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3)])
def test_actions_are_not_broadcast(shape: tuple[int, ...]) -> None:
    targets, mask = torch.randn(shape), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`actions` must have the shape of the targets"):
        losses.action_error(torch.randn(2, 3, 5), Batch(targets, targets, mask))


def test_a_mean_needs_a_target() -> None:
    ids, actions = torch.randint(5, (2, 3)), torch.randn(2, 3, 4)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`batch` must hold at least one target, got none"):
        losses.next_symbol(torch.randn(2, 3, 5), Batch(ids, ids, mask))
    with pytest.raises(ValueError, match="`batch` must hold at least one target, got none"):
        losses.action_error(actions, Batch(actions, actions, mask))
