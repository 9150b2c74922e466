"""The routes."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from minrnn.serve import answers
from minrnn.serve.metrics import Metrics
from minrnn.serve.middleware import Guard
from minrnn.serve.schemas import CompletionBody, ForkBody, Name, Refused, error
from minrnn.serve.service import Service
from minrnn.serve.sessions import Session

SessionName = Annotated[Name, Path()]
_STATUSES = {
    400: "The request is not valid.",
    401: "The API key is missing or not known.",
    404: "There is no such model or session.",
    409: "The session is in use, exists, or cannot be used.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The key has too many open texts or sessions.",
    503: "The server is full or shuts down.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what} for status, what in _STATUSES.items()
}


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application.

    Args:
        service: what serves; it is closed with the application.
        keys: API keys; none serves everybody, as one owner.

    Example:
        >>> import tempfile, pathlib
        >>> from minrnn.data.tokenizers import Bytes
        >>> from minrnn.models import LanguageModel, ModelConfig
        >>> from minrnn.serve.config import Limits
        >>> from minrnn.serve.engine import Engine
        >>> from minrnn.serve.folder_store import FolderStore
        >>> from minrnn.serve.worker import Worker
        >>> model = LanguageModel(ModelConfig(vocab_size=256, width=8)).eval()
        >>> store = FolderStore(pathlib.Path(tempfile.mkdtemp()), "a model")
        >>> service = Service("tiny", Bytes(), Worker(Engine(model)), store, Limits())
        >>> app = create_app(service, keys=["secret"])
        >>> service.worker.close()
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="minrnn", lifespan=lifespan, docs_url=None, redoc_url=None)
    # for what runs the application and asks after it
    app.state.service = service
    metrics = Metrics(service)
    owner = _authentication(app, {_owner(key) for key in keys})
    _open_routes(app, service, metrics)
    _completion_routes(app, service, owner)
    _session_routes(app, service, owner)
    _error_answers(app)
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(Guard, limits=service.limits, metrics=metrics, paths=paths)
    return app


def _owner(key: str) -> str:
    # the key itself is kept nowhere
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _authentication(app: FastAPI, known: set[str]) -> Any:
    def owner(request: Request) -> str:
        if not known:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # looked up by its hash: the time tells nothing about the key
        found = _owner(key.strip())
        if scheme.lower() != "bearer" or found not in known:
            raise Refused(401, "invalid_api_key", "the API key is missing or not known")
        return found

    return Depends(owner)


def _open_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    page = (resources.files("minrnn.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def try_it() -> str:
        """A page to try the model."""
        return page

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> JSONResponse:
        """Whether requests are served."""
        alive = service.worker.alive and not service.draining
        content = {"status": "ok" if alive else "shutting down"}
        return JSONResponse(content, 200 if alive else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _completion_routes(app: FastAPI, service: Service, owner: Any) -> None:
    def described() -> dict[str, Any]:
        about = {"id": service.name, "object": "model", "created": service.created}
        return about | {"owned_by": "minrnn", "state_bytes": service.worker.engine.state_bytes}

    @app.get("/v1/models", dependencies=[owner], responses={401: _ERRORS[401]})
    async def list_models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}", dependencies=[owner], responses=_ERRORS)
    async def describe_model(name: str) -> dict[str, Any]:
        """One model."""
        if name != service.name:
            raise Refused(404, "model_not_found", f"there is no model {name!r:.80}", "model")
        return described()

    @app.post("/v1/completions", responses=_ERRORS)
    async def complete(
        body: CompletionBody, request: Request, owner: Annotated[str, owner]
    ) -> Response:
        """Continue prompts; with `stream` as server-sent events."""
        completion = await service.start(body, owner)
        if body.stream:
            events = answers.events(service, completion)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = asyncio.create_task(answers.whole(service, completion))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return JSONResponse(answer.result())
            # nobody will read this
            return Response(status_code=499)
        finally:
            answer.cancel()
            gone.cancel()
            await service.finish(completion)


def _session_routes(app: FastAPI, service: Service, owner: Any) -> None:
    sessions = service.sessions

    @app.get("/v1/sessions", responses=_ERRORS)
    async def list_sessions(owner: Annotated[str, owner]) -> dict[str, Any]:
        """The names of the saved sessions."""
        return {"object": "list", "data": await asyncio.to_thread(sessions.names, owner)}

    @app.get("/v1/sessions/{name}", responses=_ERRORS)
    async def describe_session(name: SessionName, owner: Annotated[str, owner]) -> dict[str, Any]:
        """One session."""
        session = await asyncio.to_thread(_known, sessions.load, owner, name)
        return _described(name, session)

    @app.post("/v1/sessions/{name}/fork", status_code=201, responses=_ERRORS)
    async def fork_session(
        name: SessionName, body: ForkBody, owner: Annotated[str, owner]
    ) -> dict[str, Any]:
        """Copy a session under another name."""
        async with service.claims.held(owner, body.name, is_new=True):
            session = await asyncio.to_thread(_known, sessions.fork, owner, name, body.name)
        return _described(body.name, session)

    @app.delete("/v1/sessions/{name}", responses=_ERRORS)
    async def delete_session(name: SessionName, owner: Annotated[str, owner]) -> dict[str, Any]:
        """Delete a session."""
        async with service.claims.held(owner, name):
            await asyncio.to_thread(_known, sessions.delete, owner, name)
        return {"name": name, "object": "session", "deleted": True}


def _known(call: Any, *args: str) -> Any:
    """Call a method of the store; what it refuses gets its status."""
    try:
        return call(*args)
    except FileNotFoundError as refused:
        raise Refused(404, "session_not_found", str(refused), "name") from refused
    except FileExistsError as refused:
        raise Refused(409, "session_exists", str(refused), "name") from refused
    except ValueError as refused:
        raise Refused(409, "session_unusable", str(refused), "name") from refused


def _described(name: str, session: Session) -> dict[str, Any]:
    return {
        "name": name,
        "object": "session",
        "num_symbols": session.num_symbols,
        "bytes": session.state.num_bytes,
        "created": session.created,
        "updated": session.updated,
    }


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_answers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, why: Refused) -> JSONResponse:
        kind = "invalid_request_error" if why.status < 500 else "server_error"
        headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
        content = error(str(why), why.code, kind, why.param)
        return JSONResponse(content, why.status, headers.get(why.status))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, why: RequestValidationError) -> JSONResponse:
        first = why.errors()[0]
        place = [str(part) for part in first["loc"][1:]]
        param = place[0] if place else None
        message = f"{'.'.join(place) or 'the body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            body = ForkBody if request.url.path.endswith("/fork") else CompletionBody
            message += f" (known: {', '.join(body.model_fields)})"
        return JSONResponse(error(message, "invalid_value", param=param), 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, why: HTTPException) -> JSONResponse:
        return JSONResponse(error(str(why.detail), "not_found"), why.status_code, why.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, why: Exception) -> JSONResponse:
        content = error("the server failed on this request", "internal_error", "server_error")
        return JSONResponse(content, 500)
