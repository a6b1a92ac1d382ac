"""Sphinx configuration: ``sphinx-build -W -b html docs build/docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sharded_ema.version import __version__

project = "sharded-ema"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["benchmarks"]
html_theme = "furo"
html_title = f"sharded-ema {release}"
html_static_path = ["_static"]
html_css_files = ["width.css"]
# Prompts are no part of what is copied.
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 70
