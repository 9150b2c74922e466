"""`forget_bias` of MinLSTM and MinLSTMCell: how long they remember at the start."""

import math
from typing import Any

import torch
from torch import Tensor


def check_forget_bias(forget_bias: Any, bias: bool) -> None:
    number = isinstance(forget_bias, (int, float)) and not isinstance(forget_bias, bool)
    if not number or not math.isfinite(forget_bias):
        raise ValueError(f"`forget_bias` must be a finite number, got {forget_bias!r}")
    if forget_bias and not bias:
        raise ValueError(f"`forget_bias` = {forget_bias} needs `bias` = True, got False")


@torch.no_grad()
def add_forget_bias(bias: Tensor, forget_bias: float, normalized: bool) -> None:
    """Change a bias with the rows f, i, v so that f' = sigmoid(forget_bias) where it was zero.

    A normalized f' = sigmoid(f) / (sigmoid(f) + sigmoid(i)) stays below 2/3 for i = 0, whatever f;
    with i = -f, and sigmoid(f) + sigmoid(-f) = 1, it is sigmoid(f).
    """
    f, i, _ = bias.chunk(3)
    f += forget_bias
    if normalized:
        i -= forget_bias
