"""Loaders of benchmark files, as their owners publish them.

What is a loader, and which are there?    `base.py`
Any table whose columns a spec names      `table.py`
Files of one benchmark                    `mmbench.py`, `mmvp.py`, `mmmu.py`, `chartqa.py`, `textvqa.py`
Rows of CSV, TSV, JSON and parquet        `tables.py`, with images and videos in them
Options of multiple-choice questions      `choices.py`
"""

LOADERS: dict[str, str] = {
    "table": "metamorph.evaluation.loaders.table:TableLoader",
    "mmbench": "metamorph.evaluation.loaders.mmbench:MMBenchLoader",
    "mmvp": "metamorph.evaluation.loaders.mmvp:MMVPLoader",
    "mmmu": "metamorph.evaluation.loaders.mmmu:MMMULoader",
    "chartqa": "metamorph.evaluation.loaders.chartqa:ChartQALoader",
    "textvqa": "metamorph.evaluation.loaders.textvqa:TextVQALoader",
}
"""Loaders by their names in specs, as `module:Class`; a module is imported when a spec names its loader."""
