"""What is installed, and which kernel serves which operator on which device."""

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import minrnn
from minrnn import checkpoint
from minrnn.data import tokenizers
from minrnn.ops import native
from minrnn.ops.operators import NAMES

_DEVICES = ("CPU", "CUDA", "MPS")


def kernels() -> dict[str, dict[str, str]]:
    """For each device, the kernel behind each operator's forward and backward.

    Example:
        >>> kernels()["CPU"]["scan"] in ("pure torch", "compiled")
        True
    """
    names = [*NAMES, "selective_scan", "selective_scan_backward"]
    return {device: {name: _kernel(name, device) for name in names} for device in _DEVICES}


def describe() -> Iterator[str]:
    """Lines about the installation."""
    yield f"minrnn {minrnn.__version__}"
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads, devices: {_devices()}"
    for name in ("numpy", "safetensors", "accelerate", "tensorboard", "tyro", "rich", "matplotlib"):
        yield f"{name} {_version(name)}"
    yield ""
    yield "kernels: compiled or in Triton where there is one, pure torch everywhere else"
    if native.reason is not None:
        yield f"the CPU runs on pure torch: {native.reason}"
    for device, served in kernels().items():
        found = sorted(set(served.values()))
        if len(found) == 1:
            yield f"{device:5} {found[0]} for {', '.join(served)}"
        else:
            yield f"{device:5} " + ", ".join(f"{name}: {kernel}" for name, kernel in served.items())


def describe_run(folder: Path) -> Iterator[str]:
    """Lines about the run in `folder`.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: a file in it is damaged.
    """
    # with them comes all of training
    from minrnn.runs import decisions
    from minrnn.runs import text as text_runs

    config = checkpoint.read_config(folder)
    yield f"run {folder}"
    text = text_runs.read(folder) if "text" in config else None
    if text is not None:
        # the tokenizer that was made: one that was asked for may be that of a corpus
        kind = text.tokenizer or "characters"
        if "tokenizer" in config:
            kind = tokenizers.name_of(tokenizers.from_json(config["tokenizer"]))
        yield f"text {text.data or 'tiny Shakespeare'} as {kind}"
    if text is not None and "split" in config:
        (_, train), (first, end) = config["split"]["train"], config["split"]["valid"]
        read = min(text.num_validated or end, end - first)
        limit = f", of which each evaluation reads {read:,}" if read < end - first else ""
        yield f"tokens {train:,} to train on, {end - first:,} to validate on{limit}"
    rl = decisions.read(folder) if "trajectories" in config else None
    if rl is not None:
        share = "" if rl.best == 1 else f", the best {100 * rl.best:g} % of it"
        yield f"episodes of {config['environment']} in {', '.join(map(str, rl.data))}{share}"
    if "model" in config or "decision_model" in config:
        model = checkpoint.build_model(folder / "config.json", config)
        count = sum(p.numel() for p in model.parameters())
        yield f"model {model.config}"
        yield f"parameters {count:,}, state {model.init_state(1).num_bytes:,} bytes per stream"
    last = folder / "training_state" / "last.safetensors"
    if last.is_file():
        notes = checkpoint.read_tensors(last)[1]
        settings = text or rl
        steps = "" if settings is None else f" of {settings.train.steps:,}"
        yield f"saved at step {notes.get('step', 0):,}{steps}"
        if notes.get("best_loss") is not None:
            yield f"best validation loss {notes['best_loss']:.4f} at step {notes['best_step']:,}"


def _kernel(name: str, device: str) -> str:
    # the dispatcher answers this through no public call
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"minrnn::{name}", device):
        return "pure torch"
    return "Triton" if device == "CUDA" else "compiled"


def _devices() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else f"cpu, {found}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
