"""The resident memory of a process that trains a sharded model and saves it; a script prints it.

python -m tests.shards 2 4
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from minrnn import checkpoint, gradients, launching, ranks, training_state
from minrnn.bench.memory import resident
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.models import LanguageModel, ModelConfig
from minrnn.train_config import TrainConfig
from tests.ranks import on_ranks

# 76 million parameters in blocks of 9 million
MODEL = ModelConfig(vocab_size=256, width=1024, num_layers=8, expansion=1, dropout=0.0)


def measure(folder: Path) -> None:
    """Write the megabytes of each stage, at their peak, less what was resident before the model."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    among = ranks.of()
    ranks.on_first(lambda: checkpoint.write_config(folder, {"model": MODEL.__dict__}))
    before = resident(reset=True)
    model = LanguageModel(MODEL)
    launched = launching.launch(model, TrainConfig(batch_size=4), among, folder)
    ids = torch.randint(256, (1, 33))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 32, dtype=torch.bool))
    found = {}

    def peak(name: str, *stages: object) -> None:
        resident(reset=True)
        for stage in stages:
            stage()
        found[name] = (resident(peak=True) - before) / 1e6

    def step() -> None:
        gradients.backward(launched.model, next_symbol, batch)
        launched.prepared.step()
        launched.prepared.zero_grad()

    step()
    peak("training", step, step)
    training = training_state.Training(model, launched.optimizer, among)
    peak("save", lambda: training_state.save(folder, training, [], lambda: {"step": 2}, 2))
    peak("weights", lambda: training_state.save_weights(folder, model, 2))
    # as it was done before: every process had all of it
    peak("gathered", lambda: [training_state.whole(x) for x in _all(training)])
    (folder / f"{among.number}.json").write_text(json.dumps(found))


def _all(training: training_state.Training) -> list[torch.Tensor]:
    moments = training.optimizer.state.values()
    return [*training.model.state_dict().values(), *(x for one in moments for x in one.values())]


def figures(count: int) -> list[dict[str, float]]:
    """Of each of `count` processes: megabytes by stage."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(count, measure, Path(folder))
        return [json.loads(Path(folder, f"{n}.json").read_text()) for n in range(count)]


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        for number, found in enumerate(figures(count)):
            shown = ", ".join(f"{name} {value:.0f} MB" for name, value in found.items())
            print(f"process {number} of {count}: {shown}")
            ratio = max(found["save"], found["weights"]) / found["training"]
            print(f"  save / training = {ratio:.2f}")
