"""`import metamorph` takes no time, and Transformers' Auto classes know the model whenever it was imported."""

import subprocess
import sys

import pytest

from metamorph.mini import shipped_folder


CLASSES = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
folder = {folder!r}
names = []
for auto in (AutoProcessor, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    names.append(type(auto.from_pretrained(folder)).__name__)
assert names == [
    "MetaMorphProcessor", "MetaMorphConfig", "MetaMorphModel", *["MetaMorphForConditionalGeneration"] * 2
], names
import metamorph.models.configuration_metamorph as home
assert home.MetaMorphConfig.__module__ == home.__name__ and home.__spec__.name == home.__name__
"""
BEGINNINGS = {
    "first": "import metamorph",
    # A module that the Auto classes need, too: ours must not be imported while it is.
    "before a model": "import metamorph; from transformers.models.llama import LlamaForCausalLM",
    "after Transformers": "import transformers, metamorph",
    "after an Auto class": "from transformers import AutoConfig; import metamorph",
    "last": "from transformers import AutoModel, AutoProcessor, pipeline; import metamorph",
}


def python(code: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_importing_the_package_imports_nothing_large():
    python(
        "import sys, metamorph\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL', 'diffusers'} & sys.modules.keys()\n"
        "assert set(dir(metamorph)) == {*metamorph.__all__, '__version__'}\n"
        "assert metamorph.__version__"
    )


@pytest.mark.slow
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_auto_classes_know_the_model(beginning):
    python(f"{BEGINNINGS[beginning]}\n{CLASSES.format(folder=shipped_folder('mini', 'model'))}")
