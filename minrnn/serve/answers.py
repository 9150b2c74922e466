"""What is sent back for a completion: OpenAI's objects, whole or as server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from minrnn.data.tokenizers import Tokenizer
from minrnn.serve.choices import Choice, Decoding, Delta
from minrnn.serve.requests import Scored
from minrnn.serve.schemas import Refused, error
from minrnn.serve.service import Completion, Service


async def whole(service: Service, completion: Completion) -> dict[str, Any]:
    """The answer once all texts have ended.

    Raises:
        RuntimeError: the engine failed on one of them.
    """
    deltas = await asyncio.gather(*(choice.whole() for choice in completion.choices))
    await service.finish(completion)
    choices = []
    for index, (choice, delta) in enumerate(zip(completion.choices, deltas, strict=True)):
        if choice.ending is None or choice.ending.reason == "error":
            raise RuntimeError("the engine failed on this request")
        scores = _Scores(service.tokenizer, completion, index)
        text = _echoed(completion, index) + delta.text
        logprobs = scores.of([*_prompt(completion, choice), *delta.symbols])
        choices.append(_choice(completion, index, text, logprobs))
    usage = _usage(completion)
    return _head(service, completion) | {"choices": choices, "usage": usage}


async def events(service: Service, completion: Completion) -> AsyncIterator[str]:
    """Server-sent events: pieces of text as they come, then how each text ended."""
    options = completion.body.stream_options
    with_usage = options is not None and options.include_usage
    head = _head(service, completion) | ({"usage": None} if with_usage else {})
    scores = [_Scores(service.tokenizer, completion, n) for n in range(len(completion.choices))]
    begun: set[int] = set()
    try:
        async with contextlib.aclosing(_merged(completion.choices)) as deltas:
            async for index, delta in deltas:
                text, symbols = delta
                if index not in begun:
                    begun.add(index)
                    text = _echoed(completion, index) + text
                    symbols = (*_prompt(completion, completion.choices[index]), *symbols)
                choice = {"index": index, "text": text, "finish_reason": None}
                choice["logprobs"] = scores[index].of(symbols)
                yield _event(head | {"choices": [choice]})
        await service.finish(completion)
        for index, choice in enumerate(completion.choices):
            if choice.ending is None or choice.ending.reason == "error":
                message = "the engine failed on this request"
                yield _event(error(message, "internal_error", "server_error"))
                return
            text, logprobs = "", None
            if index not in begun:
                # nothing was drawn
                text = _echoed(completion, index)
                prompt = _prompt(completion, choice)
                logprobs = scores[index].of(prompt) if prompt else None
            yield _event(head | {"choices": [_choice(completion, index, text, logprobs)]})
        if with_usage:
            yield _event(head | {"choices": [], "usage": _usage(completion)})
        yield "data: [DONE]\n\n"
    except Refused as why:
        yield _event(error(str(why), why.code, "server_error"))
    finally:
        # the client may be gone before the end
        with contextlib.suppress(Refused):
            await service.finish(completion)


async def _merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all choices as they come, taken no faster than the reader reads."""
    came: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue(1)

    async def pump(index: int, choice: Choice) -> None:
        async for delta in choice.deltas():
            await came.put((index, delta))
        await came.put((index, None))

    tasks = [asyncio.create_task(pump(n, choice)) for n, choice in enumerate(choices)]
    try:
        running = len(tasks)
        while running:
            index, delta = await came.get()
            if delta is None:
                running -= 1
            else:
                yield index, delta
    finally:
        for task in tasks:
            task.cancel()


class _Scores:
    """OpenAI's `logprobs` of one choice, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, completion: Completion, index: int) -> None:
        self.tokenizer, self.decoding = tokenizer, Decoding(tokenizer)
        self.wanted = completion.body.logprobs is not None
        self.offset = 0 if completion.body.echo else len(completion.prompt_texts[index])

    def of(self, symbols: Sequence[Scored]) -> dict[str, Any] | None:
        """The next part, None if nobody asked."""
        if not self.wanted:
            return None
        tokens = [self._name(one.symbol) for one in symbols]
        offsets = []
        for one in symbols:
            offsets.append(self.offset)
            self.offset += len(self.decoding.push(one.symbol))
        return {
            "tokens": tokens,
            "token_logprobs": [one.log_p for one in symbols],
            "top_logprobs": [self._top(one) for one in symbols],
            "text_offset": offsets,
        }

    def _top(self, one: Scored) -> dict[str, float] | None:
        if one.log_p is None:
            return None
        top: dict[str, float] = {}
        for symbol, log_p in one.top:
            # of several symbols with one text the likeliest
            top.setdefault(self._name(symbol), log_p)
        return top

    def _name(self, symbol: int) -> str:
        """The text of a symbol; of a part of a character, which has none, its number."""
        text = self.tokenizer.decode([symbol])
        return f"token_id:{symbol}" if "\ufffd" in text else text


def _head(service: Service, completion: Completion) -> dict[str, Any]:
    created = int(completion.created)
    kind = "text_completion"
    return {"id": completion.id, "object": kind, "created": created, "model": service.name}


def _choice(completion: Completion, index: int, text: str, logprobs: Any) -> dict[str, Any]:
    ending = completion.choices[index].ending
    assert ending is not None
    choice = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        # what OpenAI's clients know; `ended` beside it says more
        "finish_reason": "stop" if ending.reason == "stop" else "length",
        "ended": ending.reason,
    }
    if index in completion.saved:
        name, session = completion.saved[index]
        size = session.state.num_bytes
        choice["session"] = {"name": name, "num_symbols": session.num_symbols, "bytes": size}
    return choice


def _usage(completion: Completion) -> dict[str, int]:
    # a prompt of several texts is read once
    per = completion.body.n or 1
    read = sum(map(len, completion.prompts[::per]))
    drawn = sum(choice.num_drawn for choice in completion.choices)
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def _echoed(completion: Completion, index: int) -> str:
    return completion.prompt_texts[index] if completion.body.echo else ""


def _prompt(completion: Completion, choice: Choice) -> Sequence[Scored]:
    return choice.prompt if completion.body.echo else ()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
