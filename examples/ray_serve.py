"""Serve a run by several replicas with Ray Serve: any of them goes on with any session.

    pip install 'minrnn[train,serve,redis,examples]'
    python examples/ray_serve.py runs/demo --replicas 2
    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "demo", "prompt": "HAMLET:", "session": "mine", "stream": true}'

Ray starts the replicas, on one machine or on those of a cluster, shares out the requests, and
replaces a replica that dies. A session is a state in a store that all replicas share, claimed by
one request at a time: the router needs to know nothing about sessions. On one machine the store is
a folder, on several it is Redis (--redis). When a replica dies in the middle of a text, its client
sees the connection end, and the session goes on, wherever, from what was saved last.
"""

import argparse
import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch
from ray import serve

from minrnn.serve.config import Limits, ServeConfig
from minrnn.serve.server import open_app


class Replica:
    """One process of the deployment: a model, its engine, and the way to the shared sessions."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def __serve_build_asgi_app__(self) -> Any:
        self.server = open_app(self.config, torch.device(self.config.device))
        return self.server

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self.server.state.service.worker.alive:
            raise RuntimeError("the engine has ended")


def build(config: ServeConfig, replicas: int, cpus: float = 1.0) -> serve.Application:
    """The application that `serve.run` takes.

    Args:
        config: as `minrnn serve` takes it; each replica reads its own copy of the run. All must
            see the same folder of sessions, or the same Redis.
        replicas: how many processes.
        cpus: cores that Ray reserves for each, and threads that torch takes in it.
    """
    deployment = serve.deployment(
        name="minrnn",
        num_replicas=replicas,
        # the server has limits of its own, and answers 503 above them
        max_ongoing_requests=2 * config.limits.streams,
        # a replica that is told to stop has as long as a text may take, and no session is cut short
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.limits.seconds + 5,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": cpus},
    )
    return deployment(serve.ingress()(Replica)).bind(config)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = _Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder of minrnn train text")
    parser.add_argument("--replicas", type=int, default=2, help="processes that serve")
    parser.add_argument("--cpus", type=float, default=1.0, help="cores for each")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all addresses")
    parser.add_argument("--port", type=int, default=8000, help="to listen on")
    parser.add_argument("--cluster", help="address of a Ray cluster; a new one by default")
    parser.add_argument("--redis", help="the sessions' Redis, e.g. redis://localhost:6379/0")
    parser.add_argument("--seconds", type=float, default=30.0, help="that a text may take")
    parser.add_argument("--keys", type=Path, help="a file of API keys, one a line")
    options = parser.parse_args(arguments)
    if options.replicas < 1 or options.cpus <= 0:
        parser.error("`--replicas` must be >= 1 and `--cpus` > 0")
    if not (options.run / "config.json").is_file():
        parser.error(f"{options.run} is not a run folder")
    try:
        run, keys = options.run.resolve(), options.keys and options.keys.resolve()
        limits = Limits(seconds=options.seconds)
        config = ServeConfig(run, keys=keys, redis=options.redis, limits=limits)
    except ValueError as error:
        parser.error(str(error))
    stop = threading.Event()
    with _cluster(options):
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(build(config, options.replicas, options.cpus), name="minrnn", route_prefix="/")
        # Ray has put its own in place before
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        print(f"{run.name} on http://{options.host}:{options.port}", flush=True)
        stop.wait()
        print("open texts go on until they end", file=sys.stderr)
        serve.delete("minrnn")


@contextlib.contextmanager
def _cluster(options: argparse.Namespace) -> Any:
    """A Ray cluster: the one that was named, or one of this machine that ends with this process."""
    # a core for each replica, however few there are
    own = {"num_cpus": max(1, int(options.replicas * options.cpus + 0.999))}
    found = {"address": options.cluster} if options.cluster else own
    ray.init(**found, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
