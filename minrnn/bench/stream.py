"""How fast does a stream go, and many at once? Symbols of the paper's language model."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from minrnn.bench import measure, peers
from minrnn.bench.compare import Checked, Entrant, Row, Table, check, timed_rows
from minrnn.bench.measure import Call
from minrnn.models import LanguageModel, ModelConfig, TextModel
from minrnn.ops.rows import WeightDtype, linear_rows, pack
from minrnn.packing import matrices, num_weight_bytes, pack_model
from minrnn.state import State

VOCABULARY = 65
# symbols that a Transformer has behind it
CONTEXT, QUICK_CONTEXT = 1000, 50
STREAMS = 64
# a call takes so many in a row: what was in the caches before it counts little
SYMBOLS = 16
LENGTHS, QUICK_LENGTHS = (100, 1000, 10_000, 100_000), (100, 1000)
SECONDS, QUICK_SECONDS = 4.0, 0.3
READ = "reading the weights"
_WEIGHTS: tuple[WeightDtype, ...] = ("float32", "bfloat16", "int8")


def measured(quick: bool = False) -> Iterator[Table]:
    """Tables of one symbol: of one stream, of many at once, and over the length of the text.

    Args:
        quick: a short context, short texts, fewer rounds.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=VOCABULARY)).eval()
    width, context = model.config.width, QUICK_CONTEXT if quick else CONTEXT
    checked = _ours(model, 1) | {
        f"GPT-2 of transformers, {context:,} symbols in its cache": _gpt2(context),
        "minGRU-pytorch minLM": _min_lm(model.config),
    }
    read, size = _reading(num_weight_bytes(pack_model(model)))
    sizes = {f"packed, {w}": num_weight_bytes(pack_model(model, w)) for w in _WEIGHTS}
    sizes |= {READ: size, "modules": num_weight_bytes(model)}
    shape = (1, 1, width)
    rows = _rows(checked, {READ: read}, 1, sizes, seconds)
    yield Table("a symbol of one stream", shape, "ms", rows)
    rows = _rows(_ours(model, STREAMS), {}, STREAMS, {}, seconds)
    yield Table("a symbol of each of many streams", (STREAMS, 1, width), "ms", rows)
    yield from _over_length(model, QUICK_LENGTHS if quick else LENGTHS, seconds)


def _rows(
    checked: dict[str, Checked],
    yardsticks: dict[str, Call],
    streams: int,
    sizes: dict[str, int],
    seconds: float,
) -> tuple[Row, ...]:
    """Milliseconds of a symbol; symbols and bytes of weights a second in the note."""
    found = []
    for row in timed_rows(checked, lambda calls: Call(calls.forward), yardsticks, {}, seconds):
        if row.value is None or row.low is None or row.high is None:
            found.append(row)
            continue
        value, low, high = (x / SYMBOLS for x in (row.value, row.low, row.high))
        notes = [] if row.name == READ else [f"{1e3 * streams / value:,.0f} symbols/s"]
        if row.name in sizes:
            notes.append(f"{sizes[row.name] / value / 1e6:.1f} GB/s of weights")
        note = ", ".join(notes)
        found.append(replace(row, value=value, low=low, high=high, faults=None, note=note))
    return tuple(found)


def _reading(num_bytes: int) -> tuple[Call, int]:
    """Sums over as many bytes as a step reads."""
    x = torch.ones(num_bytes // 4)

    def read() -> None:
        for _ in range(SYMBOLS):
            x.sum()

    return Call(read), 4 * len(x)


def _ours(model: LanguageModel, streams: int) -> dict[str, Checked]:
    found = {}
    for weights in _WEIGHTS:
        rounded = _rounded(model, weights)
        found[f"packed, {weights}"] = _checked(
            lambda w=weights: pack_model(model, w), rounded, streams
        )
    found["modules"] = _checked(lambda: model, model, streams)
    return found


def _rounded(model: LanguageModel, weights: WeightDtype) -> LanguageModel:
    """The model whose matrices are what the packed ones stand for."""
    copied = deepcopy(model)
    for module in copied.modules():
        for name in matrices(module):
            weight = getattr(module, name)
            if weight is not None:
                # the product with the unit matrix gives W^T
                seen = linear_rows(torch.eye(weight.shape[1]), pack(weight, weights)).T
                weight.data.copy_(seen)
    return copied


def _checked(build: Callable[[], TextModel], exact: LanguageModel, streams: int) -> Checked:
    """Steps of `build()` behind some symbols, held to `exact` in float64."""
    prompt, ids = _symbols(streams, 7), _symbols(streams, SYMBOLS)

    def load() -> peers.Calls:
        model = build()
        with torch.inference_mode():
            _, state = model(prompt)

        def forward() -> Tensor:
            logits, after = ids, state
            with torch.inference_mode():
                for one in ids.split(1, dim=1):
                    logits, after = model(one, after)
            return logits

        return peers.Calls(forward, forward, lambda logits: [logits.clone()])

    def answer() -> list[Tensor]:
        wide = deepcopy(exact).double()
        with torch.no_grad():
            return [wide(torch.cat([prompt, ids], 1))[0][:, -1:]]

    return check(Entrant("", load, answer))


def _symbols(B: int, T: int) -> Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(T))


def _gpt2(context: int) -> Checked:
    """transformers' GPT-2 with as many weights, behind a cache of `context` symbols."""
    kept: dict[str, Any] = {}
    ids = _symbols(1, SYMBOLS)

    def load() -> peers.Calls:
        theirs = peers.require("transformers", "transformers")
        sizes = {"n_embd": 372, "n_layer": 4, "n_head": 6, "n_positions": 1024}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = theirs.GPT2Config(vocab_size=VOCABULARY, **sizes, **ends)
        model = kept["model"] = theirs.GPT2LMHeadModel(config).eval()
        with torch.inference_mode():
            cache = model(_symbols(1, context), use_cache=True).past_key_values

        def forward() -> Tensor:
            logits = ids
            with torch.inference_mode():
                for one in ids.split(1, dim=1):
                    logits = model(one, past_key_values=cache, use_cache=True).logits
            # each call has the same context
            cache.crop(-SYMBOLS)
            return logits

        return peers.Calls(forward, forward, lambda logits: [logits.clone()])

    def answer() -> list[Tensor]:
        whole = torch.cat([_symbols(1, context), ids], 1)
        with torch.inference_mode():
            return [deepcopy(kept["model"]).double()(whole).logits[:, -1:]]

    return check(Entrant("", load, answer))


def _min_lm(config: ModelConfig) -> Checked:
    """minGRU-pytorch's language model of the same width, depth and expansion, without convolution,
    which it cannot carry on."""
    kept: dict[str, nn.Module] = {}
    prompt, ids = _symbols(1, 7), _symbols(1, SYMBOLS)

    def load() -> peers.Calls:
        theirs = peers.require("minGRU-pytorch", "minGRU_pytorch.minLM")
        sizes = {"dim": config.width, "depth": config.num_layers, "expansion": config.expansion}
        model = theirs.minLM(num_tokens=VOCABULARY, ff_mult=config.mlp_ratio, **sizes).eval()
        kept["model"] = model
        with torch.inference_mode():
            _, state = model(prompt, return_prev_hiddens=True)

        def forward() -> Tensor:
            logits, after = ids, state
            with torch.inference_mode():
                for one in ids.split(1, dim=1):
                    logits, after = model(one, return_prev_hiddens=True, prev_hiddens=after)
            return logits

        return peers.Calls(forward, forward, lambda logits: [logits.clone()])

    def answer() -> list[Tensor]:
        with torch.inference_mode():
            return [deepcopy(kept["model"]).double()(torch.cat([prompt, ids], 1))[:, -1:]]

    return check(Entrant("", load, answer))


def _over_length(model: LanguageModel, lengths: tuple[int, ...], seconds: float) -> Iterator[Table]:
    """The time of a symbol behind texts of several lengths, all in one run."""
    packed = pack_model(model)
    calls: dict[str, Call] = {}
    sizes: dict[str, int] = {}
    state, read, ids = None, 0, _symbols(1, SYMBOLS)

    def steps(after: State) -> None:
        for one in ids.split(1, dim=1):
            _, after = packed(one, after)

    for T in lengths:
        with torch.inference_mode():
            for chunk in _symbols(1, T)[:, read:].split(1000, dim=1):
                _, state = packed(chunk, state)
        assert state is not None
        read, sizes[f"{T}"] = T, state.num_bytes
        calls[f"{T}"] = Call(lambda s=state: steps(s))
    with torch.inference_mode():
        timings = measure.interleave(calls, seconds)
    rows = tuple(
        Row(
            f"{T:,} symbols",
            T=T,
            value=1e3 * timings[f"{T}"].median / SYMBOLS,
            low=1e3 * timings[f"{T}"].low / SYMBOLS,
            high=1e3 * timings[f"{T}"].high / SYMBOLS,
            rounds=timings[f"{T}"].rounds,
            ratio=timings[f"{T}"].median / timings[f"{lengths[0]}"].median,
            note=f"{sizes[f'{T}']:,} bytes of state",
        )
        for T in lengths
    )
    yield Table("a symbol behind a text", (), "ms", rows)


def draw(name: str, tables: Sequence[Table]) -> Figure:
    """Milliseconds of a symbol, a bar for each entrant; and over the length of the text."""
    *bars, length = tables
    sizes = [len(table.rows) for table in bars]
    figure = Figure(figsize=(9, 1.5 + 0.35 * sum(sizes) + 2.6), layout="constrained")
    panels: Any = figure.subplots(len(tables), 1, height_ratios=[*sizes, 6])
    for axes, table in zip(panels, bars, strict=False):
        rows = [row for row in table.rows if row.value is not None]
        colours = ["0.6" if row.name == READ else "C0" for row in rows]
        axes.barh([row.name for row in rows], [row.value for row in rows], color=colours)
        axes.invert_yaxis()
        axes.set_title(f"{table.title}, (B, T, D) = {table.shape}", loc="left", fontsize=10)
    points = [(row.T, row.value) for row in length.rows if row.T and row.value is not None]
    panels[-1].plot(*zip(*points, strict=True), marker="o")
    panels[-1].set_xscale("log")
    panels[-1].set_ylim(0, 1.3 * max((value for _, value in points), default=1))
    panels[-1].set_title(length.title, loc="left", fontsize=10)
    panels[-1].set_xlabel("symbols read before")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle(f"minrnn bench {name}: milliseconds")
    return figure
