"""Ranks that torchrun starts, on one node or several.

torchrun's rank 0 becomes the engine, and starts the rank that it was as a child; all others join
it. They find it by torchrun's own store: an address, and a token that a rank has to bring. Where
torchrun runs on one machine, everything listens on the loopback; over several, on the address that
`--master-addr` names.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sora_engine.config import ParallelConfig
from sora_engine.distributed.layout import check_world, nearest
from sora_engine.distributed.message import Connection, Message
from sora_engine.distributed.pool import RankPool, launch
from sora_engine.errors import RankFailedError

JOIN_TIMEOUT = timedelta(minutes=10)


def launched() -> bool:
    """Whether this process is one of several of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ["RANK"])


def default_layout(num_heads: int) -> ParallelConfig:
    """Over all of torchrun's ranks: Ulysses as far as heads go, and a ring of such groups."""
    world = int(os.environ["WORLD_SIZE"])
    wanted = ParallelConfig(ulysses=world)
    return nearest(wanted, world, num_heads=num_heads)[0]


def gather(
    config: ParallelConfig, *, device: str, model: Mapping[str, Any], threads: int
) -> RankPool:
    """The pool of torchrun's ranks; for its rank 0. The arguments are those of `RankPool.start`.

    Raises RankFailedError for a rank that does not come.
    """
    world = int(os.environ["WORLD_SIZE"])
    check_world(config, world)
    _stay_on_loopback()
    settings = {
        "parallel": asdict(config),
        "device": device,
        "threads": threads,
        "model": dict(model),
        "world": world,
    }
    store = _store()
    host = "127.0.0.1" if _one_machine() else socket.gethostbyname(os.environ["MASTER_ADDR"])
    token = secrets.token_hex(16)
    with socket.create_server((host, 0), backlog=world) as listener:
        store.set("token", token)
        store.set("address", f"{host}:{listener.getsockname()[1]}")
        connections, launcher = launch(1, settings, [])
        joined = {0: connections[0]}
        try:
            _accept(listener, token, joined, world)
        except BaseException:
            launcher.kill()
            launcher.wait()
            raise
    for number, connection in joined.items():
        if number > 0:
            connection.send(Message("settings", settings))
    pool = RankPool([joined[i] for i in range(world)], config, launcher, num_children=1)
    try:
        pool.wait_ready()
    except BaseException:
        pool.close()
        raise
    return pool


def _accept(listener: socket.socket, token: str, joined: dict[int, Connection], world: int) -> None:
    until = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while len(joined) < world:
        listener.settimeout(max(0.1, until - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = next(i for i in range(world) if i not in joined)
            minutes = JOIN_TIMEOUT.total_seconds() / 60
            raise RankFailedError(missing, f"did not join within {minutes:g} minutes") from None
        sock.settimeout(10)
        connection = Connection(sock)
        try:
            hello = connection.receive()
            number = hello.fields["rank"]
            known = hmac.compare_digest(str(hello.fields["token"]), token)
        except (OSError, EOFError, KeyError):
            known, number = False, -1
        if known and isinstance(number, int) and 0 < number < world and number not in joined:
            joined[number] = connection
        else:
            connection.close()


def serve() -> int:
    """Serve as a rank until the engine at rank 0 is done; returns the exit code."""
    from sora_engine.distributed.rank import run_rank

    _stay_on_loopback()
    store = _store()
    host, _, port = store.get("address").decode().rpartition(":")
    token = store.get("token").decode()
    try:
        sock = socket.create_connection((host, int(port)), JOIN_TIMEOUT.total_seconds())
        connection = Connection(sock)
        connection.send(Message("hello", {"rank": rank(), "token": token}))
        settings = connection.receive().fields
    except (EOFError, ConnectionError):
        # The engine ended before it had use for a rank, and is about to say why: torchrun would
        # end it for a rank that leaves with an error.
        return 0
    sock.settimeout(None)
    return run_rank(rank(), settings["world"], sock, settings)


def _store() -> dist.Store:
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=JOIN_TIMEOUT,
    )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sora/{os.environ['TORCHELASTIC_RUN_ID']}/{restart}", store)


def _one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _stay_on_loopback() -> None:
    """gloo and NCCL would take the address of the host's name."""
    if _one_machine():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
