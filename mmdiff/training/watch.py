"""Every process of a run gives a sign of life, and ends where another one, or its launcher, gives none any more.

Gloo notices a process that was killed. Nothing notices a machine that lost its network, and NCCL waits ten minutes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

PERIOD, LIMIT = 3.0, 30.0  # seconds between signs; after which a silent process counts as lost
_FINISHED = 2**40  # added to the sign of a process that ends in order


@contextlib.contextmanager
def watched(processes: int) -> Iterator[None]:
    """Within the block the other processes of the run are watched; one that is lost ends this process with a line.

    Args:
        processes: of the run.
    """
    if processes == 1:
        yield
        return
    stop = threading.Event()
    signs = _Signs(processes)
    thread = threading.Thread(target=signs.exchange, args=(stop,), daemon=True, name="watch")
    thread.start()
    try:
        yield
        signs.finished = True
    finally:
        stop.set()
        thread.join(2 * PERIOD)


class _Signs:
    """Counters in the store of the rendezvous, one per process.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: int) -> None:
        self.rank, self.others = int(os.environ["RANK"]), [k for k in range(processes) if k != int(os.environ["RANK"])]
        self.finished, self.parent = False, os.getppid()
        run = f"{os.environ.get('TORCHELASTIC_RUN_ID')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=LIMIT),
            wait_for_workers=False,
        )
        self.store = dist.PrefixStore(f"mmdiff/{run}", store)
        self.seen = {k: (0, time.monotonic()) for k in self.others}

    def exchange(self, stop: threading.Event) -> None:
        """Until the run ends: one sign per period, and a look at the others'."""
        while not stop.wait(PERIOD):
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
                _end("the launcher of this process is gone")
            with self._store_or_end(stop):
                self.store.add(str(self.rank), 1)
                for k in self.others:
                    self._look(k)
        with contextlib.suppress(RuntimeError):
            self.store.add(str(self.rank), _FINISHED if self.finished else 0)

    def _look(self, k: int) -> None:
        sign, now = self.store.add(str(k), 0), time.monotonic()
        before, when = self.seen[k]
        if sign != before:
            self.seen[k] = sign, now
        elif sign < _FINISHED and now - when > LIMIT:
            _end(f"process {k} of this run has given no sign of life for {LIMIT:.0f} s")

    @contextlib.contextmanager
    def _store_or_end(self, stop: threading.Event) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # of torch's stores
            if not stop.is_set():
                _end("the first process of this run, or its launcher, is gone")


def _end(why: str) -> None:
    print(f"mmdiff: {why}; train.resume=auto continues", file=sys.stderr, flush=True)
    os._exit(1)
