"""A worker process: does jobs that ``processes.py`` sends, one at a time, and ends at once when the driver is gone.

Started by path, with the number of a connected socket; nothing but the standard library is imported before the driver
has told where to look. Messages, pickled, only between these two processes:

    from the driver    sys.path; the work; then jobs, in any number; END: drop those not begun, finish, exit
    from here          (HERE, None); (READY, None) when the work is opened; then (RESULT, value) or (ERROR, exception)
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

HERE, READY, RESULT, ERROR = "here", "ready", "result", "error"
END = b"end"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(descriptor: int) -> None:
    """Serve the driver at the other end of the socket ``descriptor``. Does not return."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the driver decides what a signal means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    connection = Connection(descriptor)
    try:
        connection.send((HERE, None))
        _serve(connection)
    except (EOFError, OSError):  # the driver is gone
        os._exit(1)


def _serve(connection: Connection) -> None:
    """Jobs run in a thread of their own, so that this one always listens."""
    sys.path[:] = connection.recv()
    pool = ThreadPoolExecutor(max_workers=1)
    opening = pool.submit(ForkingPickler.loads, connection.recv_bytes())
    opening.add_done_callback(partial(_opened, connection))
    queued: list[Future[Any]] = []
    while True:
        message = connection.recv_bytes()
        if message == END:
            for future in queued:
                future.cancel()
            pool.submit(os._exit, 0)
            continue
        future = pool.submit(_done, opening, message)
        future.add_done_callback(partial(_answer, connection))
        queued = [*(other for other in queued if not other.done()), future]


def _done(opening: Future[Any], message: bytes) -> Any:
    """The answer to a job, pickled here: what cannot be pickled is an error like any other."""
    return ForkingPickler.dumps((RESULT, opening.result()(ForkingPickler.loads(message))))


def _opened(connection: Connection, opening: Future[Any]) -> None:
    error = opening.exception()
    _send(connection, ForkingPickler.dumps((READY, None) if error is None else (ERROR, _portable(error))))
    if error is not None:
        os._exit(1)


def _answer(connection: Connection, future: Future[Any]) -> None:
    if future.cancelled():
        return
    error = future.exception()
    _send(connection, future.result() if error is None else ForkingPickler.dumps((ERROR, _portable(error))))


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send_bytes(message)
    except OSError:  # the driver is gone
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """``error``, fit to be raised by the driver: one of our tree as it is, any other with what led to it."""
    from llm_quantize.errors import LlmQuantizeError

    if isinstance(error, LlmQuantizeError):
        return error
    if type(error).__module__ != "builtins":
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    error.add_note("in a worker process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
