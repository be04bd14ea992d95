"""The report as Markdown and as a page of one file: no scripts, and nothing from a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image, ImageOps

_SHEET_SIDE = 1600  # pixels that an image of the page has at most

_MARKDOWN = """\
# {{ title }}

{% for finding in findings %}
**{{ finding.verdict }}.** {{ finding.evidence }}

Next: {{ finding.advice }}

{% endfor %}
{% for name, link in links.items() %}
![{{ name }}]({{ link | urlencode }})

{% endfor %}
{% for table in tables %}
## {{ table.title }}

| {{ table.head | map("cell") | join(" | ") }} |
|{% for _ in table.head %}---|{% endfor %}

{% for row in table.rows %}
| {{ row | map("cell") | join(" | ") }} |
{% endfor %}

{% if table.note %}
{{ table.note }}

{% endif %}
{% endfor %}
"""

_HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
svg, img { max-width: 100%; height: auto; }
section { border-left: 4px solid #d9730d; padding: 0 1rem; margin: 1rem 0; }
section.good { border-color: #3a9b5c; }
section.unknown { border-color: #7a7a7b; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #7a7a7b55; }
td { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% for finding in page.findings %}
<section class="{{ finding.verdict | replace(" ", "-") }}">
<p><strong>{{ finding.verdict }}.</strong> {{ finding.evidence }}</p>
<p>Next: {{ finding.advice }}</p>
</section>
{% endfor %}
{{ curves | safe }}
{% for name, file in page.images.items() %}
<h2>{{ name }}</h2>
<img src="{{ file | embed }}" alt="{{ name }}">
{% endfor %}
{% for table in page.tables %}
<h2>{{ table.title }}</h2>
<div><table>
<tr>{% for each in table.head %}<th>{{ each }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for each in row %}<td>{{ each | number }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if table.note %}
<p>{{ table.note }}</p>
{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    """What is to be known of it."""


@dataclass(frozen=True)
class Page:
    """What a report shows, from top to bottom."""

    title: str
    findings: Sequence[Mapping[str, str]]
    images: Mapping[str, Path]
    """Files by their titles."""
    tables: Sequence[Table]

    def to_markdown(self, folder: Path) -> str:
        """Return the report as Markdown, with links from a folder to the images, which are in it."""
        links = {title: file.relative_to(folder).as_posix() for title, file in self.images.items()}
        template = _environment(autoescape=False).from_string(_MARKDOWN)
        return template.render(title=self.title, findings=self.findings, links=links, tables=self.tables)

    def to_html(self, curves: str) -> str:
        """Return the report as a page that holds everything that it shows; `curves` is an SVG element."""
        return _environment(autoescape=True).from_string(_HTML).render(page=self, curves=curves)


def _environment(autoescape: bool) -> Environment:
    environment = Environment(autoescape=autoescape, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "embed": _embed, "cell": _cell}
    return environment


def _embed(file: Path) -> str:
    """Return an image file as the address of its own content."""
    with Image.open(file) as image:
        small = ImageOps.contain(image.convert("RGB"), (_SHEET_SIDE, 4 * _SHEET_SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _cell(value: Any) -> str:
    return _number(value).replace("|", r"\|").replace("\n", " ")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
