"""A model that acts: the actions that lead to a wanted return, over any mixer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minrnn.configs import check_fields
from minrnn.models import Blocks, ModelConfig
from minrnn.state import State

# returns-to-go are divided by it where no data says otherwise: Chen et al. 2021, arXiv:2106.01345
_SCALE = 1000.0


@dataclass(frozen=True)
class DecisionConfig:
    """The shape of a decision model: its blocks, and what it sees and does.

    The defaults are the paper's (Feng et al. 2024, section 4 and appendix): no convolution, a
    feed-forward part in each block.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    observation_size: int = 0
    """Numbers that are observed at a step, S; 0 stands for those of the data."""
    action_size: int = 0
    """Numbers that an action has, A; 0 stands for those of the data."""
    episode_length: int = 1000
    """Steps that a timestep embedding is learnt for; 0 leaves it out."""
    return_scale: float | None = None
    """Returns-to-go are divided by it. None stands for that of the data in a training, the largest
    power of ten up to their largest size, and for 1,000 in a model that is made without data."""
    blocks: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            width=128, expansion=1, num_heads=1, conv_width=0, dropout=0.1
        )
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("observation_size", "action_size", "episode_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}")
        if self.blocks.vocab_size:
            raise ValueError(f"a decision model has no symbols, got {self.blocks.vocab_size}")
        if self.return_scale is not None and self.return_scale <= 0:
            raise ValueError(f"`return_scale` must be > 0, got {self.return_scale}")


class DecisionModel(nn.Module):
    """Tells the action that leads to a wanted return, from what happened so far.

    Each step is three tokens, and the action is told at the last of them:

        W_a a_{t-1} + e_{t-1},  W_r R_t / scale + e_t,  W_s (s_t - mean) / std + e_t
        x = norm(tokens);  x = block_l(x) for each layer
        a_t = middle + reach * tanh(W norm(x) + b)

    R is the return-to-go, e the learned embedding of the step's number. Chen et al. 2021,
    arXiv:2106.01345, section 3, with any mixer; the action before opens a step instead of closing
    the one before, so that the order is the same and one call takes one step of an environment.

    Args:
        config: the shape of the model, sizes >= 1.

    Raises:
        ValueError: a size is 0; on a call, `x` has the wrong shape.

    Example:
        >>> import torch
        >>> model = DecisionModel(DecisionConfig(observation_size=11, action_size=3)).eval()
        >>> x = torch.randn(2, 5, model.num_features)
        >>> actions, state = model(x)
        >>> actions.shape
        torch.Size([2, 5, 3])
        >>> _, half = model(x[:, :4])
        >>> torch.allclose(model(x[:, 4:], half)[0], actions[:, 4:], atol=1e-5)
        True
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_middle: Tensor
    action_reach: Tensor

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        S, A, width = config.observation_size, config.action_size, config.blocks.width
        if S < 1 or A < 1:
            raise ValueError(
                f"`config.observation_size` and `config.action_size` must be >= 1, got {S}, {A}"
            )
        self.config = config
        self.return_scale = _SCALE if config.return_scale is None else config.return_scale
        self.embed_action = nn.Linear(A, width)
        self.embed_return = nn.Linear(1, width)
        self.embed_observation = nn.Linear(S, width)
        length = config.episode_length
        self.embed_step = nn.Embedding(length, width) if length else None
        self.token_norm = nn.RMSNorm(width)
        self.blocks = Blocks(config.blocks)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, A)
        if self.embed_step is not None:
            nn.init.normal_(self.embed_step.weight, std=0.02)
        self.register_buffer("observation_mean", torch.zeros(S))
        self.register_buffer("observation_std", torch.ones(S))
        self.register_buffer("action_middle", torch.zeros(A))
        self.register_buffer("action_reach", torch.ones(A))

    @property
    def num_features(self) -> int:
        """Numbers that a step of `x` has: A + 1 + S + 1."""
        return self.config.action_size + self.config.observation_size + 2

    def init_state(self, batch_size: int) -> State:
        """The state before the first step; `forward` takes None for the same."""
        return self.blocks.init_state(batch_size)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tell the actions of the steps `x` behind what `state` has seen.

        Args:
            x: (B, T, A + 1 + S + 1), T >= 1: the action before (zeros at first), the
                return-to-go, the observation, the number of the step, from 0. Numbers beyond
                `config.episode_length` are taken for the last. float32, under autocast and for
                weights in half precision too, where the number of a late step has no place.
            state: what an earlier call returned; None at the start.

        Returns:
            actions: (B, T, A), in the dtype of the weights, also under autocast.
            state: a State, one entry for each layer.
        """
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.num_features:
            raise ValueError(
                f"`x` must have shape (B, T, {self.num_features}) with T >= 1, got {tuple(x.shape)}"
            )
        sizes = [self.config.action_size, 1, self.config.observation_size, 1]
        dtype = self.norm.weight.dtype
        action, to_go, observation, number = x.split(sizes, dim=2)
        observation = (observation - self.observation_mean) / self.observation_std
        action = (action - self.action_middle) / self.action_reach
        action = self.embed_action(action.to(dtype))
        to_go = self.embed_return((to_go / self.return_scale).to(dtype))
        observation = self.embed_observation(observation.to(dtype))
        if self.embed_step is not None:
            last = self.embed_step.num_embeddings - 1
            now = number[:, :, 0].long()
            action = action + self.embed_step((now - 1).clamp(0, last))
            now = self.embed_step(now.clamp(0, last))
            to_go, observation = to_go + now, observation + now
        # three (B, T, width) to (B, 3 T, width), step by step
        tokens = torch.stack((action, to_go, observation), dim=2).flatten(1, 2)
        y, last = self.blocks(self.token_norm(tokens), state)
        # what follows each observation: (B, 3 T, width) to (B, T, A)
        told = self.head(self.norm(y[:, 2::3])).tanh()
        return self.action_middle + self.action_reach * told, last
