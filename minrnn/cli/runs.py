"""Commands that take any run: the task that it is of says what they do."""

from collections.abc import Callable, Sequence
from pathlib import Path

from minrnn import checkpoint
from minrnn.cli import rl, text


def resume_run(resume: Path) -> int:
    """Resume a training that was stopped or killed; `minrnn train text` or `rl` starts one.

    Args:
        resume: the run folder.
    """
    return (rl.resume_rl if _is_rl(resume) else text.resume_text)(resume)


def of_kind(command: Callable[..., int], args: Sequence[str]) -> Callable[..., int]:
    """`command`; but in place of that for texts, the one for episodes if `args` name such a run."""
    runs = [Path(a) for a in args if not a.startswith("-") and Path(a, "config.json").is_file()]
    if command is text.evaluate_text and runs and _is_rl(runs[0]):
        return rl.evaluate_rl
    return command


def _is_rl(run: Path) -> bool:
    return "trajectories" in checkpoint.read_config(run)
