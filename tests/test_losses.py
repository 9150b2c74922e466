"""Losses over a Batch's mask."""

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
