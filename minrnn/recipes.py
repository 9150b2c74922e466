"""Named settings: a recipe is an instance of a configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minrnn.configs import check_fields
from minrnn.data.tokenizers import Kind
from minrnn.models import ModelConfig
from minrnn.train_config import TrainConfig

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
    """A UTF-8 text file, or a folder of them. None downloads tiny Shakespeare."""
    out: Path | None = None
    """The run folder to make; None takes the first free one of runs/RECIPE, runs/RECIPE-2, ..."""
    tokenizer: Kind = "characters"
    """What a symbol is."""
    context: int = 256
    """Symbols in a training window."""
    valid_fraction: float = 0.1
    """The last part of the text, which is only validated on."""
    valid_limit: int = 0
    """Symbols of it that each evaluation reads; 0 for all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model.vocab_size:
            raise ValueError(f"`vocab_size` is that of the text, got {self.model.vocab_size}")
        if self.context < 1:
            raise ValueError(f"`context` must be >= 1, got {self.context}")
        if self.valid_limit < 0:
            raise ValueError(f"`valid_limit` must be >= 0, got {self.valid_limit}")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {self.valid_fraction}")


# "shakespeare": Feng et al. 2024, section 4 and appendix; what they leave open (context, clipping,
# schedule, betas, decay) is nanoGPT's recipe for the same text, which they follow.
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
            min_learning_rate=4e-4,
            warmup_steps=50,
            eval_every=100,
        ),
    ),
}
