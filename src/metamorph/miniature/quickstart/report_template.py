"""The HTML of the report, as a Jinja template."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MetaMorph quickstart</title>
<style>
  :root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --right: #1a7f37; --wrong: #cf222e; }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); }
  body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
  h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
  p.soft, td.soft { color: var(--soft); } th.number { text-align: right; }
  code, pre { background: #f6f8fa; border-radius: 4px; padding: .1rem .3rem; }
  pre { padding: .7rem; overflow-x: auto; }
  table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1rem .25rem 0; vertical-align: top; }
  th { border-bottom: 1px solid var(--line); } td.number { font-variant-numeric: tabular-nums; text-align: right; }
  td.label { white-space: pre; }
  .cards { display: flex; flex-wrap: wrap; gap: .8rem; }
  .card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem; font-size: 12.5px; }
  .card p { margin: .35rem 0 0; } .card img, .empty { width: 112px; height: 112px; image-rendering: pixelated;
    border: 1px solid var(--line); border-radius: 4px; } .empty { display: inline-block; background: #f6f8fa; }
  .right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
  .figure { max-width: 100%; } details { margin-top: 1rem; } summary { cursor: pointer; }
</style>
</head>
<body>
<h1>MetaMorph in miniature</h1>
<p class="soft">Three small pretrained models became one that reads and draws pictures, in {{ minutes }} on this
machine ({{ metrics.threads }} thread(s), seed {{ metrics.seed }}). The scenes asked about or drawn below were in no
training picture, those of the knowledge prompts excepted.</p>
{% if metrics.fast %}<p><b>This was a fast run:</b> every part ran for a few steps only, so answers and pictures are
meaningless.</p>{% endif %}

<h2>Result</h2>
<table>
<tr><th>what</th><th class="number">n</th><th class="number">result</th><th>floor</th></tr>
{% for row in headline %}<tr><td class="label">{{ row.label }}</td><td class="number">{{ row.n }}</td>
<td class="number">{{ row.value }}</td>
<td class="{{ row.mark }}">{{ row.floor }}</td></tr>
{% endfor %}
</table>
<p>Try it yourself:</p>
<pre>metamorph generate --model {{ model }} --visualizer {{ visualizer }} --prompt "Draw a red circle"</pre>

{% macro image(data) %}{% if data %}<img src="{{ data }}" alt="">{% else %}<span class="empty"></span>{% endif %}\
{% endmacro %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p class="soft">{{ section.text }}</p>
<div class="cards">
{% for card in section.cards %}<div class="card" style="width: {{ 118 * card.pictures|length }}px">
{% for picture in card.pictures %}{{ image(picture) }}
{% endfor %}<p>{{ card.text }}</p><p class="{{ 'right' if card.is_right else 'wrong' }}">{{ card.verdict }}</p></div>
{% endfor %}
</div>
{% endfor %}

<h2>Learning curves</h2>
<img class="figure" src="{{ curves }}" alt="Loss curves of stage 1, stage 2 and the visualizer">

<h2>Time and memory</h2>
<table>
<tr><th>stage</th><th class="number">seconds</th><th class="number">processor seconds</th>
<th class="number">peak memory, MB</th></tr>
{% for row in stages %}<tr><td>{{ row.name }}</td><td class="number">{{ row.seconds }}</td>
<td class="number">{{ row.cpu }}</td>
<td class="number">{{ row.memory }}</td></tr>
{% endfor %}
</table>
<details><summary>Recipe and versions</summary><pre>{{ recipe }}</pre></details>
</body>
</html>
"""
