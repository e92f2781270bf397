"""Errors of this library, under one base, so that ``except ifpyro.IfpyroError`` catches them and nothing else."""


class IfpyroError(Exception):
    """The base of the errors that this library defines.

    Example:
        >>> try:
        ...     ifpyro.SMC(lambda: None, progress=False).run()
        ... except ifpyro.IfpyroError as error:
        ...     print(type(error).__name__)
        ...
        ModelError
    """


class ModelError(IfpyroError, ValueError):
    """The model cannot be sampled from, for a reason that the message names.

    Example:
        >>> issubclass(ifpyro.ModelError, ifpyro.IfpyroError), issubclass(ifpyro.ModelError, ValueError)
        (True, True)
    """


class BatchingError(IfpyroError, RuntimeError):
    """The model cannot be run for many draws at once in the way that was tried.

    Args:
        message: What differs, and where.
        site: The site that shows it, if one does.

    Example:
        >>> error = ifpyro.BatchingError("the shapes of 'y' differ", site="y")
        >>> error.site
        'y'
    """

    def __init__(self, message: str, site: str | None = None):
        super().__init__(message)
        self.site = site


class PoolError(IfpyroError, RuntimeError):
    """A process has lost touch with the others of its pool.

    Example:
        >>> issubclass(ifpyro.PoolError, RuntimeError)
        True
    """


class ConvergenceWarning(UserWarning):
    """Draws that may not be trusted, for reasons that the message names with what to do about them.

    ``warnings.filterwarnings("ignore", category=ifpyro.ConvergenceWarning)`` silences it; ``result.converged`` and
    ``result.diagnostics()`` of a sampler say the same.
    """
