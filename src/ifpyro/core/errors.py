"""Errors of this library, under one base."""


class BatchingError(RuntimeError):
    """The model cannot be run for many draws at once in the way that was tried."""

    def __init__(self, message: str, site: str | None = None):
        super().__init__(message)
        self.site = site


class ModelError(ValueError):
    """The model cannot be sampled from, for a reason that the message names."""
