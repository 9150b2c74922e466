"""minrnn reproduce: the paper's tables, a command each."""

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from minrnn.experiments import d4rl, efficiency, page, results, selective_copying, shakespeare
from minrnn.experiments.d4rl import D4rlConfig
from minrnn.experiments.efficiency import EfficiencyConfig
from minrnn.experiments.selective_copying import CopyingConfig
from minrnn.experiments.shakespeare import ShakespeareConfig


def reproduce_shakespeare(config: OmitArgPrefixes[ShakespeareConfig] = ShakespeareConfig()) -> int:
    """Train the paper's language models on tiny Shakespeare, and some that it leaves out."""
    return _reproduced(shakespeare.reproduce(config, print), config.out)


def reproduce_selective_copying(config: OmitArgPrefixes[CopyingConfig] = CopyingConfig()) -> int:
    """Train minimal RNNs and their competitors on selective copying."""
    return _reproduced(selective_copying.reproduce(config, print), config.out)


def reproduce_efficiency(
    config: OmitArgPrefixes[EfficiencyConfig] = EfficiencyConfig(),
) -> int:
    """Measure time and memory of training steps and of generation, over length."""
    efficiency.reproduce(config, print)
    return _reproduced(True, config.out)


def reproduce_d4rl(config: OmitArgPrefixes[D4rlConfig]) -> int:
    """Train decision models on others' episodes and let them play."""
    return _reproduced(d4rl.reproduce(config, print), config.out)


def write_report(results: Path = Path("results"), out: Path = Path("results/index.html")) -> int:
    """Make one HTML page, which needs no other file, of all results.

    Args:
        results: the folder with those of each experiment.
        out: the page to write.
    """
    print(f"{out}: {', '.join(page.write(results, out))}")
    return 0


def _reproduced(finished: bool, out: Path) -> int:
    if not finished:
        print("stopped; the same command goes on")
        return 130
    print(f"{out / results.TABLE}, {out / results.PICTURE}, {out / results.FIGURES}")
    return 0
