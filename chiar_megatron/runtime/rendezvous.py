"""How ranks find each other: rank 0 hosts a key-value store, everyone reports there, nobody waits for ever.

torch's own start only says that a time-out happened. Here rank 0 looks at who has arrived, writes one
verdict, and every rank that is present raises the same error, which names the ranks that are not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from chiar_megatron.errors import RendezvousError
from chiar_megatron.runtime.env import ProcessEnv

VERDICT_MARGIN_SECONDS = 10.0  # ranks that connected wait a little longer than rank 0 itself does
VERDICT_KEY = "verdict"
COMPLETE = "complete"
HOSTS_SHOWN = 8  # of those that did not come in full


def rendezvous(env: ProcessEnv, timeout_seconds: float) -> dist.Store:
    """Wait until all ranks of the launch are there; return the store for `init_process_group(store=...)`.

    One process alone gets a `HashStore` and opens no port.

    Raises:
        RendezvousError: the port is in use, rank 0 cannot be reached, a rank started twice, or ranks did
            not appear in time (the message lists them).
    """
    if env.world_size == 1:
        return dist.HashStore()
    hosts = env.rank == 0 and not env.agent_hosts_store
    # The prefix keeps a launch apart from another that listens at the same port by mistake.
    store = dist.PrefixStore(f"chiar/{env.job}", _open_store(env, timeout_seconds, hosts))
    if store.add(f"starts/{env.rank}", 1) > 1:
        first = store.get(f"arrived/{env.rank}").decode()
        raise RendezvousError(
            f"rank {env.rank} started twice, on {first} and on {env.host}: two launches share the port "
            f"{env.master_port} of {env.master_addr}. Set MASTER_PORT to another port for one of them."
        )
    store.set(f"arrived/{env.rank}", env.host)
    if env.rank == 0:
        verdict = _decide(store, env, timeout_seconds)
    else:
        verdict = _hear_verdict(store, env, timeout_seconds)
    if verdict != COMPLETE:
        raise RendezvousError(
            f"{verdict} did not appear within {timeout_seconds:g} s "
            f"(this is rank {env.rank} on {env.host}). Look at what those ranks printed; if they were only "
            f"slow, raise runtime.start_timeout_seconds."
        )
    return store


def open_client(env: ProcessEnv, timeout_seconds: float) -> dist.Store:
    """A connection of its own to the store of a launch that has met, for a thread beside training.

    Raises RendezvousError if rank 0 cannot be reached.
    """
    return dist.PrefixStore(f"chiar/{env.job}/beside", _open_store(env, timeout_seconds, hosts_store=False))


def _open_store(env: ProcessEnv, timeout_seconds: float, hosts_store: bool) -> dist.Store:
    try:
        return dist.TCPStore(
            env.master_addr,
            env.master_port,
            is_master=hosts_store,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        where = f"{env.master_addr}:{env.master_port}"
        if hosts_store and "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"MASTER_PORT={env.master_port} is in use on {env.host}, and rank 0 must listen there. Set "
                f"MASTER_PORT to a free port for all ranks, or end what listens "
                f"(`ss -ltnp 'sport = :{env.master_port}'` shows it)."
            ) from error
        if hosts_store:
            reason = str(error).partition("\n")[0]
            raise RendezvousError(f"rank 0 on {env.host} could not listen at {where}: {reason}") from error
        raise RendezvousError(
            f"rank {env.rank} on {env.host} could not reach rank 0 at {where} within {timeout_seconds:g} s. "
            f"Check that rank 0 started, that MASTER_ADDR is its host, and that no firewall closes the port."
        ) from error


def _decide(store: dist.Store, env: ProcessEnv, timeout_seconds: float) -> str:
    """Rank 0: wait for all, write the verdict, and keep the store up until those present have read it."""
    world_size = env.world_size
    arrivals = [f"arrived/{rank}" for rank in range(world_size)]
    try:
        store.wait(arrivals, timedelta(seconds=timeout_seconds))
        present = list(range(world_size))
    except RuntimeError:
        present = [rank for rank in range(world_size) if store.check([arrivals[rank]])]
    missing = sorted(set(range(world_size)) - set(present))
    verdict = COMPLETE
    if missing:
        here = Counter(store.get(arrivals[rank]).decode() for rank in present)
        verdict = f"{'rank' if len(missing) == 1 else 'ranks'} {_ranges(missing)} of {world_size}"
        verdict += _missing_hosts(env.hosts, here)
    store.set(VERDICT_KEY, verdict)
    if missing:
        deadline = time.monotonic() + VERDICT_MARGIN_SECONDS
        others = [f"heard/{rank}" for rank in present if rank != 0]
        while not all(store.check([key]) for key in others) and time.monotonic() < deadline:
            time.sleep(0.05)
    return verdict


def _hear_verdict(store: dist.Store, env: ProcessEnv, timeout_seconds: float) -> str:
    try:
        store.wait([VERDICT_KEY], timedelta(seconds=timeout_seconds + VERDICT_MARGIN_SECONDS))
        verdict: str = store.get(VERDICT_KEY).decode()
        if verdict != COMPLETE:
            store.set(f"heard/{env.rank}", env.host)
        return verdict
    except RuntimeError as error:
        waited = timeout_seconds + VERDICT_MARGIN_SECONDS
        raise RendezvousError(
            f"rank {env.rank} on {env.host} reached {env.master_addr}:{env.master_port}, but rank 0 ended or "
            f"did not answer within {waited:g} s. Look at what rank 0 printed."
        ) from error


def _missing_hosts(expected: Sequence[tuple[str, int]], here: Counter[str]) -> str:
    """`" (came from n2 0 of 4, n3 3 of 4)"`; empty where the launcher does not tell where ranks belong."""
    short = [f"{host} {here[host]} of {count}" for host, count in expected if here[host] < count]
    if not short:
        return ""
    more = f" and {len(short) - HOSTS_SHOWN} more hosts" if len(short) > HOSTS_SHOWN else ""
    return f" (came from {', '.join(short[:HOSTS_SHOWN])}{more})"


def _ranges(ranks: list[int]) -> str:
    """`[1, 2, 3, 7]` as `"1-3, 7"`: a dead host of a large job is one entry."""
    parts: list[str] = []
    first = previous = ranks[0]
    for rank in [*ranks[1:], -1]:
        if rank != previous + 1:
            parts.append(str(first) if first == previous else f"{first}-{previous}")
            first = rank
        previous = rank
    return ", ".join(parts)
