"""Many streams over one model: requests join and leave the running batches at every step."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minrnn.configs import check_fields
from minrnn.models import TextModel, checked_ids
from minrnn.sampling import Sampling, Uniforms, draw
from minrnn.serve.prefixes import PrefixStore, Read
from minrnn.serve.requests import Ending, Listener, Reason, Request, Scored, scored
from minrnn.state import State


@dataclass(frozen=True)
class EngineConfig:
    """How streams share the model.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    batch_size: int = 64
    """Streams that take a step together; more streams take their steps in several batches."""
    chunk: int = 64
    """Symbols of a prompt that are read at a time."""
    prompt_share: int = 512
    """Symbols of prompts read between two steps of the running streams, at most; but one chunk."""
    prefix_bytes: int = 64 << 20
    """Memory for states behind beginnings of prompts."""

    def __post_init__(self) -> None:
        check_fields(self)
        lowest = {"batch_size": 1, "chunk": 1, "prompt_share": 1, "prefix_bytes": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


# slots, and nothing of the prompt: there is one for each of thousands of states
@dataclass(slots=True)
class _Stream:
    """One text that is drawn, or will be once its prompt is read."""

    length: int
    scores: int | None
    listener: Listener
    deadline: float
    sampling: Sampling
    random: Uniforms
    num_drawn: int = 0
    last: int = 0


@dataclass
class _Prompt:
    """A prompt that is not read to its end, and the streams that wait for it."""

    request: Request
    streams: list[_Stream]
    read: Read | None = None
    scored: list[Scored] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        return 0 if self.read is None else self.read.num_symbols


@dataclass
class _Group:
    """Streams that take their steps together; row n of the state is of stream n."""

    state: State
    streams: list[_Stream]


class Engine:
    """Draws the texts of many requests; to be used from one thread.

    Prompts are read each by itself and always in the same chunks, and every stream draws from its
    own numbers: a text is, symbol by symbol, what it would be if it were the only one, as far as
    the model gives a row of a batch what it would give it alone.

    Args:
        model: in evaluation mode; its state must be of constant size.
        config: how streams share it.
        clock: seconds, rising.

    Raises:
        ValueError: the state of the model grows with the text.

    Example:
        >>> from minrnn.models import LanguageModel, ModelConfig
        >>> class Printed:
        ...     def read(self, prompt): print("read")
        ...     def drawn(self, symbol): print(symbol.symbol < 5)
        ...     def ended(self, ending): print(ending.reason)
        >>> engine = Engine(LanguageModel(ModelConfig(vocab_size=5, width=8)).eval())
        >>> engine.submit(Request(torch.tensor([1, 2]), length=2), [Printed()])
        >>> while engine.busy:
        ...     engine.step()
        read
        True
        True
        length
    """

    def __init__(
        self,
        model: TextModel,
        config: EngineConfig = EngineConfig(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.config, self.clock = model, config, clock
        self.device = next(model.parameters()).device
        self.prefixes = PrefixStore(config.prefix_bytes, config.chunk)
        # symbols: of prompts read, of prompts found read, drawn
        self.num_read = self.num_found = self.num_drawn = 0
        self._prompts: deque[_Prompt] = deque()
        self._groups: list[_Group] = []
        self.state_bytes, grown = (self._state_after(T).num_bytes for T in (1, 9))
        if grown != self.state_bytes:
            raise ValueError(
                "`model` must have a state of constant size, that of its mixer "
                f"{model.config.mixer!r} grows with the text"
            )

    @property
    def num_waiting(self) -> int:
        """Texts whose prompt is not read yet."""
        # asked for from other threads
        return sum(len(prompt.streams) for prompt in tuple(self._prompts))

    @property
    def num_running(self) -> int:
        """Texts that are being drawn."""
        return sum(len(group.streams) for group in tuple(self._groups))

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._prompts or self._groups)

    def check(self, request: Request, listeners: Sequence[Listener]) -> None:
        """Whether `submit` would take these; from any thread.

        Raises:
            ValueError: an id of the prompt is unknown, or the state or the listeners do not fit.
            TypeError: the prompt holds no integers.
        """
        checked_ids(request.prompt, self.model.config.vocab_size)
        if request.state is not None and request.state.batch_size != 1:
            raise ValueError(f"`state` must have one row, got {request.state.batch_size}")
        if len(listeners) != len(request.samplings):
            raise ValueError(
                f"`listeners` must be one for each of {len(request.samplings)} samplings, "
                f"got {len(listeners)}"
            )

    def submit(self, request: Request, listeners: Sequence[Listener]) -> None:
        """Take a request; `listeners`, one for each of its samplings, hear of its texts.

        Raises:
            ValueError, TypeError: see `check`.
        """
        self.check(request, listeners)
        deadline = self.clock() + request.seconds
        if request.state is not None:
            state = request.state.map(lambda x: x.to(self.device))
            request = dataclasses.replace(request, state=state)
        length, scores = request.length, request.scores
        prompt = _Prompt(
            request,
            [
                _Stream(length, scores, listener, deadline, sampling, sampling.uniforms())
                for listener, sampling in zip(listeners, request.samplings, strict=True)
            ],
        )
        if request.state is None and not request.scores_prompt:
            prompt.read = self.prefixes.longest(request.owner, request.prompt)
            self.num_found += prompt.num_read
        self._prompts.append(prompt)

    def cancel(self, listener: Listener) -> None:
        """End the text of a listener, if it has not ended."""
        self._end(lambda stream: "cancelled" if stream.listener is listener else None)

    def close(self, reason: Reason = "closed") -> None:
        """End every text where it stands."""
        self._end(lambda stream: reason)

    @torch.no_grad()
    def step(self) -> None:
        """One symbol for every running text, then a share of the waiting prompts."""
        now = self.clock()
        self._end(lambda stream: "time" if now > stream.deadline else None)
        for group in self._groups:
            ids = torch.tensor([[stream.last] for stream in group.streams], device=self.device)
            logits, group.state = self.model(ids, group.state)
            self._draw(group, logits[:, -1])
        for prompt in self._read_prompts():
            self._begin(prompt)
        self._pack()

    def _draw(self, group: _Group, logits: Tensor) -> None:
        """Draw a symbol behind each row of `logits` (B, V); streams that end leave the group."""
        streams = group.streams
        symbols = draw(logits, [one.sampling for one in streams], [one.random for one in streams])
        self.num_drawn += len(streams)
        reasons: list[Reason | None] = []
        for row, (stream, symbol) in enumerate(zip(streams, symbols.tolist(), strict=True)):
            stream.last, stream.num_drawn = symbol, stream.num_drawn + 1
            [one] = scored(logits[[row]], [symbol], stream.scores)
            stopped = stream.listener.drawn(one)
            full = stream.num_drawn >= stream.length
            reasons.append("stop" if stopped else "length" if full else None)
        _leave(group, reasons)

    def _end(self, reason: Callable[[_Stream], Reason | None]) -> None:
        """End the texts for which there is a reason."""
        for prompt in self._prompts:
            for stream in list(prompt.streams):
                why = reason(stream)
                if why is not None:
                    prompt.streams.remove(stream)
                    stream.listener.ended(Ending(why))
        self._prompts = deque(prompt for prompt in self._prompts if prompt.streams)
        for group in self._groups:
            _leave(group, [reason(stream) for stream in group.streams])
        self._pack()

    def _read_prompts(self) -> Iterator[_Prompt]:
        """Read of the waiting prompts, one chunk of each in turn; yield those that are read."""
        share = self.config.prompt_share
        while self._prompts and share > 0:
            prompt = self._prompts[0]
            before = prompt.num_read
            if before < len(prompt.request.prompt):
                prompt.read = self._read_chunk(prompt)
                share -= prompt.num_read - before
            if prompt.num_read < len(prompt.request.prompt):
                self._prompts.rotate(-1)
            else:
                yield prompt
                # not before: should a call fail, `close` must find its texts
                self._prompts.popleft()

    def _read_chunk(self, prompt: _Prompt) -> Read:
        request, before = prompt.request, prompt.num_read
        ids = request.prompt[before : before + self.config.chunk]
        state = prompt.read.state if prompt.read else request.state
        logits, state = self.model(ids[None].to(self.device), state)
        self.num_read += len(ids)
        if request.scores_prompt:
            prompt.scored += _scored_chunk(prompt, ids.tolist(), logits[0])
        # a copy: a view would keep the logits of the whole chunk
        read = Read(before + len(ids), state, logits[:, -1].clone())
        if request.state is None:
            self.prefixes.put(request.owner, request.prompt[: read.num_symbols], read)
        return read

    def _begin(self, prompt: _Prompt) -> None:
        """Draw the first symbols behind a prompt that is read, and let its streams run."""
        read, request, size = prompt.read, prompt.request, self.config.batch_size
        assert read is not None
        while prompt.streams:
            streams = prompt.streams[:size]
            group = _Group(read.state.select([0] * len(streams)), streams)
            # in one place or the other at any time, as above
            self._groups.append(group)
            prompt.streams = prompt.streams[size:]
            for stream in streams:
                stream.listener.read(prompt.scored)
            if request.length == 0:
                full: list[Reason | None] = ["length"] * len(streams)
                _leave(group, full)
            else:
                self._draw(group, read.logits.expand(len(streams), -1))

    def _pack(self) -> None:
        """Drop empty groups; put small ones together."""
        groups = sorted((g for g in self._groups if g.streams), key=lambda g: -len(g.streams))
        packed: list[list[_Group]] = []
        room = 0
        for group in groups:
            if len(group.streams) <= room:
                packed[-1].append(group)
            else:
                packed.append([group])
                room = self.config.batch_size
            room -= len(group.streams)
        self._groups = [_merged(some) for some in packed]

    def _state_after(self, T: int) -> State:
        with torch.no_grad():
            return self.model(torch.zeros(1, T, dtype=torch.int64, device=self.device))[1]


def _merged(groups: Sequence[_Group]) -> _Group:
    if len(groups) == 1:
        return groups[0]
    state = State.concatenate([group.state for group in groups])
    return _Group(state, [stream for group in groups for stream in group.streams])


def _leave(group: _Group, reasons: Sequence[Reason | None]) -> None:
    """Take the streams with a reason out of a group, and tell their listeners."""
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    if len(kept) == len(reasons):
        return
    for row, (stream, reason) in enumerate(zip(group.streams, reasons, strict=True)):
        if reason is not None:
            # the symbol drawn last was not read yet
            unread = (stream.last,) if stream.num_drawn else ()
            stream.listener.ended(Ending(reason, group.state.select([row]), unread))
    group.streams = [group.streams[row] for row in kept]
    if kept:
        group.state = group.state.select(kept)


def _scored_chunk(prompt: _Prompt, symbols: list[int], logits: Tensor) -> list[Scored]:
    """The scores of a chunk, each by the logits of the symbol before it."""
    top = prompt.request.scores
    if prompt.read is None:
        # nothing stands before the first symbol
        return [Scored(symbols[0]), *scored(logits[:-1], symbols[1:], top)]
    return scored(torch.cat([prompt.read.logits, logits[:-1]]), symbols, top)
