"""Files that strangers wrote, read in bounded time and memory.

Model folders: JSON and headers of weights    `model_files.py`
YAML of recipes and mixtures                  `yaml_files.py`
"""
