"""Ranks that work apart and meet now and then, without collectives: the failure of one is an error of all.

Everything goes through the store of the rendezvous, so it is the same under `mpirun`, `srun` and torchrun.
"""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.bounded_store import BoundedStore, StoreGoneError
from chiar_megatron.runtime.env import ProcessEnv
from chiar_megatron.runtime.rendezvous import VERDICT_MARGIN_SECONDS, rendezvous

_LOOK_SECONDS = 0.5  # between looks at the others while waiting
_FAILURE = "failure"


class Crew:
    """This rank among the others, from the rendezvous to the end of the `with` block.

    Within the block a rank calls `beat` after every piece of work and `meet` where all must be there. Both
    raise LaunchError once another rank has failed, or has done nothing for `silence_seconds`.
    """

    def __init__(self, env: ProcessEnv, silence_seconds: float) -> None:
        """Waits for all ranks. Raises LaunchError as `rendezvous` does."""
        self._env = env
        self._silence_seconds = silence_seconds
        self._store = BoundedStore(rendezvous(env, silence_seconds), env, silence_seconds)
        self._others = [rank for rank in range(env.world_size) if rank != env.rank]

    def __enter__(self) -> Crew:
        return self

    def beat(self) -> None:
        """This rank has done something."""
        self._store.add(f"beat/{self._env.rank}", 1)
        self._raise_failure()

    def meet(self, name: str) -> None:
        """Wait for every rank to come here; names are used once."""
        self._store.set(f"{name}/{self._env.rank}", "")
        if self._env.rank == 0:
            self._await({rank: f"{name}/{rank}" for rank in self._others})
            self._store.set(f"{name}/all", "")
        else:
            self._await({0: f"{name}/all"})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StoreGoneError):
            return
        with suppress(StoreGoneError):
            if error is not None and not self._store.has(_FAILURE):
                words = str(error).partition("\n")[0] or type(error).__name__
                self._store.set(_FAILURE, f"rank {self._env.rank} on {self._env.host}: {words}")
            self._store.set(f"left/{self._env.rank}", "")
            if self._env.rank == 0:  # it hosts the store
                deadline = time.monotonic() + VERDICT_MARGIN_SECONDS
                left = [f"left/{rank}" for rank in self._others]
                while time.monotonic() < deadline and not self._store.has(*left):
                    time.sleep(0.05)

    def _await(self, keys: dict[int, str]) -> None:
        """Wait for each rank's key, until somebody has failed or one of them is silent for too long."""
        heard: dict[int, tuple[int, float]] = {}
        while absent := [rank for rank, key in keys.items() if not self._store.has(key)]:
            self._raise_failure()
            now = time.monotonic()
            for rank in absent:
                beats = self._store.add(f"beat/{rank}", 0)
                if rank not in heard or heard[rank][0] != beats:
                    heard[rank] = (beats, now)
                elif now - heard[rank][1] > self._silence_seconds:
                    raise LaunchError(
                        f"rank {rank} has done nothing for {self._silence_seconds:g} s; look at what it "
                        f"printed, and at its host"
                    )
            time.sleep(_LOOK_SECONDS)

    def _raise_failure(self) -> None:
        if self._store.has(_FAILURE):
            raise LaunchError(self._store.get(_FAILURE))
