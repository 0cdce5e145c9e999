"""Sphinx configuration: `make docs` builds the site into docs/_build, without network access."""

from sphinx.ext.napoleon import GoogleDocstring

import likewise

# A docstring under a field is prose: "Column of splits: train, val or test." is not "type: description".
GoogleDocstring._parse_attribute_docstring = lambda self: self._consume_to_end()

project = "likewise"
author = "the likewise authors"
copyright = "the likewise authors, Apache-2.0"  # noqa: A001  # the name that Sphinx reads
version = release = likewise.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # single backquotes in docstrings are code, as in Markdown

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = "likewise"
html_show_sourcelink = False
html_sidebars = {"index": [], "api": [], "changelog": []}
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
