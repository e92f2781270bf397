"""``python -m ifpyro``: the command line, for launchers that start modules."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
