"""Loaders of benchmark files, as their owners publish them.

What is a loader, and which are there?    `base.py`
Prompts for images, captions              `generation.py`
Edits of images                           `edits.py`
"""

LOADERS: dict[str, str] = {
    "captions": "metamorph.evaluation.loaders.generation:CaptionsLoader",
    "dpg": "metamorph.evaluation.loaders.generation:DpgLoader",
    "edits": "metamorph.evaluation.loaders.edits:EditsLoader",
    "geneval": "metamorph.evaluation.loaders.generation:GenevalLoader",
    "wise": "metamorph.evaluation.loaders.generation:WiseLoader",
}
"""Loaders by their names in specs, as `module:Class`; a module is imported when a spec names its loader."""
