"""A side of a comparison in a process of its own: what it sets for its process, such as its allocator, stays with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch


class Apart:
    """What `make(*arguments)` gives, called in another process with as many threads; a context, which ends it.

    `make` must be a module's own, and the arguments such as can be pickled.

    Raises:
        RuntimeError: the other process has ended; what was wrong, it has written.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object):
        spawning = get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, torch.get_num_threads(), make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.used = 0.0

    def __call__(self) -> None:
        try:
            self.pipe.send("again")
            self.used = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the other side's process has ended") from error

    def processor_time(self) -> float:
        """Seconds of processor time that the process has taken up to the last call's end; there must have been one, for making
        things takes time, too."""
        assert self.used, "a first call warms up"
        return self.used

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, threads: int, make: Callable[..., Callable[[], object]], arguments: tuple) -> None:
    """Calls what is made as often as it is asked to, and answers with the process's time, until the other end is closed."""
    torch.set_num_threads(threads)
    step = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        step()
        pipe.send(time.process_time())
