"""Messages to the user: warnings that point at the user's own call, and the user's line that an error came from."""

import linecache
import sys
import warnings
from types import TracebackType

_LIBRARIES = frozenset({"ifpyro", "torch", "pyro", "contextlib", "functools"})


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, from the first line on the way here that belongs to no library.

    Args:
        message: What is said; the library's name is put before it.
        category: The kind of warning, by which users silence it.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"ifpyro: {message}", category, stacklevel=level)


def users_line(traceback: TracebackType | None) -> str | None:
    """The last line of a traceback that belongs to no library, as ``file:number: code``; None if there is none."""
    found = None
    while traceback is not None:
        frame = traceback.tb_frame
        if _package(frame.f_globals) not in _LIBRARIES:
            found = (frame.f_code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    if found is None:
        return None
    code = linecache.getline(*found).strip()
    return f"{found[0]}:{found[1]}" + (f": {code}" if code else "")


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).split(".")[0]
