"""Files from untrusted sources, read with bounded time and memory; files we write.

JSON and weights of model folders     `model_files.py`
YAML recipes and mixtures             `yaml_files.py`
Permissions of the files we write     `permissions.py`
Pages and model cards                 `templates.py`
"""
