"""Tasks: what `minrnn.train` learns, data and loss together."""

from collections.abc import Iterator

from torch import Tensor

from minrnn import losses
from minrnn.data.batch import Batch
from minrnn.data.trajectories import Trajectories, windows
from minrnn.data.windows import Windows

# a seed that no training step has
_VALIDATION = 1 << 40


class TextTask:
    """Windows of a corpus, and the cross-entropy of the next symbol."""

    def __init__(self, windows: Windows, valid_limit: int = 0) -> None:
        windows.corpus.check_windows(windows.context)
        self.windows, self.valid_limit = windows, valid_limit

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        """Windows of the training part.

        Raises:
            ValueError: `batch_size` is not that of the windows, whose order depends on it.
        """
        windows = self.windows
        if windows.order != "random" and windows.batch_size != batch_size:
            raise ValueError(
                f"`batch_size` must be that of the {windows.order} windows, {windows.batch_size}, "
                f"got {batch_size}"
            )
        return windows.batch(batch_size, seed, rows)

    def goes_on(self, step: int) -> bool:
        """Whether the windows of `step` stand behind those of the step before."""
        return self.windows.goes_on(step)

    @property
    def validates_streams(self) -> bool:
        """Whether each row of a validation batch goes on where that of the batch before ended."""
        return self.windows.order == "consecutive"

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The validation part, or as much of it as `valid_limit` says, read as the training is."""
        windows = self.windows
        read = windows.corpus.streams if self.validates_streams else windows.corpus.windows
        return read(windows.context, batch_size, self.valid_limit)

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """Nats per symbol."""
        return losses.next_symbol(answers, batch)


class DecisionTask:
    """Windows of trajectories, and the squared error of the actions.

    There is no part that is only validated on: what counts is the return in the environment. The
    validation loss is that of the same eight batches of the data each time.
    """

    validates_streams = False

    def __init__(self, data: Trajectories, steps: int, observation_noise: float = 0.0) -> None:
        self.data, self.steps, self.observation_noise = data, steps, observation_noise

    def batch(self, batch_size: int, seed: tuple[int, ...], rows: slice = slice(None)) -> Batch:
        """Windows from random places."""
        noise = self.observation_noise
        return windows(self.data, self.steps, batch_size, seed, noise).rows(rows)

    def goes_on(self, step: int) -> bool:
        """Never: each window begins anew."""
        return False

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Eight batches that are always the same."""
        seeds = ((_VALIDATION, number) for number in range(8))
        return (windows(self.data, self.steps, batch_size, seed) for seed in seeds)

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """Squared error for each number of an action."""
        return losses.action_error(answers, batch)
