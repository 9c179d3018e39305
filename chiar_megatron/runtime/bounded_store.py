"""A store whose calls never block for ever: torch's own do when rank 0 is frozen, time-out or not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Union

import torch.distributed as dist

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.env import ProcessEnv

_Answer = Union[BaseException, tuple[Any]]


class StoreGoneError(LaunchError):
    """Rank 0, which hosts the store, has ended or does not answer."""


class BoundedStore:
    """The few calls that ranks need between collectives.

    Each raises StoreGoneError if it is not answered in time.
    """

    def __init__(self, store: dist.Store, env: ProcessEnv, seconds: float) -> None:
        """seconds: within which every call must be answered."""
        self._store, self._env, self._seconds = store, env, seconds
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[_Answer]]]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        """The value of a key that is there."""
        return str(self._call(lambda: self._store.get(key)).decode())

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, 0 at first; returns the sum."""
        return int(self._call(lambda: self._store.add(key, amount)))

    def has(self, *keys: str) -> bool:
        """Whether all keys are there."""
        return bool(self._call(lambda: self._store.check(list(keys))))

    def _call(self, action: Callable[[], Any]) -> Any:
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._calls.put((action, answers))
        where = f"rank 0 at {self._env.master_addr}:{self._env.master_port}"
        try:
            answer = answers.get(timeout=self._seconds)
        except queue.Empty:
            raise StoreGoneError(
                f"{where} has not answered for {self._seconds:g} s; look at its host"
            ) from None
        if isinstance(answer, tuple):
            return answer[0]
        raise StoreGoneError(f"{where} has ended; look at what it printed") from answer

    def _serve(self) -> None:
        while True:
            action, answers = self._calls.get()
            try:
                answers.put((action(),))
            except RuntimeError as error:  # torch's DistError is one
                answers.put(error)
