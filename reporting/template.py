"""The pages, as jinja2 templates. In a module and not in ``.html`` files, which a Flower app bundle would leave behind."""

# ruff: noqa: E501  (markup and style sheets read better in their own line breaks)
from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f4f0; --surface: #ffffff; --ink: #1c2127; --muted: #626b76; --grid: #e6e5df; --line: #dddbd3; --wait: #d9d6cc;
  --blue: #0072b2; --orange: #e69f00; --green: #009e73; --red: #d55e00; --purple: #b8629a; --sky: #56b4e9; --yellow: #d8c93a;
  --good: #00795a; --bad: #b34700; --soft: #eef3f6; --warn: #fff6e0; --warn-line: #e6c77a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --surface: #1a1e25; --ink: #e7e9ec; --muted: #98a2ae; --grid: #2a303a; --line: #2e3540; --wait: #3b424e;
    --blue: #4aa8e0; --orange: #e8ad33; --green: #2fbf94; --red: #ee7a35; --purple: #d58bbb; --sky: #86cdf5; --yellow: #f0e442;
    --good: #2fbf94; --bad: #ee7a35; --soft: #202731; --warn: #2b2617; --warn-line: #6b5a22;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 34px; }
h1 { font-size: 27px; line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h1 small { font-weight: 400; color: var(--muted); font-size: 20px; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 0 0 2px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 4px 0 10px; }
.sub { color: var(--muted); margin: 6px 0 0; }
.badge { display: inline-block; font-size: 12px; font-weight: 600; border-radius: 99px; padding: 2px 11px; vertical-align: 4px; margin-left: 10px;
  color: var(--good); border: 1px solid currentColor; }
.badge.bad { color: var(--bad); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 0; font-size: 13px; }
nav a, a { color: var(--blue); text-decoration: none; }
nav a:hover, a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 12px; margin: 20px 0; }
.card, section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 14px 18px 13px; }
.card .name { color: var(--muted); font-size: 12.5px; }
.card .value { font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.card .more { color: var(--muted); font-size: 12.5px; }
section { padding: 20px 22px 18px; margin: 0 0 16px; scroll-margin-top: 12px; }
.note { color: var(--muted); font-size: 13px; margin: 6px 0 0; max-width: 92ch; }
figure { margin: 10px 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 680px; height: auto; }
figure svg text { font-family: inherit !important; }
.tip { cursor: default; } .tip:hover { filter: brightness(1.25); }
.warnings { background: var(--warn); border-color: var(--warn-line); }
.warnings ul { margin: 6px 0 0; padding-left: 20px; }
.warnings li { overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 560px; margin-top: 12px; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 11px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { position: sticky; top: 0; background: var(--surface); color: var(--muted); font-weight: 600; font-size: 12px; border-bottom-color: var(--line); z-index: 1; }
tr > :first-child { position: sticky; left: 0; background: var(--surface); z-index: 1; } thead tr > :first-child { z-index: 2; }
tbody tr:last-child td { border-bottom: 0; }
tfoot td { font-weight: 600; border-top: 1px solid var(--line); border-bottom: 0; }
.wide th, .wide td { padding: 5px 6px; font-size: 12px; } .wide th { white-space: normal; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
td.best { font-weight: 700; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 36px; align-items: start; }
.pairs table td:first-child { color: var(--muted); text-align: left; white-space: normal; } .pairs td { text-align: left; padding: 4px 8px 4px 0; }
.pairs td + td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px; white-space: normal; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 18px; height: 4px; border-radius: 2px; margin-right: 8px; vertical-align: 3px; }
details > summary { cursor: pointer; color: var(--blue); font-size: 13px; margin-top: 12px; }
footer { color: var(--muted); font-size: 12.5px; padding: 4px 24px 40px; }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } .scroll { max-height: none; } nav { display: none; } }
"""

BASE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% macro table(columns, rows, total=none) -%}
<div class="scroll{% if columns|length > 9 %} wide{% endif %}" tabindex="0"><table>
<thead><tr>{% for name, is_text in columns %}<th scope="col"{% if is_text %} class="text"{% endif %}>{{ name | replace(" %", "\u00a0%") }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td{% if columns[loop.index0][1] %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
{% if total %}<tfoot><tr>{% for cell in total %}<td{% if columns[loop.index0][1] %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr></tfoot>{% endif %}
</table></div>
{%- endmacro %}
{% macro cards(items) -%}
<div class="cards">{% for name, value, more in items %}
<div class="card"><div class="name">{{ name }}</div><div class="value">{{ value }}</div><div class="more">{{ more }}</div></div>{% endfor %}
</div>
{%- endmacro %}
{% macro picture(item) -%}
<figure>{{ item.svg | safe }}</figure>{% if item.note %}<p class="note">{{ item.note }}</p>{% endif %}
{%- endmacro %}
{% block page %}{% endblock %}
</body>
</html>
"""

REPORT = """{% extends "base" %}
{% block page %}
<header>
<h1>{{ run.strategy }} <small>{{ run.model }} on {{ run.data }}</small><span class="badge{% if status != 'completed' %} bad{% endif %}">{{ status }}</span></h1>
<p class="sub">{{ subtitle }}</p>
<nav aria-label="Sections">{% for section in sections %}<a href="#{{ section.name }}">{{ section.title.split(":")[0] }}</a>{% endfor %}<a href="#configuration">Configuration</a></nav>
</header>
<main>
{{ cards(headlines) }}
{% if warnings %}<section class="warnings" id="warnings"><h2>{{ "Warning" if warnings|length == 1 else "Warnings" }}</h2><ul>
{% for item in warnings %}<li>{{ item }}</li>
{% endfor %}</ul></section>{% endif %}
{% for section in sections %}<section id="{{ section.name }}"><h2>{{ section.title }}</h2>
{% if section.picture %}{{ picture(section.picture) }}{% endif %}
{% if section.rows %}{{ table(section.columns, section.rows, section.total) }}{% endif %}
{% if section.table_note %}<p class="note">{{ section.table_note }}</p>{% endif %}
</section>
{% endfor %}
<section id="configuration"><h2>Configuration and versions</h2>
<p class="note">Everything that was set, as resolved when the run began.</p>
<div class="pairs">{% for part in pairs %}<table><tbody>{% for name, value in part %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>{% endfor %}</div>
</section>
</main>
<footer>Made from <code>{{ log_name }}</code>; the same numbers are in <code>summary.json</code>. Time is the clock of the run: virtual in simulation, the wall in deployment.</footer>
{% endblock %}
"""

COMPARISON = """{% extends "base" %}
{% block page %}
<header>
<h1>Comparison <small>of {{ runs|length }} runs</small></h1>
<p class="sub">{{ subtitle }}</p>
</header>
<main>
{{ cards(headlines) }}
{% if warnings %}<section class="warnings"><h2>Not like for like</h2><ul>{% for item in warnings %}<li>{{ item }}</li>{% endfor %}</ul></section>{% endif %}
{% for section in sections %}<section><h2>{{ section.title }}</h2>
{% if section.picture %}{{ picture(section.picture) }}{% endif %}
{% if section.rows %}{{ table(section.columns, section.rows) }}{% endif %}
{% if section.table_note %}<p class="note">{{ section.table_note }}</p>{% endif %}
</section>
{% endfor %}
</main>
<footer>The same numbers are in <code>comparison.json</code>. Nothing is interpolated: a time is that of the first evaluation at or above the target.</footer>
{% endblock %}
"""
