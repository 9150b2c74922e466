"""Named settings: a recipe is an instance of a configuration."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from minrnn.configs import check_fields
from minrnn.data.tokenizers import Kind, bpe_size
from minrnn.data.windows import Order
from minrnn.decision import DecisionConfig
from minrnn.models import ModelConfig
from minrnn.train_config import TrainConfig

VALID_FRACTION = 0.1
# below, the validation loss is noise
_LEAST_VALIDATED = 32_768

RecipeName = Literal["shakespeare", "demo"]


@dataclass(frozen=True)
class TextConfig:
    """Train a language model on a text.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    recipe: RecipeName = "shakespeare"
    """Settings to begin with: the paper's, or small ones for a few minutes on two cores."""
    data: Path | None = None
    """A UTF-8 text file, a folder of them, or one that `minrnn data text` made, which keeps its
    tokenizer and validation part. None downloads tiny Shakespeare."""
    out: Path | None = None
    """The run folder to make; None takes the first free one of runs/RECIPE, runs/RECIPE-2, ..."""
    tokenizer: Kind | None = None
    """What a token is: characters, bytes, or bpe:V for V parts of words, e.g. bpe:4096. None for
    characters, or for the tokenizer of a corpus that `minrnn data text` made."""
    context: int = 256
    """Symbols in a training window."""
    windows: Order = "random"
    """Which windows a step reads. random: from random places. shuffled: each window of the text
    once in a pass. consecutive: each row goes on where it ended in the step before, and so does the
    state of the model; gradients end there."""
    valid_fraction: float | None = None
    """The last part of the text, which is only validated on. None for 0.1, or for what a corpus
    has."""
    valid_limit: int | None = None
    """Tokens of it that each evaluation reads, from its start; 0 for all. None for as many as are
    trained on between two evaluations, at least 32,768: validation then takes less time than
    training, however long the text is."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        bpe_size(self.tokenizer or "characters")
        if self.model.vocab_size:
            raise ValueError(f"`vocab_size` is that of the text, got {self.model.vocab_size}")
        if self.context < 1:
            raise ValueError(f"`context` must be >= 1, got {self.context}")
        if self.valid_limit is not None and self.valid_limit < 0:
            raise ValueError(f"`valid_limit` must be >= 0, got {self.valid_limit}")
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {self.valid_fraction}")

    @property
    def num_validated(self) -> int:
        """`valid_limit` as a number: tokens that each evaluation reads at most, or 0 for all."""
        if self.valid_limit is not None:
            return self.valid_limit
        train = self.train
        return max(_LEAST_VALIDATED, train.eval_every * train.batch_size * self.context)


# "shakespeare": Feng et al. 2024, section 4 and appendix; what they leave open (context, clipping,
# schedule, betas, decay) is nanoGPT's recipe for the same text, which they follow. The validation
# part of tiny Shakespeare is shorter than what `valid_limit` comes to: all of it is read.
RECIPES: dict[RecipeName, TextConfig] = {
    "shakespeare": TextConfig(train=TrainConfig(eval_every=25, clip_norm=0.25)),
    "demo": TextConfig(
        recipe="demo",
        context=128,
        valid_limit=32_768,
        model=ModelConfig(width=128, num_layers=2, dropout=0.0),
        train=TrainConfig(
            steps=1200,
            batch_size=32,
            learning_rate=4e-3,
            warmup_steps=50,
            eval_every=100,
        ),
    ),
}


RlRecipeName = Literal["paper", "cpu"]
_Config = TypeVar("_Config", "TextConfig", "RlConfig")


def fitted(recipe: _Config, steps: int | None, learning_rate: float | None) -> _Config:
    """A recipe for other `steps` or another `learning_rate`, whose schedule keeps its shape.

    The warm-up becomes no longer than the training, and the lowest learning rate keeps its ratio to
    the highest.

    Raises:
        ValueError: one of the two is out of range.
    """
    train, fields = recipe.train, {}
    if steps is not None:
        fields["steps"] = steps
        if train.warmup_steps is not None:
            fields["warmup_steps"] = max(0, min(train.warmup_steps, steps))
    if learning_rate is not None:
        fields["learning_rate"] = learning_rate
        if train.min_learning_rate is not None:
            ratio = train.min_learning_rate / train.learning_rate
            fields["min_learning_rate"] = max(0.0, min(ratio * learning_rate, learning_rate))
    return replace(recipe, train=replace(train, **fields))


@dataclass(frozen=True)
class RlConfig:
    """Train a decision model on episodes that others played.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    recipe: RlRecipeName = "cpu"
    """Settings to begin with: the paper's, or its model for ten minutes on two cores."""
    data: tuple[Path, ...] = ()
    """D4RL files (HDF5), folders of them, or Minari sets by folder or name; all of one kind."""
    env: str | None = None
    """gymnasium's name of the environment, e.g. Hopper-v5; None for what the data says."""
    out: Path | None = None
    """The run folder to make; None takes the first free one of runs/rl, runs/rl-2, ..."""
    context: int = 20
    """Steps in a window."""
    best: float = 1.0
    """Share of the steps that is learnt from: those of the episodes with the highest returns."""
    observation_noise: float = 0.0
    """Deviation of the noise on what is observed in training, in deviations of the data. Without
    it a model can tell the action from the observation alone, and need not look at the return."""
    target: float | None = None
    """The return that is asked for when the model acts; None for 3,600 (Hopper), 12,000
    (HalfCheetah), 5,000 (Walker2d), or the highest of the data."""
    reference: tuple[float, float] | None = None
    """Returns of a random and of an expert policy, which scores go by; None for what is known."""
    model: DecisionConfig = field(default_factory=DecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.context < 1:
            raise ValueError(f"`context` must be >= 1, got {self.context}")
        if self.observation_noise < 0:
            raise ValueError(f"`observation_noise` must be >= 0, got {self.observation_noise}")
        if not 0 < self.best <= 1:
            raise ValueError(f"`best` must be in (0, 1], got {self.best}")
        if self.reference is not None and self.reference[0] >= self.reference[1]:
            raise ValueError(f"`reference` must be (random, expert), rising, got {self.reference}")


# Feng et al. 2024, appendix, and Chen et al. 2021, table 9, for what it leaves to them
_RL = TrainConfig(
    steps=100_000,
    learning_rate=1e-3,
    min_learning_rate=1e-3,
    warmup_steps=10_000,
    weight_decay=1e-4,
    beta2=0.999,
    clip_norm=0.25,
    eval_every=1000,
    keep="last",
    log_every=100,
)
RL_RECIPES: dict[RlRecipeName, RlConfig] = {
    "paper": RlConfig(recipe="paper", train=_RL),
    "cpu": RlConfig(
        observation_noise=0.2,
        train=replace(_RL, steps=2000, warmup_steps=200, min_learning_rate=1e-5, eval_every=500),
    ),
}
