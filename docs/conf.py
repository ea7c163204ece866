"""Configuration of the documentation site: `make docs` builds it with warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from gear_lightning import __version__  # noqa: E402

project = "gear_lightning"
author = "the gear_lightning authors"
copyright = "2026, the gear_lightning authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.mermaid",
    "command_line",  # docs/_ext
    "code_blocks",
]
exclude_patterns = ["_build", "runs", "evidence/**"]  # reports are included by evidence_tables
source_suffix = {".md": "markdown"}
nitpicky = False  # types of third parties have no inventory offline

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # Lightning's are written for its own site
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "code"  # docstrings name code in single backticks

html_theme = "furo"
html_title = f"gear_lightning {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
linkcheck_ignore = [r"^\.\./"]


def _plain_bars(app, what, name, obj, options, lines):
    """``|A|`` in a docstring is an absolute value, and no substitution."""
    lines[:] = [line.replace("|", "\\|") if line.count("|") > 1 and "``" not in line else line for line in lines]


def setup(app):
    """Connect the above."""
    app.connect("autodoc-process-docstring", _plain_bars)
