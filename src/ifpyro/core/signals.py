"""Ctrl-C that waits for a good moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Asked:
    """Whether Ctrl-C has come: true once it has."""

    def __init__(self) -> None:
        self.came = False

    def __bool__(self) -> bool:
        return self.came


@contextmanager
def interrupt_noted() -> Iterator[Asked]:
    """Note the first Ctrl-C in the block instead of raising it; a second one raises ``KeyboardInterrupt`` at once.

    Work that looks at what is yielded between its steps ends with its state whole. Outside the main thread, and where
    somebody else handles Ctrl-C already, nothing changes.
    """
    asked = Asked()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
