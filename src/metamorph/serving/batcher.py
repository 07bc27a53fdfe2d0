"""Work of several requests in batches, on one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """More items wait than allowed."""


class Closed(Exception):
    """No new items are taken."""


class Batcher(Generic[Item, Result]):
    """Computes `work` of items that arrive one by one, in batches of items with the same `key`, in order of arrival.

    A batch starts when it has `max_size` items, or `max_wait` seconds after its first item came or the thread was free.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Item]], Sequence[Result]],
        key: Callable[[Item], Hashable],
        *,
        max_size: int,
        max_wait: float = 0.0,
        max_waiting: float = float("inf"),
    ) -> None:
        self.work, self.key = work, key
        self.max_size, self.max_wait, self.max_waiting = max_size, max_wait, max_waiting
        self._waiting: deque[tuple[Item, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"metamorph-{name}", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of items that no batch has taken yet, without cancelled ones."""
        return sum(not future.cancelled() for _, future in tuple(self._waiting))

    def submit(self, item: Item) -> Future[Result]:
        """The result of an item, which may be cancelled until its batch starts."""
        return self.submit_all([item])[0]

    def submit_all(self, items: Sequence[Item]) -> list[Future[Result]]:
        """See `submit`; either all items get a place in the queue or none does."""
        futures: list[Future[Result]] = [Future() for _ in items]
        with self._changed:
            if self._is_closed:
                raise Closed
            if self.num_waiting + len(items) > self.max_waiting:
                raise QueueFull
            self._waiting.extend(zip(items, futures, strict=True))
            self._changed.notify()
        return futures

    def refuse(self) -> None:
        """Refuse new items and those that wait; the batch that runs is finished."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(Closed())

    def close(self) -> None:
        """Refuse new items, finish those that came before, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            items, futures = zip(*batch, strict=True)
            try:
                results = self.work(list(items))
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                for future in futures:
                    future.set_exception(error)
            else:
                for future, result in zip(futures, results, strict=True):
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, Future[Result]]]:
        """The next items, without cancelled ones; none once the batcher is closed and all are done."""
        batch: list[tuple[Item, Future[Result]]] = []
        with self._changed:
            while not batch and (self._waiting or not self._is_closed):
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                end = time.monotonic() + self.max_wait
                while len(self._waiting) < self.max_size and not self._is_closed:
                    if not self._changed.wait(end - time.monotonic()):
                        break
                batch = self._take()
        return batch

    def _take(self) -> list[tuple[Item, Future[Result]]]:
        """Remove the first item, and others with the same key, from the queue."""
        batch: list[tuple[Item, Future[Result]]] = []
        others: deque[tuple[Item, Future[Result]]] = deque()
        while self._waiting:
            item, future = self._waiting.popleft()
            if len(batch) == self.max_size or (batch and self.key(item) != self.key(batch[0][0])):
                others.append((item, future))
            elif future.set_running_or_notify_cancel():
                batch.append((item, future))
        self._waiting = others
        return batch
