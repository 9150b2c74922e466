"""Whole models, and the configuration that is saved beside their weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minrnn.blocks import Block
from minrnn.configs import check_fields
from minrnn.layers import MinGRU, MinLSTM
from minrnn.mixers import (
    H3,
    S4D,
    S6,
    Aaren,
    Attention,
    LongConvolution,
    Mamba,
    MinimalRNN,
    Mixer,
    NoMixer,
    RecurrentNetwork,
    Ungated,
)
from minrnn.state import State

MixerName = Literal[
    "mingru",
    "minlstm",
    "gru",
    "lstm",
    "attention",
    "aaren",
    "mamba",
    "mamba-s4d",
    "mamba-hyena",
    "h3",
    "h3-s6",
    "hyena",
    "s4d",
    "s6",
    "none",
]
Candidate = Literal["g", "identity", "tanh"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: all that is needed beside its weights.

    The defaults are the paper's language model (Feng et al. 2024, section 4 and appendix C).

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    vocab_size: int = 0
    """Symbols; 0 stands for those of the text."""
    width: int = 384
    """Features of the residual stream."""
    num_layers: int = 3
    """Blocks."""
    mixer: MixerName = "mingru"
    """What mixes over time; "mamba-s4d" is Mamba's block with S4D inside, and so on."""
    expansion: int = 2
    """Channels of the recurrent state over `width`; of Mamba's inner layer."""
    num_heads: int = 6
    """Attention and Aaren: heads."""
    state_size: int = 16
    """S6 and S4D: numbers of state for each channel."""
    conv_width: int = 4
    """Steps that the causal convolution sees; 0 leaves it out."""
    mlp_ratio: int = 4
    """Inner width of the feed-forward part over `width`; 0 leaves it out."""
    dropout: float = 0.2
    """Probability, on what the mixer and the feed-forward part add."""
    candidate: Candidate = "g"
    """Activation of the candidate; "g" is the paper's log-space cell."""
    normalized: bool = True
    """minLSTM only: divide its gates by their sum."""
    forget_bias: float = 0.0
    """minLSTM only: b; at first f' is about sigmoid(b), a memory of about 1 + exp(b) steps."""
    longest_memory: int = 0
    """minGRU, minLSTM: at first channels forget after 1 to this many steps; 0: after about 2."""

    def __post_init__(self) -> None:
        check_fields(self)
        lowest = {"vocab_size": 0, "width": 1, "num_layers": 1, "expansion": 1}
        lowest |= {"num_heads": 1, "state_size": 1, "longest_memory": 0}
        for name, least in (lowest | {"conv_width": 0, "mlp_ratio": 0}).items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}")
        if self.mixer != "minlstm" and (self.forget_bias or not self.normalized):
            raise ValueError(
                f"`normalized` and `forget_bias` belong to the mixer 'minlstm', got {self.mixer!r}"
            )
        if self.longest_memory and self.mixer not in ("mingru", "minlstm"):
            raise ValueError(
                f"`longest_memory` belongs to the mixers 'mingru' and 'minlstm', got {self.mixer!r}"
            )


# layers without gates, and what stands around them: Gu and Dao 2023, arXiv:2312.00752, table 1
_FRAMED: dict[str, tuple[Any, str]] = {
    "mamba": (Mamba, "s6"),
    "mamba-s4d": (Mamba, "s4d"),
    "mamba-hyena": (Mamba, "hyena"),
    "h3": (H3, "s4d"),
    "h3-s6": (H3, "s6"),
    "hyena": (H3, "hyena"),
    "s4d": (Ungated, "s4d"),
    "s6": (Ungated, "s6"),
}


class Blocks(nn.ModuleList):
    """The layers of a model, one behind the other; their states are named "0", "1", ..."""

    def __init__(self, config: ModelConfig) -> None:
        sizes = {"conv_width": config.conv_width, "mlp_ratio": config.mlp_ratio}
        super().__init__(
            Block(build_mixer(config), config.width, **sizes, dropout=config.dropout)
            for _ in range(config.num_layers)
        )
        # of one row; 0 where a part grows with the text
        self._state_shapes = state_shapes(self.init_state(1))

    def init_state(self, batch_size: int) -> State:
        """The state before the first step."""
        parts: dict[str, Tensor | State] = {}
        for number, block in enumerate(self):
            assert isinstance(block, Block)
            parts[str(number)] = block.init_state(batch_size)
        return State(parts)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run x (B, T, width) after what `state` has read.

        Raises:
            ValueError: `state` is of another model, or of another batch size.
        """
        if state is not None:
            check_state(state, self._state_shapes, x.shape[0])
        states: dict[str, Tensor | State] = {}
        for number, block in enumerate(self):
            name = str(number)
            x, states[name] = block(x, None if state is None else state.inner(name))
        return x, State(states)


def state_shapes(state: State) -> dict[str, tuple[int, ...]]:
    """The shape of each part, for one row."""
    return {name: tuple(x.shape[1:]) for name, x in state.flatten().items()}


def check_state(state: State, shapes: dict[str, tuple[int, ...]], B: int) -> None:
    """`state` has the parts `shapes`, where 0 stands for any size, and B rows.

    Raises:
        ValueError: it is of another model, or of another batch size.
    """
    found = state_shapes(state)
    for name in {**shapes, **found}:
        wanted, got = shapes.get(name), found.get(name)
        if wanted is None or got is None or not _fits(got, wanted):
            raise ValueError(
                f"`state` must be of a model like this one, whose part {name!r} has shape "
                f"{wanted} a row, got {got}"
            )
    if state.batch_size != B:
        raise ValueError(f"`state` must have batch size B = {B}, got {state.batch_size}")


def _fits(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal sizes, and any size where `wanted` is 0."""
    pairs = zip(sizes, wanted, strict=False)
    return len(sizes) == len(wanted) and all(b in (a, 0) for a, b in pairs)


class TextModel(Protocol):
    """What reads symbols and predicts the next: a `LanguageModel`, or one packed for inference."""

    config: ModelConfig

    def init_state(self, batch_size: int) -> State:
        """The state before the first symbol."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """At least one, which says on what device the model is."""
        ...

    def __call__(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) behind each of `ids` (B, T), and the next state."""
        ...


class LanguageModel(nn.Module):
    """Predicts the next symbol after each symbol of a text, in constant memory per stream.

        x = embedding(ids);  x = block_l(x) for each layer;  logits = head(norm(x))

    Args:
        config: the shape of the model, `vocab_size` >= 1.

    Raises:
        ValueError: `config.vocab_size` is 0; on a call, `ids` has the wrong shape.
        TypeError: on a call, `ids` holds no integers.

    Example:
        >>> import torch
        >>> model = LanguageModel(ModelConfig(vocab_size=65, width=32)).eval()
        >>> ids = torch.randint(65, (2, 10))
        >>> logits, state = model(ids)
        >>> logits.shape, state.batch_size
        (torch.Size([2, 10, 65]), 2)
        >>> _, half = model(ids[:, :4])                 # the same in two pieces
        >>> torch.allclose(model(ids[:, 4:], half)[0], logits[:, 4:], atol=1e-5)
        True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"`config.vocab_size` must be >= 1, got {config.vocab_size}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = Blocks(config)
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        # at the start every symbol is about equally likely
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def init_state(self, batch_size: int) -> State:
        """The state before the first symbol; `forward` takes None for the same."""
        return self.blocks.init_state(batch_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read `ids` behind what `state` has read.

        Args:
            ids: (B, T) integers below `vocab_size`, T >= 1.
            state: what an earlier call returned; None at the start of a text.

        Returns:
            logits: (B, T, V), before the softmax, of the symbol after each, in the dtype of the
                weights, or of autocast.
            state: a State of fixed size, one entry for each layer.
        """
        check_ids(ids)
        # (B, T) to (B, T, width)
        x = self.embedding(ids if ids.dtype in (torch.int32, torch.int64) else ids.long())
        y, last = self.blocks(x, state)
        return self.head(self.norm(y)), last


def check_ids(ids: Tensor) -> None:
    """What every `TextModel` asks of its symbols.

    Raises:
        ValueError: `ids` has not the shape (B, T) with T >= 1.
        TypeError: it holds no integers.
    """
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"`ids` must have shape (B, T) with T >= 1, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"`ids` must hold integers, got {ids.dtype}")


def checked_ids(ids: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """The ids of one sequence, (T,) int64.

    Raises:
        ValueError: there are none, `ids` has not one axis, or one is not in [0, vocab_size).
        TypeError: `ids` holds no integers.
    """
    # of numbers on the CPU, whatever the default device is
    row = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
    if row.dim() != 1:
        raise ValueError(f"`ids` must have shape (T,), got {tuple(row.shape)}")
    if len(row) == 0:
        raise ValueError("`ids` must hold at least one symbol, got none")
    check_ids(row[None])
    # as int64: unsigned kinds have no order in torch
    row = row.long()
    outside = (row < 0) | (row >= vocab_size)
    if outside.any():
        bad = int(row[outside][0])
        raise ValueError(f"`ids` must be in [0, V) = [0, {vocab_size}), got {bad}")
    return row


def build_mixer(config: ModelConfig) -> Mixer:
    """The mixer that `config` names, with its options."""
    width, expansion, name = config.width, config.expansion, config.mixer
    if name in ("mingru", "minlstm"):
        options: dict[str, Any] = {"candidate": config.candidate}
        if name == "minlstm":
            options |= {"normalized": config.normalized, "forget_bias": config.forget_bias}
        layer = MinGRU if name == "mingru" else MinLSTM
        return MinimalRNN(layer, width, expansion, config.longest_memory, **options)
    if name in ("gru", "lstm"):
        return RecurrentNetwork(nn.GRU if name == "gru" else nn.LSTM, width, expansion)
    if name == "none":
        return NoMixer()
    if name in ("attention", "aaren"):
        return (Attention if name == "attention" else Aaren)(width, config.num_heads)
    frame, inner = _FRAMED[name]
    if frame is Mamba:
        return Mamba(width, expansion, _inner(inner, width * expansion, config))
    return frame(width, _inner(inner, width, config))


def _inner(name: str, channels: int, config: ModelConfig) -> Mixer:
    if name == "hyena":
        return LongConvolution(channels)
    if name == "s4d":
        return S4D(channels, config.state_size)
    # the rank goes by the width of the model, as in Mamba's paper
    return S6(channels, config.state_size, rank=math.ceil(config.width / 16))
