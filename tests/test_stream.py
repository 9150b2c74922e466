"""Generation: the model's own next symbols, drawn as asked, in constant memory."""

import gc
from itertools import islice

import numpy as np
import pytest
import torch

import minrnn
from minrnn import stream
from minrnn.data.tokenizers import Bytes, Characters
from minrnn.sampling import Sampling, Uniforms, draw
from minrnn.stream import StopText, Stream, generate, until

LETTERS = Characters("abcde\n")


@pytest.fixture
def model() -> minrnn.LanguageModel:
    """Untrained, with sharper logits than it would have."""
    made = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=6, width=16, num_layers=2)).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


def test_greedy_text_is_what_the_whole_sequence_predicts(model) -> None:
    text = "abc" + "".join(generate(model, LETTERS, "abc", length=20, sampling=Sampling(0)))
    ids = torch.from_numpy(LETTERS.encode(text))[None]
    predicted = model(ids[:, :-1])[0].argmax(-1)[0, 2:]
    assert LETTERS.decode(predicted.tolist()) == text[3:]


def test_long_prompts_are_read_in_chunks(model, monkeypatch) -> None:
    ids = torch.randint(6, (50,))
    whole = Stream(model, Sampling(0))
    whole.prime(ids)
    monkeypatch.setattr(stream, "_CHUNK", 7)
    chunks = Stream(model, Sampling(0))
    chunks.prime(ids)
    assert [whole.step() for _ in range(10)] == [chunks.step() for _ in range(10)]


def test_a_seed_fixes_the_text(model) -> None:
    first, again, other = (
        "".join(generate(model, LETTERS, "a", length=40, sampling=Sampling(seed=s)))
        for s in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 40


def test_a_stream_forks(model) -> None:
    trunk = Stream(model, Sampling(0))
    trunk.prime([0, 1, 2])
    branch = Stream(model, Sampling(0), trunk.state)
    trunk.prime([3])
    branch.prime([3])
    assert [trunk.step() for _ in range(8)] == [branch.step() for _ in range(8)]


def test_uniform_numbers() -> None:
    sources = [Uniforms(seed) for seed in range(400)]
    # (draws, seeds)
    u = torch.from_numpy(np.stack([Uniforms.next(sources) for _ in range(500)]))
    assert 0 <= float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    # Kolmogorov and Smirnov: 1.95 / sqrt(N) is passed once in a thousand times
    for x in (u, u[:, :1], u[:1], u[7:8]):
        ordered, N = x.flatten().sort().values, x.numel()
        steps = torch.arange(1, N + 1, dtype=torch.float64) / N
        assert float((ordered - steps).abs().max()) < 1.95 / N**0.5
    # neither neighbouring seeds nor neighbouring draws know of each other
    centred = u - 0.5
    for one, other in (
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[1:, 1:], centred[:-1, :-1]),
        (centred[1:, :-1], centred[:-1, 1:]),
    ):
        correlation = 12 * float((one * other).mean())
        assert abs(correlation) < 4 / one.numel() ** 0.5
    # no two seeds draw the same numbers at any distance
    assert len(set(u.flatten().tolist())) == u.numel()
    assert Sampling().uniforms().seed != Sampling().uniforms().seed
    assert Sampling(seed=3).uniforms() == Uniforms(3)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4)
    random = Uniforms(0)
    drawn = draw(logits, [Sampling(temperature=0.5)] * 20_000, [random] * 20_000)
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(found, (logits[0] / 0.5).softmax(0), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(top_k=2), {1, 2}),
        (Sampling(top_k=1), {2}),
        (Sampling(top_p=1e-6), {2}),
        # probabilities are about .09, .24, .64, .03
        (Sampling(top_p=0.6), {2}),
        (Sampling(top_p=0.7), {1, 2}),
        (Sampling(top_k=3, top_p=0.999), {0, 1, 2}),
        (Sampling(temperature=100.0, top_k=100), {0, 1, 2, 3}),
        (Sampling(temperature=100.0, top_k=10**30, top_p=0.999), {0, 1, 2, 3}),
        (Sampling(temperature=0), {2}),
        (Sampling(temperature=1e-300, top_p=1e-300), {2}),
    ],
)
def test_filters_keep_the_likeliest(sampling: Sampling, allowed: set[int]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(2_000, 4)
    drawn = draw(logits, [sampling] * 2_000, [Uniforms(0)] * 2_000)
    assert set(drawn.tolist()) == allowed


def test_no_row_depends_on_the_others() -> None:
    samplings = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=0.3, top_k=3),
        Sampling(top_p=0.5),
        Sampling(temperature=2.0, top_k=5, top_p=0.9),
    ]
    logits = 3 * torch.randn(5, 50)

    def random() -> list[Uniforms]:
        return [Uniforms(seed) for seed in range(5)]

    together, alone = random(), random()
    for _ in range(40):
        rows = [draw(logits[[n]], [samplings[n]], [alone[n]]) for n in range(5)]
        assert draw(logits, samplings, together).tolist() == torch.cat(rows).tolist()


def test_the_first_complete_stop_text_ends() -> None:
    text = StopText(["wxyz", "xy", "q"])
    assert [text.push(piece) for piece in ("aw", "x", "yz")] == ["a", "", "w"]
    assert text.found
    assert text.push("more") == text.rest() == ""
    assert StopText([]).push("all of it") == "all of it"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ("abcabd!", "abd", "abc"),
        ("aaab", "aab", "a"),
        ("abc", "x", "abc"),
        ("abab", "abc", "abab"),
        ("x", "x", ""),
    ],
)
def test_text_ends_before_the_stop_text(pieces: str, stop: str, expected: str) -> None:
    assert "".join(until(iter(pieces), stop)) == expected
    assert "".join(until(iter([pieces]), stop)) == expected


def test_generate_stops(model) -> None:
    whole = "".join(generate(model, LETTERS, "a", length=60, sampling=Sampling(0)))
    stop = whole[20:23]
    cut = "".join(generate(model, LETTERS, "a", length=60, stop=stop, sampling=Sampling(0)))
    assert cut == whole[: whole.index(stop)]


def test_bytes_come_as_whole_characters() -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=256, width=8, num_layers=1)).eval()
    pieces = list(generate(model, Bytes(), "é", length=50, sampling=Sampling(seed=0)))
    assert len(pieces) == 51
    "".join(pieces).encode("utf-8")


def test_memory_does_not_grow_with_the_text(model) -> None:
    pieces = generate(model, LETTERS, "a", sampling=Sampling(seed=0))

    def live_bytes() -> int:
        gc.collect()
        # not those that a compiler left behind, which have no memory
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    assert len(list(islice(pieces, 10))) == 10
    early = live_bytes()
    assert len(list(islice(pieces, 300))) == 300
    # what other tests left behind may go in the meantime
    assert live_bytes() <= early


def test_wrong_arguments_are_named(model) -> None:
    for fields, message in (
        ({"temperature": -1.0}, "`temperature` must be >= 0, got -1.0"),
        ({"temperature": float("nan")}, "`temperature` must be finite, got nan"),
        ({"top_k": -1}, "`top_k` must be >= 0, got -1"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**fields)
    with pytest.raises(ValueError, match="`logits` must be finite"):
        draw(torch.tensor([[0.0, float("nan")]]), [Sampling()], [torch.Generator()])
    with pytest.raises(ValueError, match="`length` must be >= 0, got -1"):
        generate(model, LETTERS, "a", length=-1)
    with pytest.raises(ValueError, match="`stop` must be a text, got an empty one"):
        generate(model, LETTERS, "a", stop="")
    with pytest.raises(ValueError, match="`prompt` must hold at least one symbol, got none"):
        generate(model, LETTERS, "")
    with pytest.raises(ValueError, match="character 'x'"):
        generate(model, LETTERS, "ax")
    with pytest.raises(ValueError, match="`ids` must hold at least one symbol, got none"):
        Stream(model).prime([])
    with pytest.raises(ValueError, match="`prime` must be called"):
        Stream(model).step()
    with pytest.raises(ValueError, match="`tokenizer` must have the model's V = 6 tokens, got 3"):
        generate(model, Characters("abc"), "a")


def test_dropout_is_off_where_text_is_drawn(model) -> None:
    model.train()
    for start in (lambda: Stream(model), lambda: generate(model, LETTERS, "a", length=3)):
        with pytest.raises(ValueError, match=r"dropout of 0.2 in training mode: call model.eval"):
            start()
    model.eval().blocks[1].train()
    with pytest.raises(ValueError, match="`model` must be in evaluation mode"):
        Stream(model)
    # without dropout both modes are one
    config = minrnn.ModelConfig(vocab_size=6, width=16, dropout=0.0)
    Stream(minrnn.LanguageModel(config).train()).prime([1])
