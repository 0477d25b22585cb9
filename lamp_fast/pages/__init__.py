"""What our HTML pages have in common: how templates are read, and ``style.css.jinja``."""

from pathlib import Path
from typing import Any

import jinja2


def page_environment(page: str, **filters: Any) -> jinja2.Environment:
    """What reads the templates of a page: they escape what they are given, and may include
    ``style.css.jinja``.

    Args:
        page: the module that makes the page, as its ``__file__``; templates lie beside it.
        filters: by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(page).parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment
