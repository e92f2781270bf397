"""Sphinx: pages in Markdown, the reference from docstrings, the tutorials from the committed notebooks as they are."""

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "ifpyro"
author = "ifpyro contributors"
copyright = "ifpyro contributors, Apache-2.0"
release = version = runpy.run_path(str(ROOT / "src/ifpyro/core/version.py"))["__version__"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
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
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def _copied(source: Path, target: Path, suffixes: tuple[str, ...]) -> None:
    """Bring files of one folder, and its pictures, into another, where Sphinx finds them."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix in suffixes:
            shutil.copy2(file, target / file.name)
    if (source / "pictures").is_dir():
        shutil.copytree(source / "pictures", target / "pictures", dirs_exist_ok=True)


# Formulas become MathML, which browsers render themselves: no script, nothing fetched from elsewhere.
html_math_renderer = "mathml"


def _mathml(latex: str, display: str) -> str:
    spaced = re.sub(r"\\(sin|cos|tan|arctan|log|exp)(?=[ \\])", r"\\\1\\,", latex)
    found = str(convert(spaced, display=display))
    if "<mi>&</mi>" in found:
        raise ValueError(f"a formula expects LaTeX that latex2mathml knows, got {latex!r}; write it otherwise")
    return found


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math" style="overflow-x:auto">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the formulas' renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


# What lives elsewhere in the repository and is read in the site: copied before each build, never edited here.
_copied(ROOT / "tutorials", HERE / "tutorials", (".ipynb",))
_copied(ROOT / "benchmarks", HERE / "benchmarks", (".md",))
for _page in (HERE / "benchmarks").glob("*.md"):  # results files begin with a section where nobody wrote a title
    if not re.search(r"^# ", _page.read_text(), re.MULTILINE):
        _page.write_text(f"# {_page.stem.capitalize()}\n\n{_page.read_text()}")
runpy.run_path(str(HERE / "reference/make.py"), run_name="__main__")
