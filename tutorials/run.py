"""Execute the tutorials: every ``tutorials/*.py`` in percent format becomes an executed notebook beside it.

``IFPYRO_SMOKE=1`` asks the tutorials for a short run and leaves the committed notebooks as they are.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def main() -> None:
    """Run the tutorials named on the command line, or all."""
    smoke = os.environ.get("IFPYRO_SMOKE") == "1"
    for script in sorted(FOLDER.glob("[0-9]*.py")):
        if sys.argv[1:] and not any(name in script.name for name in sys.argv[1:]):
            continue
        start = time.perf_counter()
        notebook = jupytext.read(script)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
        if not smoke:
            for cell in notebook.cells:  # warnings name the folders of the machine that ran the notebook
                if cell.cell_type == "code":
                    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
