"""The pages and cards that the package writes: Jinja templates in `metamorph/templates/`."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **values: Any) -> str:
    """Fill a template; values are escaped in `*.html.jinja` and stand as they are in all others.

    Args:
        template: File name, for example `data_check.html.jinja`.
        values: What the template names. A name without a value is an error, not an empty string.
    """
    environment = Environment(
        loader=PackageLoader("metamorph"),
        autoescape=select_autoescape(["html.jinja"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
