"""The documentation site: pages, examples and notebooks that run, a reference, MathML equations.

Examples and notebooks are kept between builds, and run again when they change. The variable
``ADJOINTBACKMAP_DOCS_RUN=0`` of the environment builds the site without running them.
"""

import builtins
import os
import re
import sys
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as UnsortedStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.math import get_node_equation_number

import adjointbackmap
from adjointbackmap.cli import app
from adjointbackmap.explorer.export import exported
from adjointbackmap.explorer.session import Session

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for drawings.py
RUN = os.environ.get("ADJOINTBACKMAP_DOCS_RUN", "1") != "0"
# The explorer on the first page: units of one layer, as many channels as fit.
EXPLORED = "conv3"
EXPLORED_CHANNELS = 8
EXPLORER_BYTES = 4_500_000 if RUN else 1_200_000

project = "adjointbackmap"
author = "The adjointbackmap developers"
version = release = adjointbackmap.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "gallery", "examples/*.ipynb", "examples/*.py", "**/.*"]
nitpicky = True  # every cross-reference must lead somewhere, but for names of other libraries
nitpick_ignore_regex = [
    ("py:attr", ".*"),  # attributes are listed with their class and are no targets
    ("py:.*", "|".join(dir(builtins))),
    (
        "py:.*",
        r"(torch|numpy|np|xarray|scipy|matplotlib|collections|pathlib|os|typing|jaxtyping)\..*",
    ),
    ("py:.*", "Any|Axes|Callable|Figure|Iterator|LinearOperator|Path|PathLike|Sequence|Tensor"),
    ("py:.*", r"'.*'|.*\*.*"),  # shapes
    ("py:class", "ExplorerWidget"),  # a widget, which docs/explorer.md describes
    # parts of the engine, which the reference does not list
    ("py:.*", r"adjointbackmap\.(capture|files|rules)\..*"),
    ("py:.*", r"adjointbackmap\.engine\.(observe|program|rounding)\..*"),
    ("py:.*", r"adjointbackmap\.(exactness\.journal|planes\.manifest)\..*"),
    ("py:.*", r"adjointbackmap\.analysis\.crossings\.P\b.*"),
]
# Made pages have sections of the third level under their title; cells that are not run have no
# language.
suppress_warnings = ["myst.header", *([] if RUN else ["myst-nb.lexer"])]

html_theme = "furo"
html_title = "adjointbackmap"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_static_path = ["style", str(files("ziamath") / "fonts")]  # with STIX Two Math
html_css_files = ["site.css"]
html_math_renderer = "mathml"
smartquotes_action = "D"  # only dashes, between a parameter and its description; no quotes

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks: one that changes runs again; the others come from the cache beside the built site.
nb_execution_mode = "cache" if RUN else "off"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of libraries, with paths of the machine

copybutton_exclude = ".linenos, .gp, .go"  # no prompts, no outputs

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

linkcheck_ignore = [r"https://doi\.org/"]  # publishers refuse programs

bibtex_bibfiles = ["bibliography.bib"]
bibtex_default_style = "keys"

# In pages and docstrings a citation is plain text, such as [Wan2022, eq. 3.6]. Here it becomes a
# link.
KEYS = "|".join(re.findall(r"^@\w+\{(\w+),", (HERE / "bibliography.bib").read_text(), re.MULTILINE))
CITATION = re.compile(rf"\[({KEYS})(?:,\s+([^\]]+))?\](?!\()")


sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["examples"],  # written by the build, not committed
    "filename_pattern": r"\.py$",
    "plot_gallery": RUN,
    "within_subsection_order": "drawings.Order",
    "image_scrapers": ["matplotlib", "drawings.save_drawing"],
    "ignore_repr_types": "Drawing|matplotlib",
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
}


class KeyLabels(BaseLabelStyle):
    """The label of an entry is its key."""

    def format_labels(self, sorted_entries):
        """The labels of some entries."""
        return (entry.key for entry in sorted_entries)


class KeyStyle(UnsortedStyle):
    """Entries by their keys."""

    default_label_style = KeyLabels
    default_sorting_style = "author_year_title"


def cited(text, role):
    """Turn the citations of a text into links, with a role of its markup."""

    def link(match):
        place = f"{{{' '.join(match[2].split())}}}" if match[2] else ""
        return f"{role}`{match[1]}{place}`"

    return CITATION.sub(link, text)


def outside_of_code(text, pattern, by):
    """Replace the matches of a pattern in a text, except between backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(pattern, by, part) for part in parts[::2]]
    return "`".join(parts)


def command_line():
    """The help of every command as Markdown; options in the text become code."""
    with patch("sys.argv", ["adjointbackmap"]):  # usage lines begin with this name
        made = app.generate_docs("markdown")
    return outside_of_code(made[made.index("**Commands**") :], r"--[a-z][a-z0-9-]*", r"`\g<0>`")


def prepare_page(sphinx, page, source):
    """Link the citations of a page, and add the help of the commands to its page."""
    markdown = sphinx.env.doc2path(page).suffix == ".md"
    source[0] = cited(source[0], "{cite:p}" if markdown else ":cite:p:")
    if page == "reference/command-line":
        source[0] += command_line()


def prepare_summary(sphinx, what, name, obj, options, lines):
    """Keep napoleon from reading a property's summary with a colon as ``type: text``."""
    if what == "property":
        lines.insert(0, "\\ ")


def prepare_docstring(sphinx, what, name, obj, options, lines):
    """Link the citations of a docstring, and escape bars and stars.

    They are no markup in sums of |x h| or in shapes such as 'n *units'.
    """
    text = cited("\n".join(map(plain, lines)), ":cite:p:")
    lines[:] = text.split("\n")


def plain(line):
    """Escape bars and stars of a line, except in code and formulas."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    return outside_of_code(line, r"[|*]" if line.startswith(":vartype") else r"\|", r"\\\g<0>")


def hide_construction(sphinx, what, name, obj, options, signature, returns):
    """Hide the arguments of a class that only the library constructs.

    Such a class has neither ``Args`` nor an example of its construction in its docstring.
    """
    text = obj.__doc__ or ""
    made_by_users = what != "class" or "Args:" in text or f"{obj.__name__}(" in text
    return (signature, returns) if made_by_users else ("", None)


def show_whole_signature(sphinx, obj, bound):
    """Show one signature with all arguments; overloads are for type checkers."""
    if obj.__module__.startswith("adjointbackmap"):
        source = ModuleAnalyzer.for_module(obj.__module__)
        source.analyze()
        source.overloads.clear()


def find_by_last_name(sphinx, env, node, content):
    """Find a name without its module if the reference lists it under another module."""
    if node.get("refdomain") != "py" or "." in node["reftarget"]:
        return None
    node["refspecific"] = True
    python = env.domains.python_domain
    return python.resolve_xref(
        env, node["refdoc"], sphinx.builder, node["reftype"], node["reftarget"], node, content
    )


def mend_links_to_reference(sphinx, page, template, context, doctree):
    """Mend the links from a module's source to the reference.

    viewcode assumes that the reference lists all names under their module. Some are listed under
    the package.
    """
    module = page.removeprefix("_modules/").replace("/", ".")
    if page.startswith("_modules/adjointbackmap/"):
        shown = sphinx.env.domains.python_domain.objects

        def shown_name(match):
            name = match[1].removeprefix(module).removeprefix("adjointbackmap")
            possible = (match[1], module + name, "adjointbackmap" + name)
            listed = next((each for each in possible if each in shown), match[1])
            return f'#{listed}"'

        context["body"] = re.sub(r'#(adjointbackmap\.[\w.]+)"', shown_name, context["body"])


def inline_equation(self, node):
    """Write an equation in a line as MathML, which browsers draw without a script.

    Raises:
        SkipNode: Always, since the node is finished.
    """
    self.body.append(tex2mathml(node.astext()))
    raise SkipNode


def block_equation(self, node):
    """Write an equation on its own line as MathML, with its number.

    Raises:
        SkipNode: Always, since the node is finished.
    """
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    formula = tex2mathml(node.astext(), as_block=True)
    self.body.append(f'<div class="formula">{formula}</div></div>\n')
    raise SkipNode


def make_explorer(sphinx, error):
    """Write the explorer that the first page shows: one file, a few channels of each layer."""
    path = Path(sphinx.outdir) / "_static" / "explorer.html"
    if error is not None or sphinx.builder.format != "html" or path.is_file():
        return
    page, _ = exported(Session(), EXPLORED, EXPLORER_BYTES, EXPLORED_CHANNELS)
    path.write_text(page)


def setup(sphinx):
    """Register the functions of this file."""
    register_plugin("pybtex.style.formatting", "keys", KeyStyle)
    sphinx.add_html_math_renderer("mathml", (inline_equation, None), (block_equation, None))
    sphinx.connect("source-read", prepare_page)
    sphinx.connect("autodoc-process-docstring", prepare_summary, priority=400)  # before napoleon
    sphinx.connect("autodoc-process-docstring", prepare_docstring, priority=600)  # after it
    sphinx.connect("autodoc-before-process-signature", show_whole_signature)
    sphinx.connect("autodoc-process-signature", hide_construction)
    sphinx.connect("html-page-context", mend_links_to_reference)
    sphinx.connect("missing-reference", find_by_last_name)
    sphinx.connect("build-finished", make_explorer)
    return {"parallel_read_safe": True}
