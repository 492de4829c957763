"""The site, made by Sphinx from the same Markdown that GitHub shows: make docs."""

import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

project = "rwkv_pl"
author = "The rwkv_pl contributors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["__pycache__"]

html_theme = "furo"
html_title = "rwkv_pl"
html_copy_source = html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "font-stack": "system-ui, sans-serif",
        "color-brand-primary": "#0969da",
        "color-brand-content": "#0969da",
    },
    "dark_css_variables": {
        "color-brand-primary": "#58a6ff",
        "color-brand-content": "#58a6ff",
    },
}
pygments_style, pygments_dark_style = "friendly", "github-dark"
# Formulas as SVG by one local file: a page fetches neither fonts nor scripts from elsewhere.
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
html_static_path = [str(distribution("sphinx-mathjax-offline").locate_file(MATHJAX))]
mathjax_path = "tex-svg.js"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"

PICTURE = re.compile(
    r'<picture>.*?<img alt="([^"]*)" src="([^"]*)_light\.png".*?</picture>',
    flags=re.DOTALL,
)
SHADES = "\n\n".join(
    f"```{{image}} \\2_{shade}.png\n:alt: \\1\n:class: only-{shade}\n```"
    for shade in ("light", "dark")
)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")
FOLDER = Path(__file__).parent


def adapt_to_site(app: Any, name: str, source: list[str]) -> None:
    """Replace what only GitHub can show: pictures in two shades, and links to files outside docs/, now downloads."""

    def link(found: re.Match[str]) -> str:
        path = (FOLDER / name).parent / found[2]
        if path.resolve().is_relative_to(FOLDER):
            return found[0]
        label = found[1].replace("`", "")
        return f"{{download}}`{label} <{found[2]}>`" if path.is_file() else found[1]

    source[0] = OUTSIDE.sub(link, PICTURE.sub(SHADES, source[0]))


def setup(app: Any) -> None:
    app.connect("source-read", adapt_to_site)
