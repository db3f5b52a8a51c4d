"""The templates of the reports, all read in one way: what comes from models and files is escaped, a missing word is
an error.
"""

from __future__ import annotations

import jinja2


def template_of(name: str) -> jinja2.Template:
    """The file ``name`` of ``reports/templates``. Raises jinja2.TemplateNotFound where there is none."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llm_quantize.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
