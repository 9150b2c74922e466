"""H3: two gates around a layer that has none; and the plain way to use such a layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.mixers.contract import DepthwiseConv, Mixer
from minrnn.state import State

# steps that the shift sees
_SHIFT = 4


class H3(Mixer):
    """Linear attention by state spaces: a shift finds a key, an inner layer keeps its value.

        q, k, v = split(W x);  k = shift(k)
        y = P (q * inner(k * v))

    Fu et al. 2023, arXiv:2212.14052. Its shift is a state space that holds the last inputs, hence a
    causal convolution. With a `LongConvolution` inside, this is the Hyena of two gates of Poli et
    al. 2023, as Gu and Dao 2023 (arXiv:2312.00752, section 2) put it.

    Args:
        width: features of x and y.
        inner: maps `width` channels to as many: `S4D`, `S6`, `LongConvolution`.
    """

    def __init__(self, width: int, inner: Mixer) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.shift = DepthwiseConv(width, _SHIFT)
        self.inner = inner
        self.out = nn.Linear(width, width)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""
        shift = self.shift.init_state(batch_size)
        return State({"shift": shift, "inner": self.inner.init_state(batch_size)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"shift", "inner"}."""
        q, k, v = self.qkv(x).chunk(3, dim=2)
        k, shift = self.shift(k, None if state is None else state.tensor("shift"))
        y, inner = self.inner(k * v, None if state is None else state.inner("inner"))
        return self.out(q * y), State({"shift": shift, "inner": inner})


class Ungated(Mixer):
    """An inner layer by itself, as S4 stood before there were gates: y = P gelu(inner(x)).

    Args:
        width: features of x and y.
        inner: maps `width` channels to as many.
    """

    def __init__(self, width: int, inner: Mixer) -> None:
        super().__init__()
        self.inner = inner
        self.out = nn.Linear(width, width)

    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""
        return State({"inner": self.inner.init_state(batch_size)})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, width); the state is {"inner"}."""
        y, inner = self.inner(x, None if state is None else state.inner("inner"))
        return self.out(F.gelu(y)), State({"inner": inner})
