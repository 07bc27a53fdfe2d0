"""Renders the pages and cards that the package writes, Jinja templates in `metamorph/templates/`."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **values: Any) -> str:
    """Render a template such as `data_check.html.jinja`; only HTML is escaped. A name without a value is an error."""
    environment = Environment(
        loader=PackageLoader("metamorph"),
        autoescape=select_autoescape(["html.jinja"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
