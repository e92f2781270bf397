"""Ctrl-C at a chosen moment."""

from ifpyro.training import loop


def interrupt_at(monkeypatch, call, name="velocity_loss"):
    """Ctrl-C inside the given call of a function of the training loop."""
    original, calls = getattr(loop, name), []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, name, interrupted)
