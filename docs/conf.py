"""Sphinx: pages in Markdown, the reference from docstrings, the tutorials from the committed notebooks as they are."""

import runpy
import shutil
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "ifpyro"
author = "ifpyro contributors"
copyright = "ifpyro contributors, Apache-2.0"
release = version = runpy.run_path(str(ROOT / "src/ifpyro/core/version.py"))["__version__"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "pictures"]
html_theme = "furo"
html_title = "ifpyro"
html_static_path: list[str] = []
html_extra_path: list[str] = []
html_theme_options = {
    "source_repository": "https://github.com/ifpyro/ifpyro/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay short; each argument's clause says what it is
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autosummary_generate = True
# Roles in docstrings name modules that the reference does not list; they are shown as code.
nitpicky = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def _copied(source: Path, target: Path, suffixes: tuple[str, ...]) -> None:
    """Bring files of one folder, and its pictures, into another, where Sphinx finds them."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix in suffixes:
            shutil.copy2(file, target / file.name)
    if (source / "pictures").is_dir():
        shutil.copytree(source / "pictures", target / "pictures", dirs_exist_ok=True)


# What lives elsewhere in the repository and is read in the site: copied before each build, never edited here.
_copied(ROOT / "tutorials", HERE / "tutorials", (".ipynb",))
_copied(ROOT / "benchmarks", HERE / "benchmarks", (".md",))
runpy.run_path(str(HERE / "reference/make.py"), run_name="__main__")
