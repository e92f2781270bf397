"""Results files: markdown whose sections are replaced one at a time, between markers."""

import os
import platform
import re
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
CACHE = Path(__file__).parent / ".cache"  # trained flows and references
_SECTION = re.compile(r"<!-- ([\w-]+) -->\n(.*?)\n<!-- end -->\n?", re.DOTALL)


def show(lines: list[str], line: str) -> None:
    """Print a line and keep it for the results file."""
    print(line, flush=True)
    lines.append(line)


def write_section(path: Path, name: str, lines: list[str]) -> None:
    """Replace the section ``name`` of a results file, or append it; everything else stays, and no half file appears.

    Args:
        path: the file; made if there is none.
        name: letters, digits, ``_`` and ``-``.
        lines: the section's new text.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"a section's name expects letters, digits, '_' and '-', got {name!r}")
    text = path.read_text() if path.exists() else ""
    section = f"<!-- {name} -->\n" + "\n".join(lines).strip("\n") + "\n<!-- end -->\n"
    if name in read_sections(path):
        text = _SECTION.sub(lambda match: section if match[1] == name else match[0], text)
    else:
        text = f"{text.rstrip()}\n\n{section}".lstrip()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_sections(path: Path) -> dict[str, str]:
    """The sections of a results file by name."""
    return dict(_SECTION.findall(path.read_text())) if path.exists() else {}


def machine(*packages: str) -> str:
    """One line: processor, Python, and the versions of ifpyro, torch and of the packages named."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = model[1]
    versions = [f"Python {platform.python_version()}"]
    for name in ("ifpyro", "torch", *packages):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    return f"{cpu}, one core; {', '.join(versions)}."
