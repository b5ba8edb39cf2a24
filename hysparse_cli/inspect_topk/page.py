"""An inspection as one HTML page that needs nothing else: page.html with the JSON inside."""

import html
import json
from importlib.resources import files

from hysparse_cli.inspect_topk.result import Inspection

DATA, TITLE = "__DATA__", "__TITLE__"


def as_page(found: Inspection) -> str:
    """The page. It draws the object that ``as_json`` gives, which it holds as it is."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(found.as_json(), ensure_ascii=False).replace("<", "\\u003c")
    return template.replace(TITLE, html.escape(found.checkpoint)).replace(DATA, data)
