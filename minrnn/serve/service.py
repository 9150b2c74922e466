"""What the server does behind HTTP: checks a request, submits it, keeps its session."""

import asyncio
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minrnn.data.tokenizers import Tokenizer
from minrnn.sampling import Sampling
from minrnn.serve.choices import Choice
from minrnn.serve.claims import Claims
from minrnn.serve.config import Limits
from minrnn.serve.requests import Request
from minrnn.serve.schemas import CompletionBody, Refused
from minrnn.serve.sessions import Session, SessionStore
from minrnn.serve.worker import Worker

# what OpenAI's completions do without `max_tokens`
_LENGTH = 16
# fields whose other values would change the text in ways that are not offered
_FIXED = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "suffix": ""}


@dataclass
class Completion:
    """A request that is being served."""

    owner: str
    body: CompletionBody
    choices: list[Choice]
    # one for each choice
    prompts: list[Tensor]
    prompt_texts: list[str]
    # where its session stood
    session: Session | None = None
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    saved: dict[int, tuple[str, Session]] = field(default_factory=dict)
    finishing: "asyncio.Task[None] | None" = None


class Service:
    """Serves completions of one model.

    Args:
        name: what clients call the model.
        tokenizer: of the model.
        worker: runs the engine.
        sessions: where sessions are saved.
        limits: what a request may take.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        worker: Worker,
        sessions: SessionStore,
        limits: Limits,
    ) -> None:
        self.name, self.tokenizer, self.worker = name, tokenizer, worker
        self.sessions, self.limits, self.created = sessions, limits, int(time.time())
        self.draining = False
        self.claims = Claims(sessions)
        self.open: Counter[str] = Counter()

    async def start(self, body: CompletionBody, owner: str) -> Completion:
        """Check a request and submit it; `finish` must follow.

        Raises:
            Refused: it cannot be served.
        """
        self._check(body)
        texts, prompts = self._prompts(body)
        num_texts = len(prompts) * (body.n or 1)
        self._check_room(num_texts, owner)
        # from here to `finish` these count as open
        self.open[owner] += num_texts
        try:
            session = await self._take(body, owner) if body.session else None
        except BaseException:
            self._close(owner, num_texts)
            raise
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        choices = [Choice(self.tokenizer, stops) for _ in range(num_texts)]
        per = body.n or 1
        completion = Completion(
            owner,
            body,
            choices,
            [prompt for prompt in prompts for _ in range(per)],
            [text for text in texts for _ in range(per)],
            session,
        )
        try:
            self._submit(completion)
        except BaseException:
            await self._release(completion)
            raise
        return completion

    async def finish(self, completion: Completion) -> None:
        """Save what is to be saved of a completion, and let go of it; cancels what still runs.

        Raises:
            Refused: a session could not be saved; what was saved before still stands.
        """
        if completion.finishing is None:
            completion.finishing = asyncio.create_task(self._finish(completion))
        # goes on when the request is cancelled, so that no session is left half-way
        await asyncio.shield(completion.finishing)

    async def _finish(self, completion: Completion) -> None:
        try:
            for choice in completion.choices:
                if choice.ending is None and self.worker.alive:
                    self.worker.cancel(choice)
            failed: OSError | None = None
            for index, choice in enumerate(completion.choices):
                try:
                    await self._save(completion, index, choice)
                except OSError as error:
                    failed = error
            if failed is not None:
                message = "the text has ended, but its session could not be saved"
                raise Refused(500, "session_not_saved", message) from failed
        finally:
            await self._release(completion)

    async def drain(self, grace: float) -> None:
        """Take no new requests; after `grace` seconds end the open texts where they stand."""
        self.draining = True
        until = time.monotonic() + grace
        while self.open.total() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.worker.alive:
            self.worker.close_texts()

    async def close(self) -> None:
        """End everything; what was open is saved."""
        await self.drain(0.0)
        while self.open.total():
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.worker.close)
        await asyncio.to_thread(self.sessions.close)

    def _check(self, body: CompletionBody) -> None:
        if self.draining or not self.worker.alive:
            raise Refused(503, "shutting_down", "the server is shutting down")
        if body.model != self.name:
            message = f"`model` must be {self.name!r}, got {body.model!r:.80}"
            raise Refused(404, "model_not_found", message, "model")
        for name, neutral in _FIXED.items():
            if getattr(body, name) not in (None, neutral):
                message = f"`{name}` is not offered, it must be {neutral!r} or left out"
                raise Refused(400, "unsupported", message, name)
        n = body.n or 1
        if body.best_of not in (None, n):
            raise Refused(400, "unsupported", f"`best_of` must be `n` = {n}", "best_of")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > 4 or not all(stops) or any(len(stop) > 1000 for stop in stops):
            message = "`stop` must be up to 4 texts of 1 to 1,000 characters"
            raise Refused(400, "invalid_value", message, "stop")
        length = _length(body)
        if length > self.limits.length:
            message = f"`max_tokens` must be <= {self.limits.length}, got {length}"
            raise Refused(400, "invalid_value", message, "max_tokens")
        if body.session and (n > 1 or body.echo):
            message = "with `session`, `n` must be 1 and `echo` false"
            raise Refused(400, "unsupported", message, "session")
        if body.stream_options and not body.stream:
            message = "`stream_options` needs `stream` true"
            raise Refused(400, "invalid_value", message, "stream_options")

    def _prompts(self, body: CompletionBody) -> tuple[list[str], list[Tensor]]:
        """The prompts as texts and as ids (T,)."""
        given = "" if body.prompt is None else body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        num_texts, most = len(given) * (body.n or 1), self.limits.choices
        if num_texts > most:
            message = f"prompts times `n` must be <= {most}, got {num_texts}"
            raise Refused(400, "invalid_value", message, "n")
        prompts = [self._ids(one) for one in given]
        if body.session and len(prompts) != 1:
            message = f"with `session`, `prompt` must be one text, got {len(prompts)}"
            raise Refused(400, "unsupported", message, "prompt")
        if not prompts or (not body.session and not all(map(len, prompts))):
            message = "`prompt` must hold at least one symbol, got none"
            raise Refused(400, "invalid_value", message, "prompt")
        total = sum(map(len, prompts))
        if total > self.limits.prompt:
            message = f"`prompt` must hold <= {self.limits.prompt} symbols, got {total}"
            raise Refused(400, "context_length_exceeded", message, "prompt")
        if body.logprobs is not None and num_texts * _length(body) > self.limits.scored:
            message = f"with `logprobs`, texts times `max_tokens` must be <= {self.limits.scored}"
            raise Refused(400, "invalid_value", message, "max_tokens")
        texts = [
            one if isinstance(one, str) else self.tokenizer.decode(ids.tolist())
            for one, ids in zip(given, prompts, strict=True)
        ]
        return texts, prompts

    def _ids(self, prompt: object) -> Tensor:
        try:
            if isinstance(prompt, str):
                return torch.from_numpy(self.tokenizer.encode(prompt)).long()
            ids = torch.tensor(prompt, dtype=torch.int64, device="cpu")
        except ValueError as error:
            raise Refused(400, "invalid_value", f"`prompt`: {error}", "prompt") from error
        V = self.tokenizer.vocab_size
        if len(ids) and int(ids.max()) >= V:
            message = f"`prompt` must hold ids < {V}, got {int(ids.max())}"
            raise Refused(400, "invalid_value", message, "prompt")
        return ids

    def _check_room(self, num_texts: int, owner: str) -> None:
        if self.open[owner] + num_texts > self.limits.streams_per_key:
            most = self.limits.streams_per_key
            raise Refused(429, "too_many_streams", f"a key may have {most} open texts")
        if self.open.total() + num_texts > self.limits.streams:
            raise Refused(503, "overloaded", f"the server has {self.limits.streams} open texts")

    async def _take(self, body: CompletionBody, owner: str) -> Session | None:
        """Claim a session for this request; None if it begins with it."""
        assert body.session is not None
        place = (owner, body.session)
        await self.claims.take(*place)
        try:
            session = await asyncio.to_thread(self._load, *place)
            if session is None:
                await self.claims.begin(*place)
            return session
        except BaseException:
            await self.claims.release(*place)
            raise

    def _load(self, owner: str, name: str) -> Session | None:
        try:
            return self.sessions.load(owner, name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Refused(409, "session_unusable", str(error), "session") from error
        except OSError as error:
            message = "the sessions cannot be reached"
            raise Refused(503, "sessions_unavailable", message, "session") from error

    def _submit(self, completion: Completion) -> None:
        body, per, session = completion.body, completion.body.n or 1, completion.session
        ids = session.unread if session else ()
        unread = torch.tensor(ids, dtype=torch.int64, device="cpu")
        for start in range(0, len(completion.choices), per):
            prompt = torch.cat([unread, completion.prompts[start]])
            if not len(prompt):
                message = "`prompt` must hold at least one symbol, got none"
                raise Refused(400, "invalid_value", message, "prompt")
            request = Request(
                prompt,
                _length(body),
                tuple(_sampling(body, n) for n in range(per)),
                completion.owner,
                session.state if session else None,
                body.logprobs,
                bool(body.echo) and body.logprobs is not None,
                self.limits.seconds,
            )
            self.worker.submit(request, completion.choices[start : start + per])

    async def _save(self, completion: Completion, index: int, choice: Choice) -> None:
        """Save a choice that belongs to a session, or that a shutdown has cut."""
        ending, name = choice.ending, completion.body.session
        if ending is None or ending.state is None or ending.reason in ("cancelled", "error"):
            return
        if name is None and ending.reason != "closed":
            return
        name = name or f"{completion.id}-{index}"
        now, num_symbols = time.time(), len(completion.prompts[index]) + choice.num_drawn
        created = now
        if completion.session is not None:
            created = completion.session.created
            num_symbols += completion.session.num_symbols
        session = Session(ending.state, ending.unread, num_symbols, created, now)
        await asyncio.to_thread(self.sessions.save, completion.owner, name, session)
        completion.saved[index] = (name, session)

    async def _release(self, completion: Completion) -> None:
        if completion.body.session:
            await self.claims.release(completion.owner, completion.body.session)
        self._close(completion.owner, len(completion.choices))

    def _close(self, owner: str, num_texts: int) -> None:
        self.open[owner] -= num_texts
        if self.open[owner] <= 0:
            del self.open[owner]


def _length(body: CompletionBody) -> int:
    return _LENGTH if body.max_tokens is None else body.max_tokens


def _sampling(body: CompletionBody, n: int) -> Sampling:
    """Of text number n of a prompt: each has numbers of its own."""
    seed = None if body.seed is None else (body.seed + n) % (1 << 63)
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    top_p = 1.0 if body.top_p is None else float(body.top_p)
    return Sampling(temperature, body.top_k or 0, top_p, seed)
