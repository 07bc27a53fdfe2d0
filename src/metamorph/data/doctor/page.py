"""The HTML of the doctor's report, as a Jinja template; it needs no script and no network."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MetaMorph data check</title>
<style>
  :root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --right: #1a7f37; --wrong: #cf222e;
    --bar: #0969da; --learnt: #c5f0cd; --answer: #8250df; --image: #9a6700; }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); }
  body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
  h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
  p.soft, td.soft, .soft { color: var(--soft); } .right { color: var(--right); } .wrong { color: var(--wrong); }
  code { background: #f6f8fa; border-radius: 4px; padding: .1rem .3rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1rem .25rem 0; vertical-align: top; }
  th { border-bottom: 1px solid var(--line); font-weight: 600; }
  th.number, td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
  td.detail { overflow-wrap: anywhere; } td.place, td.name { white-space: nowrap; }
  td.name { max-width: 18rem; overflow: hidden; text-overflow: ellipsis; }
  details { margin: .4rem 0; } summary { cursor: pointer; } summary .soft { margin-left: .5rem; }
  details table { margin: .4rem 0 .8rem 1.1rem; font-size: 13px; }
  .histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.6rem 2.4rem; }
  .histograms h3 { font-size: 14px; margin: 0 0 .5rem; } .scale { display: flex; justify-content: space-between; }
  .few { display: flex; } .few span { flex: 1; text-align: center; }
  .scale, .few, .top { font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
  svg { display: block; width: 100%; height: 130px; border-bottom: 1px solid var(--line); overflow: visible; }
  .sample { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; margin: .8rem 0; }
  .sample h3 { font-size: 13px; margin: 0 0 .4rem; color: var(--soft); font-weight: 500; overflow-wrap: anywhere; }
  .tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
  .tokens span { border-radius: 3px; } .learnt { background: var(--learnt); } .read { color: var(--soft); }
  .tokens figure { display: inline-block; margin: .3rem; padding: 3px; border: 3px solid; border-radius: 6px; }
  .tokens figure { vertical-align: middle; } figure.image { border-color: #d8b66b; } figure.answer_image {
    border-color: var(--answer); } figure img { display: block; max-width: 160px; border-radius: 2px; }
  figcaption { font: 11px/1.4 system-ui, sans-serif; text-align: center; } figure.image figcaption {
    color: var(--image); } figure.answer_image figcaption { color: var(--answer); font-weight: 600; }
  .key span { border-radius: 3px; padding: 0 .35rem; margin-right: .3rem; } .key .image { border: 2px solid #d8b66b; }
  .key .answer_image { border: 2px solid var(--answer); }
</style>
</head>
<body>
{% macro number(value) %}{{ "{:,}".format(value) if value is not none else "–" }}{% endmacro %}
<h1>Data check</h1>
<p class="soft">{% for name, value in statistics.settings.items() %}{{ name }} <code>{{ value }}</code>\
{{ ", " if not loop.last }}{% endfor %}</p>
<p><b>{{ number(report.ok) }}</b> of {{ number(report.records) }} checked records are in order
{%- if report.problems %}; <b class="wrong">{{ number(report.problems|length) }}
{{ "problem was" if report.problems|length == 1 else "problems were" }} found</b>{% else %}: <b class="right">no problem
was found</b>{% endif %}.
{% if report.records < statistics.total_records %}Only these of {{ number(statistics.total_records) }} records were
looked at, evenly spread.{% endif %}
<span class="soft">{{ statistics.seconds }} s, {{ number(statistics.records_per_second) }} records a second.</span></p>
{% if statistics.note %}<p><b>{{ statistics.note }}</b></p>{% endif %}

{% if kinds %}<h2>Problems</h2>
{% for kind in kinds %}<details{{ " open" if kinds|length <= 3 or report.problems|length <= 20 }}>
<summary><b>{{ kind.name }}</b> × {{ number(kind.count) }}<span class="soft">{{ kind.meaning }}</span></summary>
<div class="wide"><table>
<tr><th>place</th><th>id</th><th>what is wrong</th></tr>
{% for problem in kind.problems %}<tr><td class="place">{{ problem.source }}:{{ problem.line }}</td>
<td class="name" title="{{ problem.id or '' }}">{{ problem.id if problem.id is not none else "–" }}</td>
<td class="detail">{{ problem.detail }}</td></tr>
{% endfor %}</table></div>
{% if kind.count > kind.problems|length %}<p class="soft">{{ number(kind.count - kind.problems|length) }} more are in
report.json.</p>{% endif %}
</details>
{% endfor %}{% endif %}

<h2>Sources</h2>
<div class="wide"><table>
<tr><th>source</th><th class="number">records</th><th class="number">in order</th><th class="number">problems</th>
<th class="number">tokens</th><th class="number">with text loss</th><th class="number">images</th>
<th class="number">answer images</th><th class="number">mean tokens</th><th class="number">longest</th></tr>
{% for name, row in statistics.sources.items() %}<tr><td class="name" title="{{ name }}">{{ name }}</td>
<td class="number">{{ number(row.records) }}</td><td class="number">{{ number(row.ok) }}</td>
<td class="number {{ 'wrong' if row.problems }}">{{ number(row.problems) }}</td>
<td class="number">{{ number(row.tokens) }}</td><td class="number">{{ number(row.text_targets) }}</td>
<td class="number">{{ number(row.images) }}</td><td class="number">{{ number(row.answer_images) }}</td>
<td class="number">{{ number(row.mean_tokens) }}</td><td class="number">{{ number(row.max_tokens) }}</td></tr>
{% endfor %}</table></div>

<h2>Lengths</h2>
<div class="wide"><table>
<tr><th>in one record</th><th class="number">mean</th><th class="number">median</th><th class="number">95 %
  have at most</th>
<th class="number">largest</th><th class="number">in all</th></tr>
{% for name, label in quantities.items() %}{% set row = statistics[name] %}<tr><td>{{ label }}</td>
<td class="number">{{ number(row.mean) }}</td><td class="number">{{ number(row.median) }}</td>
<td class="number">{{ number(row.p95) }}</td><td class="number">{{ number(row.max) }}</td>
<td class="number">{{ number(row.total) }}</td></tr>
{% endfor %}</table></div>
{% if statistics.packing %}<p>Packed into rows of {{ number(statistics.model_max_length) }} tokens, the records fill
{{ number(statistics.packing.rows) }} rows to <b>{{ "%.1f"|format(100 * statistics.packing.efficiency) }} %</b>; one
record in each row would fill {{ "%.1f"|format(100 * statistics.packing.unpacked_efficiency) }} %.</p>{% endif %}
<div class="histograms">
{% for chart in histograms %}<div><h3>{{ chart.title }}</h3>
<div class="top">{{ number(chart.highest) }} {{ chart.unit }}</div>
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{{ chart.title }}">
{% for bar in chart.bars %}<rect x="{{ bar.left + 0.06 * bar.width }}" y="{{ 100 - bar.height }}"
 width="{{ 0.88 * bar.width }}" height="{{ bar.height }}" fill="{{ '#54a3ec' if bar.is_rest else '#0969da' }}">
<title>{{ bar.label }}: {{ number(bar.count) }} {{ chart.unit }}</title></rect>
{% endfor %}{% if chart.limit_left is not none %}<line x1="{{ chart.limit_left }}" x2="{{ chart.limit_left }}" y1="0"
 y2="100" stroke="#cf222e" stroke-width="1.5" vector-effect="non-scaling-stroke"></line>{% endif %}
</svg>
{% if chart.few %}<div class="few">{% for bar in chart.bars %}<span>{{ bar.label }}</span>{% endfor %}</div>
{% else %}<div class="scale"><span>0</span>{% if chart.limit_left is not none %}<span class="wrong">red:
--model_max_length {{ number(chart.limit) }}</span>{% endif %}<span>{{ chart.end }}</span></div>{% endif %}</div>
{% endfor %}
</div>

{% if samples %}<h2>Examples</h2>
<p class="key soft">Records as the model gets them: <span class="learnt">text that is learnt</span>
<span class="read">text that is only read</span> <span class="image">image that is only read</span>
<span class="answer_image">image that is learnt</span> Pictures are as the vision tower sees them.</p>
{% for sample in samples %}<div class="sample"><h3>{{ sample.title }} · {{ number(sample.tokens) }} tokens</h3>
<div class="tokens">{% for piece in sample.pieces %}{% if piece.picture %}<figure class="{{ piece.kind }}">\
<img src="{{ piece.picture }}" alt=""><figcaption>{{ piece.tokens }} visual tokens\
{{ ", learnt" if piece.kind == "answer_image" }}</figcaption></figure>{% else %}<span class="{{ piece.kind }}">\
{{ piece.text }}</span>{% endif %}{% endfor %}</div></div>
{% endfor %}{% endif %}
</body>
</html>
"""
