"""Settings of the documentation's site. It is built offline: ``sphinx-build docs docs/_build``."""

import sys
from pathlib import Path

import dask_imgread

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "dask_imgread"
release = version = dask_imgread.__version__
extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser"),
    *("command_line", "docstrings", "links"),  # of the folder _extensions
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = True
smartquotes = False
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 4  # the same as GitHub's

autodoc_typehints = "none"  # they are in the lists of parameters
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # autodoc shows them

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_sidebars = {page: [] for page in ("index", "getting_started", "contributing", "changelog")}
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}
