"""Untrusted models: only complete and finite ones are loaded, none of their code runs, and no size is trusted."""

import ast
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_parts import GOLDEN, build_tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import metamorph
from metamorph import cli
from metamorph.mini import asset_path
from metamorph.models.connector import load_connector, save_connector
from metamorph.models.image_processing import load_image_processor
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_config, load_language_model, load_tokenizer
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.vision_tower import load_tower_of, load_vision_encoder


Weights = dict[str, torch.Tensor]
LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def write_metamorph(folder: Path) -> None:
    build_tiny_model().save_pretrained(folder)


def write_language_model(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(folder)


def write_tower(folder: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder)


def change_weights(folder: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields: object) -> None:
    """Fields of parts are given as `part__field`."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        part = config
        for step in path:
            part = part[step]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))


KINDS = {
    "metamorph": (write_metamorph, MetaMorphForConditionalGeneration.from_pretrained),
    "metamorph without heads": (write_metamorph, AutoModel.from_pretrained),
    "tower of metamorph": (write_metamorph, load_tower_of),
    "language model": (write_language_model, load_language_model),
    "tower": (write_tower, load_vision_encoder),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], object]]:
    """A folder of each kind, and what loads it."""
    write, load = KINDS[request.param]
    write(tmp_path)
    load(tmp_path)
    return tmp_path, load


def pick(weights: Weights, tail: str = "layers.1.layer_norm1.weight") -> str:
    """A small weight that all kinds read."""
    return next((name for name in weights if name.endswith(tail)), "model.layers.1.input_layernorm.weight")


def test_missing_weights_are_refused(kind) -> None:
    folder, load = kind
    change_weights(folder, lambda weights: weights.pop(pick(weights)))
    with pytest.raises(ValueError, match=r"weight must have .*, but is not there \(1 such|lacks 1 weights"):
        load(folder)


def test_most_weights_missing_is_refused(kind) -> None:
    folder, load = kind

    def keep_norms(weights: Weights) -> None:
        for name in [name for name in weights if "norm" not in name]:
            del weights[name]

    change_weights(folder, keep_norms)
    with pytest.raises(ValueError, match=r"holds less than its config\.json asks for"):
        load(folder)


def test_a_missing_weight_is_not_made_up_for_by_an_unknown_one(kind) -> None:
    folder, load = kind

    def rename(weights: Weights) -> None:
        weights["model.vision_tower.other"] = weights.pop(pick(weights))

    change_weights(folder, rename)
    with pytest.raises(ValueError, match="lacks 1 weights, for example"):
        load(folder)


def test_unknown_weights_are_refused(kind) -> None:
    folder, load = kind
    change_weights(folder, lambda weights: weights.update({"model.vision_tower.other.gamma": torch.ones(3)}))
    if load in (load_language_model,):  # the vision tower of a multimodal checkpoint is not read
        load(folder)
        change_weights(folder, lambda weights: weights.update({"model.layers.0.gamma": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"holds 1 weights that a .* does not have, for example .*gamma"):
        load(folder)


def test_weights_of_another_shape_are_refused(kind) -> None:
    folder, load = kind
    change_weights(folder, lambda weights: weights.update({pick(weights): torch.ones(999)}))
    with pytest.raises(ValueError, match=r"has shape \[999\], but its configuration asks for"):
        load(folder)


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (-torch.inf, torch.bfloat16)])
def test_values_that_are_not_finite_are_refused(kind, value: float, dtype: torch.dtype) -> None:
    folder, load = kind

    def spoil(weights: Weights) -> None:
        name = pick(weights)
        weights[name] = weights[name].to(dtype)
        weights[name][-1] = value

    change_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"norm1?\.weight holds NaN or infinite values"):
        load(folder)


@pytest.mark.parametrize("load", [MetaMorphForConditionalGeneration.from_pretrained, load_language_model])
def test_four_bit_weights_must_be_finite_too(load, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    from transformers import BitsAndBytesConfig

    (write_language_model if load is load_language_model else write_metamorph)(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True)
    load(tmp_path, quantization_config=settings)

    def spoil(weights: Weights) -> None:
        weights[next(name for name in weights if name.endswith("q_proj.weight"))][0, 0] = torch.nan

    change_weights(tmp_path, spoil)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load(tmp_path, quantization_config=settings)


def test_a_configuration_cannot_ask_for_more_memory_than_the_files_hold(tmp_path: Path) -> None:
    """A table of 100 TB, be it of another shape in the file or not there at all."""
    write_metamorph(tmp_path)
    change_config(tmp_path, text_config__vocab_size=10**12)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"must have shape \[1000000000000, 32\], but has \[64, 32\]"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"must have shape \[1000000000000, 32\]"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("field", ["text_config__num_hidden_layers", "vision_config__num_hidden_layers"])
def test_a_configuration_cannot_ask_for_more_layers_than_the_files_hold(field: str, tmp_path: Path) -> None:
    write_metamorph(tmp_path)
    change_config(tmp_path, **{field: 10**7})
    with pytest.raises(ValueError, match="asks for 10000000 layers"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)


def test_a_configuration_cannot_ask_for_any_number_of_connector_layers(tmp_path: Path) -> None:
    write_metamorph(tmp_path)
    change_config(tmp_path, mm_projector_type="mlp9999999x_gelu")
    with pytest.raises(ValueError, match="mm_projector_type='mlp9999999x_gelu' is unknown"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)


def test_kernels_of_the_hub_are_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    change_config(tmp_path, _attn_implementation="somebody/kernel")
    with pytest.raises(ValueError, match="'somebody/kernel' is code on the Hub"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", '{"model_type": "llama", "hidden_size": "large"}'])
def test_damaged_configurations_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights are read from safetensors files only"):
        load_language_model(tmp_path)


def test_an_adapter_beside_a_model_is_refused(kind) -> None:
    """Transformers hands its settings to PEFT: regular expressions that never end, modules to import, any rank."""
    folder, load = kind
    settings = {"peft_type": "LORA", "target_modules": "([a-z0-9_.]+)+X"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"holds adapter_config\.json next to a model: move the adapter"):
        load(folder)


def test_a_processor_loads_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (asset_path("mini") / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    file = tmp_path / "processor_config.json"
    fields = json.loads(file.read_text())
    named = {"audio_tokenizer_class": "LlamaForCausalLM", "audio_tokenizer_name_or_path": str(tmp_path)}
    for extra in ({"audio_tokenizer": named}, {"feature_extractor": {}}):
        file.write_text(json.dumps({**fields, **extra}))
        with pytest.raises(ValueError, match=rf"processor_config\.json: {min(extra)} is not a field"):
            MetaMorphProcessor.from_pretrained(tmp_path)
    file.write_text(json.dumps(fields))
    assert MetaMorphProcessor.from_pretrained(tmp_path).num_image_tokens == fields["num_image_tokens"]
    (tmp_path / "audio_tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"holds audio_tokenizer_config\.json"):
        MetaMorphProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_image_tokens": 10**9}, "must be from 1 to 16384, not 1000000000"),
        ({"num_image_tokens": 25}, r"num_image_tokens of processor_config\.json is 25, but that of config\.json 16"),
        ({"size": {"height": 10**5, "width": 10**5}}, "images of 100000 pixels a side must have 1 to 4096"),
        ({"size": {"height": 32, "width": 32}}, r"size of images of processor_config\.json is \(32, 32\)"),
    ],
    ids=["tokens", "other tokens", "size", "other size"],
)
def test_sizes_of_a_processor(change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (asset_path("mini") / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "processor_config.json"
    fields = json.loads(file.read_text())
    (fields["image_processor"] if "size" in change else fields).update(change)
    file.write_text(json.dumps(fields))
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "hello"]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_loading_draws_no_random_numbers(kind) -> None:
    """New parts are initialised from PyTorch's generator: what is loaded before must not move it."""
    folder, load = kind
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_names_flag_and_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (asset_path("mini") / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_weights(tmp_path, lambda weights: [weights.pop(name) for name in list(weights)[:68]])
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "hello"]) == 2
    assert f"--model {tmp_path} cannot be used" in capsys.readouterr().err


def test_a_connector_must_be_finite(tmp_path: Path) -> None:
    model = build_tiny_model()
    file = save_connector(model, tmp_path)
    weights = load_file(file)
    weights["mm_projector.0.weight"][0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mm_projector\.0\.weight holds NaN or infinite values"):
        load_connector(model, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"new_tokens": "["}, "its new_tokens is not JSON"),
        ({"config": "[]"}, "its config must be a dict"),
        ({"new_tokens": '["a"]'}, r"rows of shape \[2, 32\] for 1 new tokens"),
    ],
)
def test_headers_of_connectors_are_checked(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    model = build_tiny_model()
    file = save_connector(model, tmp_path)
    save_file(load_file(file), file, {"new_tokens": '["a", "b"]', **metadata})
    with pytest.raises(ValueError, match=message):
        load_connector(model, tmp_path)


def write_code(folder: Path) -> Path:
    """A folder whose parts name classes in a Python file of the folder, which leaves a mark when it runs."""
    write_language_model(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    mark = folder / "has_run"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor", "AutoProcessor")
    own = dict.fromkeys(names, "code.Own")
    change_config(folder, model_type="own", auto_map=own)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Own", "auto_map": own}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Own", "auto_map": own}))
    file = folder / "tokenizer_config.json"
    tokenizer = {**json.loads(file.read_text()), "tokenizer_class": "Own"}
    file.write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}))
    return mark


@pytest.mark.parametrize(
    "load",
    [
        load_config,
        load_tokenizer,
        load_image_processor,
        load_language_model,
        load_vision_encoder,
        MetaMorphProcessor.from_pretrained,
    ],
)
def test_nobody_is_asked_whether_code_may_run(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = write_code(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked on stdin"))
    with pytest.raises((ValueError, OSError)):
        load(str(tmp_path))
    assert not mark.exists()


def test_remote_code_cannot_be_asked_for(tmp_path: Path) -> None:
    write_metamorph(tmp_path)
    for kind in (MetaMorphForConditionalGeneration, MetaMorphProcessor):
        with pytest.raises(ValueError, match="trust_remote_code is not supported"):
            kind.from_pretrained(tmp_path, trust_remote_code=True)


def test_every_call_that_could_run_remote_code_forbids_it() -> None:
    """Transformers' `Auto…` classes ask on stdin unless `trust_remote_code` is False; `load_checked` says so itself."""
    found = 0
    for file in Path(metamorph.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        allowed: set[ast.AST] = set()
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            value = keywords.get("trust_remote_code")
            if isinstance(value, ast.Constant) and value.value is False:
                allowed.add(call.func)
            if isinstance(call.func, ast.Name) and call.func.id in ("load_checked", "partial"):
                allowed.update(call.args)
        for node in ast.walk(tree):
            is_loader = isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config")
            if is_loader and isinstance(node.value, ast.Name) and node.value.id.startswith("Auto"):
                if node.value.id == "AutoencoderKL":
                    continue  # a class of diffusers
                found += 1
                assert node in allowed, f"{file}:{node.lineno} lacks trust_remote_code=False"
    assert found > 5
