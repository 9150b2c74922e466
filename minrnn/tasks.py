"""Tasks: what `minrnn.train` learns, data and loss together."""

from collections.abc import Iterator

from torch import Tensor, nn

from minrnn import losses
from minrnn.data.batch import Batch
from minrnn.data.text import Corpus
from minrnn.data.trajectories import Trajectories, windows

# a seed that no training step has
_VALIDATION = 1 << 40


class TextTask:
    """Windows of a corpus, and the cross-entropy of the next symbol."""

    def __init__(self, corpus: Corpus, context: int, valid_limit: int) -> None:
        corpus.check_windows(context)
        self.corpus, self.context, self.valid_limit = corpus, context, valid_limit

    def batch(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        """Windows from random places of the training part."""
        return self.corpus.random_batch(self.context, batch_size, seed)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The validation part, or as much of it as `valid_limit` says."""
        return self.corpus.windows(self.context, batch_size, self.valid_limit)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats per symbol."""
        return losses.next_symbol(model, batch)


class DecisionTask:
    """Windows of trajectories, and the squared error of the actions.

    There is no part that is only validated on: what counts is the return in the environment. The
    validation loss is that of the same eight batches of the data each time.
    """

    def __init__(self, data: Trajectories, steps: int) -> None:
        self.data, self.steps = data, steps

    def batch(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        """Windows from random places."""
        return windows(self.data, self.steps, batch_size, seed)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Eight batches that are always the same."""
        seeds = ((_VALIDATION, number) for number in range(8))
        return (windows(self.data, self.steps, batch_size, seed) for seed in seeds)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error for each number of an action."""
        return losses.action_error(model, batch)
