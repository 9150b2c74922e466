"""The paper's residual block and its parts, all behind forward(x, state) -> (y, state)."""

from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.mixers import Mixer
from minrnn.mixers.contract import DepthwiseConv
from minrnn.state import State


class CausalConv(nn.Module):
    """A causal temporal convolution: depthwise over the last steps, then pointwise.

        u_t = bias + sum_j w_j * x_{t - conv_width + 1 + j}     for each channel
        y_t = W u_t + bias'

    Its state is the last conv_width - 1 inputs, zeros before the first step.

    Args:
        width: channels, of x and y.
        conv_width: steps that one output sees, its own included.
    """

    def __init__(self, width: int, conv_width: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(width, conv_width)
        self.pointwise = nn.Linear(width, width)

    def init_state(self, batch_size: int) -> Tensor:
        """The inputs before the first step: zeros, (batch_size, conv_width - 1, width)."""
        return self.depthwise.init_state(batch_size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve x (B, T, width) behind the inputs `state` (B, conv_width - 1, width)."""
        u, last = self.depthwise(x, state)
        return self.pointwise(u), last


class FeedForward(nn.Module):
    """A two-layer perceptron with GELU, applied to each step by itself; it carries no state."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, ratio * width)
        self.narrow = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, T, width)."""
        return self.narrow(F.gelu(self.widen(x)))


class Block(nn.Module):
    """One residual layer of the paper's language models.

        x = x + conv(x)
        x = x + mixer(norm(x))
        x = x + feed_forward(norm(x))

    Feng et al. 2024, arXiv:2410.01201, appendix C: Conv4 -> minRNN -> MLP, RMSNorm. Dropout acts
    on what the mixer and the feed-forward part add, never on the residual stream or a state.

    Args:
        mixer: what mixes over time, e.g. a `MinimalRNN`.
        width: features of x.
        conv_width: width of the causal convolution; 0 leaves it out.
        mlp_ratio: inner width of the feed-forward part over `width`; 0 leaves it out.
        dropout: probability.
    """

    def __init__(
        self, mixer: Mixer, width: int, *, conv_width: int, mlp_ratio: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv = CausalConv(width, conv_width) if conv_width else None
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(width) if mlp_ratio else None
        self.mlp = FeedForward(width, mlp_ratio) if mlp_ratio else None
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""
        parts: dict[str, Tensor | State] = {"mixer": self.mixer.init_state(batch_size)}
        if self.conv is not None:
            parts["conv"] = self.conv.init_state(batch_size)
        return State(parts)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run x (B, T, width); the state holds "mixer" and, with a convolution, "conv"."""
        parts: dict[str, Tensor | State] = {}
        if self.conv is not None:
            y, parts["conv"] = self.conv(x, None if state is None else state.tensor("conv"))
            x = x + y
        mixer_state = None if state is None else state.inner("mixer")
        y, parts["mixer"] = self.mixer(self.mixer_norm(x), mixer_state)
        x = x + self.dropout(y)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, State(parts)
