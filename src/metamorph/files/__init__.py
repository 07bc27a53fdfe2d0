"""Files that strangers wrote, read in bounded time and memory; files of ours, with the permissions of the umask.

Model folders: JSON and headers of weights    `model_files.py`
YAML of recipes and mixtures                  `yaml_files.py`
Who may read what we write                    `permissions.py`
Pages and model cards                         `templates.py`
"""
