#!/usr/bin/env bash
# Make a virtual environment with lmms-eval and MetaMorph's plug-in for it:
#
#     scripts/lmms_eval_env.sh FOLDER
#     FOLDER/bin/python -m lmms_eval --model metamorph --model_args pretrained=runs/model --tasks mme
#
# lmms-eval wants other releases of some packages (av, wandb, protobuf, …). They are installed into FOLDER only. All else,
# such as PyTorch, is that of the environment of PYTHON (.venv/bin/python by default), which stays unchanged. torchvision
# and timm, which only some of lmms-eval's other models need, are left out: they would want their own PyTorch.
set -euo pipefail

: "${1:?give the folder of the new environment}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="${PYTHON:-${root}/.venv/bin/python}"
release="${LMMS_EVAL:-0.7.3}"

"${python}" -m venv "$1"
"${python}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$("$1/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/base_environment.pth"

new="$1/bin/python"
"${new}" -m pip install --quiet --no-deps "lmms-eval==${release}" --editable "${root}"
"${new}" - "$1" << 'EOF'
import re, sys
from importlib.metadata import requires, version
from pathlib import Path

folder = Path(sys.argv[1])
names = {line: re.match(r"[\w-]+", line)[0].lower() for line in requires("lmms-eval") if "extra ==" not in line}
wanted = [line for line, name in names.items() if name not in ("torch", "torchvision", "timm")]
(folder / "requirements.txt").write_text("\n".join(wanted) + "\n")
kept = ("torch", "transformers", "accelerate", "numpy", "datasets")
(folder / "constraints.txt").write_text("".join(f"{name}=={version(name)}\n" for name in kept))
EOF
"${new}" -m pip install --quiet --constraint "$1/constraints.txt" --requirement "$1/requirements.txt"
"${new}" -c 'from lmms_eval.models import get_model; print("lmms-eval finds", get_model("metamorph").__qualname__)'
