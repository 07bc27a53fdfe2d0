"""Loaders of benchmark files, as their owners publish them.

What is a loader, and which are there?    `base.py`
Any table whose columns a spec names      `table.py`
Files of one benchmark                    `mmbench.py`, `mmvp.py`, `mmmu.py`, `chartqa.py`, `textvqa.py`
Rows of CSV, TSV, JSON and parquet        `tables.py`, with images and videos in them
Options of multiple-choice questions      `choices.py`
Prompts for images, captions              `generation.py`
Edits of images                           `edits.py`
Your own records, as for training         `records.py`
"""

LOADERS: dict[str, str] = {
    "captions": "metamorph.evaluation.loaders.generation:CaptionsLoader",
    "chartqa": "metamorph.evaluation.loaders.chartqa:ChartQALoader",
    "dpg": "metamorph.evaluation.loaders.generation:DpgLoader",
    "edits": "metamorph.evaluation.loaders.edits:EditsLoader",
    "geneval": "metamorph.evaluation.loaders.generation:GenevalLoader",
    "mmbench": "metamorph.evaluation.loaders.mmbench:MMBenchLoader",
    "mmmu": "metamorph.evaluation.loaders.mmmu:MMMULoader",
    "mmvp": "metamorph.evaluation.loaders.mmvp:MMVPLoader",
    "records": "metamorph.evaluation.loaders.records:RecordsLoader",
    "table": "metamorph.evaluation.loaders.table:TableLoader",
    "textvqa": "metamorph.evaluation.loaders.textvqa:TextVQALoader",
    "wise": "metamorph.evaluation.loaders.generation:WiseLoader",
}
"""Loaders by their names in specs, as `module:Class`; a module is imported when a spec names its loader."""
