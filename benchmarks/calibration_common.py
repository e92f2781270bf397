"""What the calibration benchmarks share: one results file, whose tables grow row by row."""

from pathlib import Path

from results import read_sections, write_section

RESULTS = Path(__file__).parent / "calibration.md"
HEADER = (
    "# Calibration, measured\n\nWritten by `python benchmarks/calibration_sbc.py`, `calibration_weights.py`, "
    "`calibration_patients.py` and `calibration_latent.py`; one core, seeds in the tables.\n"
)


def write(name: str, lines: list[str]) -> None:
    """Replace a section."""
    if not RESULTS.exists():
        RESULTS.write_text(HEADER)
    write_section(RESULTS, name, lines)


def write_rows(name: str, above: list[str], rows: list[str], order: list[str]) -> None:
    """Put rows into the table of a section; a row takes the place of the one with the same first two cells.

    Args:
        name: of the section.
        above: what stands above the rows.
        rows: new ones.
        order: first cells of the table in their order; equal ones are in the alphabetical order of the second.
    """
    old = [line for line in read_sections(RESULTS).get(name, "").splitlines() if line.startswith("|")][2:]
    table = {_key(row): row for row in [*old, *rows]}
    kept = sorted(table, key=lambda key: (order.index(key[0]), key[1].casefold()))
    write(name, [*above, *(table[key] for key in kept)])


def _key(row: str) -> tuple[str, str]:
    first, second = (cell.strip() for cell in row.split("|")[1:3])
    return first, second
