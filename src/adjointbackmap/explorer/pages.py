"""The explorer's page as one text, with its style and its modules inside."""

import base64
import json
import re
from pathlib import Path

MOST_BYTES = 20 * 2**20  # of an upload
STATIC = Path(__file__).parent / "static"
# In the order of their imports: a module comes after those that it reads.
MODULES = (
    *("frame", "net", "state", "draw", "network", "words", "unit", "others", "whatif", "take"),
    "main",
)
# What goes wrong where a question does not fit; the page shows the message.
REFUSED = (ValueError, TypeError, RuntimeError, OSError, ImportError)
# Of a page in a notebook: the kernel answers it.
IN_NOTEBOOK = '<meta name="answers" content="kernel">'


def one_file(answers: str) -> str:
    """The page with its style and its modules.

    Args:
        answers: HTML that says where the answers are; it comes before the modules.
    """
    html = (STATIC / "index.html").read_text()
    style = (STATIC / "style.css").read_text()
    urls = {f"explorer/{name}": _url(_module(name)) for name in MODULES}
    scripts = (
        f'<script type="importmap">{json.dumps({"imports": urls})}</script>\n'
        f"{answers}\n"
        '<script type="module">import "explorer/main";</script>'
    )
    html = re.sub(r"<link rel=\"stylesheet\".*>", lambda _: f"<style>{style}</style>", html)
    return re.sub(r"<script type=\"module\".*</script>", lambda _: scripts, html)


def _module(name: str) -> str:
    """A module whose imports are found by the page's import map."""
    text = (STATIC / f"{name}.js").read_text()
    return re.sub(r'"\./(\w+)\.js"', r'"explorer/\1"', text)


def _url(text: str) -> str:
    encoded = base64.b64encode(text.encode()).decode()
    return f"data:text/javascript;base64,{encoded}"
