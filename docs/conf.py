"""The book: the collection as a site (`make book`). The source folder is the repository, so that every link that works
there works here; nothing is executed, and nothing is fetched, neither to build the site nor to read it."""

project = "Activation sparsity, reproducible"
author = "the activation-sparsity-notebooks authors"
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docs.book",
]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "results", "figures", "tests", "sparsity_utils", "kernels"]  # not walked through

nb_execution_mode = "off"
nb_ipywidgets_js: dict = {}  # they come from a CDN
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "alphabetical"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

smartquotes = False  # they make a dash of the two hyphens of an option

html_theme = "pydata_sphinx_theme"
html_title = project
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": [],
    "footer_center": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_show_search_summary = False  # it is fetched, which a file:// address does not allow
