"""LoRA and QLoRA: what is trained, what the adapter folder holds, and that it gives the trained model again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_parts import other_permissions
from safetensors.torch import load_file, save_file
from training_parts import arguments, logged, make_language_model, make_records, make_vision_tower, training_lines
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

import metamorph
from metamorph.cli import main
from metamorph.models.adapters import (
    ADAPTER_FILE,
    LORA_CONFIG_FILE,
    LORA_WEIGHTS_FILE,
    PEFT_PREFIX,
    has_adapter,
    load_adapter_weights,
)
from metamorph.models.connector import CONNECTOR_FILE
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.training.arguments import ModelArguments
from metamorph.training.build import load_model, resolve_model
from metamorph.training.checkpoints.resume import find_stage_checkpoint
from metamorph.training.lora import attach_lora
from metamorph.training.run import TrainResult, run_training
from metamorph.training.stages import apply_stage


pytestmark = pytest.mark.integration


pytest.importorskip("peft", reason="needs the extra lora")

LORA = {"lora_enable": True, "lora_r": 4, "from_scratch_connector": True}
EXACT = ("loss", "text_loss", "visual_loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def wide_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `parts`, with a language model whose rows are multiples of the blocks of 4-bit numbers."""
    folder = tmp_path_factory.mktemp("wide")
    make_language_model(folder / "llm", hidden_size=64, intermediate_size=128)
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder


@pytest.fixture(scope="module")
def lora(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Five steps of LoRA, with dropout, and a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("lora")
    return run_training(*arguments(parts, folder, stage=2, **LORA, max_steps=5, save_strategy="steps", save_steps=2))


@pytest.fixture(scope="module")
def qlora(wide_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """QLoRA, without dropout, so that it can be compared in training mode."""
    pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    folder = tmp_path_factory.mktemp("qlora")
    return run_training(*arguments(wide_parts, folder, stage=2, **LORA, bits=4, lora_dropout=0.0))


@torch.no_grad()
def logits_of(model: MetaMorphForConditionalGeneration, training: bool = False) -> torch.Tensor:
    """For a question with an image, a text with image tokens, and visual predictions in addition to the logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 380, (2, 14), generator=generator)
    ids[0, 3:9] = torch.tensor([382, *[model.config.image_token_id] * 4, 383])
    ids[1, 5:7] = torch.tensor([382, 383])
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    output = model.train(training)(input_ids=ids, pixel_values=pixels, predict_visual_token=True)
    return torch.cat([output.logits.flatten(), output.visual_prediction.flatten()])


def assert_same_output(
    ours: MetaMorphForConditionalGeneration, reference: torch.Tensor, training: bool = False, tolerance: float = 1e-4
) -> None:
    difference = (logits_of(ours, training) - reference).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"


def test_r23_lora_is_on_the_language_model_only(lora: TrainResult) -> None:
    adapted = {name.rpartition(".lora_")[0] for name, _ in lora.model.named_parameters() if ".lora_" in name}
    layers = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} | {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    assert adapted == {f"model.language_model.layers.{i}.{layer}" for i in (0, 1) for layer in layers}


def test_what_lora_trains(parts: Path, tmp_path: Path) -> None:
    model_args, _, _ = arguments(parts, tmp_path, stage=2, **LORA)
    model = load_model(model_args, resolve_model(model_args))
    summary = {line.module: line for line in apply_stage(model, model_args)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name in trained if ".lora_" not in name}
    assert others == {
        *(f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        *(f"vision_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        "model.language_model.embed_tokens.new_rows",
        "lm_head.new_rows",
    }
    assert 0 < summary["language_model"].trainable < summary["language_model"].frozen
    assert summary["vision_tower"].trainable == 0


def test_lora_of_chosen_layers(parts: Path, tmp_path: Path) -> None:
    model_args, _, _ = arguments(parts, tmp_path, stage=2, **LORA, lora_target_modules=["q_proj", "v_proj"])
    model = load_model(model_args, resolve_model(model_args))
    attach_lora(model, model_args)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    model_args.lora_target_modules = ["q_proj", "Wqkv"]
    with pytest.raises(ValueError, match=r"--lora_target_modules Wqkv: .* it has down_proj, gate_proj, k_proj"):
        attach_lora(load_model(model_args, resolve_model(model_args)), model_args)


def test_the_base_stays_bit_identical(parts: Path, lora: TrainResult) -> None:
    trained = {name.replace(".base_layer", ""): value for name, value in lora.model.state_dict().items()}
    for name, weight in AutoModelForCausalLM.from_pretrained(parts / "llm").state_dict().items():
        ours = trained[name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name]
        moved = (ours[: weight.shape[0]] != weight).flatten(1).any(1).nonzero().flatten() if weight.ndim == 2 else None
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert moved.tolist() == [382, 383], name  # the rows of the new tokens
        else:
            assert torch.equal(ours, weight), name


def test_the_folder_holds_everything_that_was_trained_and_no_base(lora: TrainResult) -> None:
    folder = Path(lora.output_dir)
    names = {file.name for file in folder.iterdir()}
    assert {LORA_WEIGHTS_FILE, LORA_CONFIG_FILE, ADAPTER_FILE, CONNECTOR_FILE, "config.json"} <= names
    assert {"tokenizer.json", "processor_config.json", "generation_config.json"} <= names
    assert not list(folder.glob("model*.safetensors"))
    assert all(name.startswith(PEFT_PREFIX) and ".lora_" in name for name in load_file(folder / LORA_WEIGHTS_FILE))
    saved = load_file(folder / CONNECTOR_FILE)
    assert {name.partition(".")[0] for name in saved} == {"mm_projector", "vision_head", "new_rows", "new_head_rows"}
    assert saved["new_rows"].shape == saved["new_head_rows"].shape == (2, 32)
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert other_permissions(folder) == {}


def test_from_pretrained_gives_the_trained_model(lora: TrainResult) -> None:
    model = MetaMorphForConditionalGeneration.from_pretrained(lora.output_dir)
    assert not has_adapter(model)
    assert not [name for name in model.state_dict() if "lora" in name]
    assert_same_output(model, logits_of(lora.model))
    assert model.generation_config.eos_token_id == lora.processor.end_of_turn_token_ids


def test_from_pretrained_finds_adapters_of_the_hub(lora: TrainResult, tmp_path: Path) -> None:
    """In the Hub's cache, since tests have no network."""
    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(lora.output_dir, snapshot, ignore=shutil.ignore_patterns("checkpoint-*"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    model = MetaMorphForConditionalGeneration.from_pretrained("somebody/tiny", **options)
    assert_same_output(model, logits_of(lora.model))
    with pytest.raises(OSError, match="cached files"):
        MetaMorphForConditionalGeneration.from_pretrained("somebody/other", **options)


def test_peft_reads_the_adapter(parts: Path, lora: TrainResult, tmp_path: Path) -> None:
    """The LoRA files are PEFT's own: its loader adds them to a MetaMorph model with the same connector."""
    from peft import PeftModel

    merged = MetaMorphForConditionalGeneration.from_pretrained(lora.output_dir)
    model_args, _, _ = arguments(parts, tmp_path, stage=2, **LORA, pretrain_mm_mlp_adapter=lora.output_dir)
    adapted = PeftModel.from_pretrained(load_model(model_args, resolve_model(model_args)), lora.output_dir).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (adapted(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() <= 1e-4


def test_merged_by_the_command(lora: TrainResult, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["convert", "--merge-adapter", lora.output_dir, "--output", str(merged)]) == 0
    assert (merged / "model.safetensors").is_file()
    assert not (merged / ADAPTER_FILE).exists()
    assert other_permissions(merged) == {}
    model, info = MetaMorphForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_output(model, logits_of(lora.model))
    MetaMorphProcessor.from_pretrained(merged)
    ModelArguments(model_name_or_path=str(merged))  # can be trained further


def test_generate_takes_an_adapter_folder(lora: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", lora.output_dir, "--prompt", "What is it?", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(["generate", *flags]) == 0
    assert capsys.readouterr().out


def test_resumed_equals_uninterrupted(parts: Path, lora: TrainResult, tmp_path: Path) -> None:
    checkpoint = Path(lora.output_dir) / "checkpoint-2"
    flags = {"max_steps": 5, "save_strategy": "no", "resume_from_checkpoint": str(checkpoint)}
    resumed = run_training(*arguments(parts, tmp_path, stage=2, **LORA, **flags))
    ours, theirs = (training_lines(r) for r in (resumed, lora))
    assert len(theirs) == 5
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert {key: mine.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
    weights = lora.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_an_adapter_does_not_resume_other_runs(lora: TrainResult) -> None:
    assert find_stage_checkpoint(lora.output_dir, None, 2, adapter=True) == f"{lora.output_dir}/checkpoint-5"
    with pytest.raises(ValueError, match="a checkpoint with --lora_enable True, but this run has --lora_enable False"):
        find_stage_checkpoint(lora.output_dir, None, 2)


@pytest.mark.parametrize("base", ["tied", "finished"])
def test_other_bases(base: str, parts: Path, tmp_path: Path) -> None:
    """A language model whose head is its embedding table, and a finished MetaMorph model."""
    flags: dict[str, object] = dict(LORA)
    if base == "tied":
        flags["model_name_or_path"] = str(make_language_model(tmp_path / "tied", tie_word_embeddings=True))
    else:
        full = arguments(parts, tmp_path / "full", stage=2, from_scratch_connector=True, max_steps=1)
        flags["model_name_or_path"] = run_training(*full).output_dir
    result = run_training(*arguments(parts, tmp_path / "lora", stage=2, **flags))
    assert json.loads((tmp_path / "lora" / ADAPTER_FILE).read_text())["vision_tower"] == (
        str(parts / "tower") if base == "tied" else None
    )
    model = MetaMorphForConditionalGeneration.from_pretrained(tmp_path / "lora")
    assert_same_output(model, logits_of(result.model))


def test_sessions_open_adapters(lora: TrainResult, qlora: TrainResult) -> None:
    """Merged, or beside a base that is quantised, whose weights merging would round again."""
    assert_same_output(metamorph.load(lora.output_dir, device="cpu").model, logits_of(lora.model))
    eight_bits = BitsAndBytesConfig(load_in_8bit=True)
    model = metamorph.load(lora.output_dir, device="cpu", quantization_config=eight_bits).model
    assert has_adapter(model)
    assert "Linear8bitLt" in {type(module).__name__ for module in model.modules()}
    assert torch.cosine_similarity(logits_of(model).float(), logits_of(lora.model), dim=0) > 0.99
    with pytest.raises(ValueError, match="is in 4 bits already"):
        metamorph.load(qlora.output_dir, device="cpu", quantization_config=eight_bits)
    with pytest.raises(ValueError, match="torch_compile does not work with 4-bit"):
        metamorph.load(qlora.output_dir, device="cpu", torch_compile=True)
    with pytest.raises(ValueError, match="merge it first"):
        metamorph.load(lora.output_dir, device_map="auto")


def test_qlora_merges_what_it_was_trained_on(qlora: TrainResult, tmp_path: Path) -> None:
    """Not the unrounded base: the merged model has the values of the 4-bit weights."""
    kinds = {type(module).__name__ for module in qlora.model.model.language_model.modules()}
    assert "Linear4bit" in kinds
    # In training mode: in evaluation bitsandbytes takes a kernel in bfloat16 on some CPUs.
    reference = logits_of(qlora.model, training=True)
    merged = tmp_path / "merged"
    assert main(["convert", "--merge-adapter", qlora.output_dir, "--output", str(merged)]) == 0
    assert "quantization" not in (merged / "config.json").read_text()
    assert_same_output(MetaMorphForConditionalGeneration.from_pretrained(merged), reference)


def test_qlora_folder_opens_in_4_bits(qlora: TrainResult) -> None:
    model = MetaMorphForConditionalGeneration.from_pretrained(qlora.output_dir)
    assert has_adapter(model)
    assert_same_output(model, logits_of(qlora.model, training=True), training=True)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            assert name.startswith("model.language_model."), name


def test_stage_1_with_a_4_bit_language_model(wide_parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    run_training(*arguments(wide_parts, tmp_path, stage=1, bits=4))
    assert "quantization" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / CONNECTOR_FILE).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bits": 8}, "--bits '8' is unknown: use one of 4, 16"),
        ({"quant_type": "int4"}, "--quant_type 'int4' is unknown"),
        ({"bits": 4}, "add --lora_enable True"),
        ({"lora_enable": True, "lora_r": 0}, "--lora_r 0"),
        ({"lora_enable": True, "lora_dropout": 1.0}, r"--lora_dropout 1.0 must lie in \[0, 1\)"),
        ({"lora_enable": True, "freeze_backbone": True}, "--freeze_backbone True freezes it"),
        ({"lora_enable": True, "freeze_vision": False}, "cannot hold a trained vision tower"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "is for stage 2"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict, message: str, parts: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArguments(model_name_or_path=str(parts / "llm"), from_scratch_connector=True, **flags)


def test_an_adapter_is_no_base(lora: TrainResult) -> None:
    with pytest.raises(ValueError, match="metamorph convert --merge-adapter"):
        ModelArguments(model_name_or_path=lora.output_dir)


def test_a_base_that_has_moved_is_named(lora: TrainResult, tmp_path: Path) -> None:
    for file in Path(lora.output_dir).iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    base = json.loads((tmp_path / ADAPTER_FILE).read_text())
    (tmp_path / ADAPTER_FILE).write_text(json.dumps({**base, "language_model": "/nowhere/llm"}))
    with pytest.raises(FileNotFoundError, match=r"trained on /nowhere/llm and .*Correct the paths in"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / ADAPTER_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        MetaMorphForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_that_do_not_fit(parts: Path, lora: TrainResult, tmp_path: Path) -> None:
    model_args, _, _ = arguments(parts, tmp_path, stage=2, **{**LORA, "lora_r": 8})
    model = load_model(model_args, resolve_model(model_args))
    attach_lora(model, model_args)
    with pytest.raises(ValueError, match=r"\(4, .* in the file and \(8, .* use the --lora_r"):
        load_adapter_weights(model, lora.output_dir)


@pytest.fixture
def adapter_folder(lora: TrainResult, tmp_path: Path) -> Path:
    return shutil.copytree(lora.output_dir, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))


def set_fields(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "megatron_config .* is not supported"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING' is not supported, only LORA"),
        ({"peft_type": ["LORA"]}, "peft_type .* is not supported, only LORA"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"field_of_a_later_release": True}, "field_of_a_later_release True is not supported"),
        ({"r": 10**9}, "r cannot be 1000000000"),
        ({"r": "4"}, "r cannot be '4'"),
        ({"r": 8}, r"lora_A\.weight has shape \[4, "),
        ({"lora_alpha": [1]}, r"lora_alpha cannot be \[1\]"),
    ],
    ids=str,
)
def test_settings_that_are_more_than_lora_are_refused(
    adapter_folder: Path, fields: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter_folder / "planted.py").write_text(f"open({str(adapter_folder / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(adapter_folder)
    set_fields(adapter_folder / LORA_CONFIG_FILE, **fields)
    with pytest.raises(ValueError, match=message):
        MetaMorphForConditionalGeneration.from_pretrained(adapter_folder)
    assert not (adapter_folder / "ran").exists()


def test_the_layers_are_those_that_have_weights(lora: TrainResult, adapter_folder: Path) -> None:
    """A regular expression of others may never end, so PEFT does not see it."""
    names = {
        "target_modules": r"(.*.*)*x",
        "base_model_name_or_path": "/nowhere",
        "auto_mapping": {"parent_library": "x"},
    }
    set_fields(adapter_folder / LORA_CONFIG_FILE, **names, task_type="CAUSAL_LM", revision="x")
    assert_same_output(MetaMorphForConditionalGeneration.from_pretrained(adapter_folder), logits_of(lora.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(next(iter(found))), "lacks 1 weights"),
        (lambda found: found.update({f"{PEFT_PREFIX}lm_head.lora_C.weight": torch.ones(1)}), "unknown|lacks"),
        (lambda found: found.update({f"{PEFT_PREFIX}no.such.layer.lora_A.weight": torch.ones(1)}), "no.such.layer"),
        (lambda found: found.clear(), "it is empty"),
        (lambda found: next(iter(found.values())).fill_(torch.nan), "holds NaN"),
    ],
)
def test_weights_of_an_adapter_are_checked(adapter_folder: Path, change: Callable, message: str) -> None:
    tensors = load_file(adapter_folder / LORA_WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, adapter_folder / LORA_WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        MetaMorphForConditionalGeneration.from_pretrained(adapter_folder)


def test_adapters_are_never_unpickled(adapter_folder: Path) -> None:
    torch.save(load_file(adapter_folder / LORA_WEIGHTS_FILE), adapter_folder / "adapter_model.bin")
    (adapter_folder / LORA_WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors files only"):
        MetaMorphForConditionalGeneration.from_pretrained(adapter_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language_model": 5}, "language_model cannot be 5"),
        ({"vision_tower": ["x"]}, r"vision_tower cannot be \['x'\]"),
        ({"other": "x"}, "other cannot be 'x'"),
        ({"quantization": {"load_in_4bit": True, "other": 1}}, "quantization has a field other"),
        ({"language_model": "."}, "trained on ., which is not a model: .*Correct the paths in"),
        ({"language_model": "ITSELF"}, "names another adapter as its base"),
    ],
    ids=str,
)
def test_bases_that_are_none(adapter_folder: Path, fields: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter_folder / "empty").mkdir()
    (adapter_folder / "empty" / "config.json").write_text("{}")
    monkeypatch.chdir(adapter_folder / "empty")
    base = {name: str(adapter_folder) if value == "ITSELF" else value for name, value in fields.items()}
    set_fields(adapter_folder / ADAPTER_FILE, **base)
    with pytest.raises(ValueError, match=message):
        MetaMorphForConditionalGeneration.from_pretrained(adapter_folder)


def test_an_adapter_names_no_kernel_of_the_hub(adapter_folder: Path) -> None:
    set_fields(adapter_folder / "config.json", _attn_implementation="owner/kernel")
    with pytest.raises(ValueError, match="'owner/kernel' is code on the Hub"):
        MetaMorphForConditionalGeneration.from_pretrained(adapter_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "bits",
    [16, pytest.param(4, marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes"))],
)
def test_on_a_gpu_the_base_is_small_and_the_adapter_exact(bits: int, wide_parts: Path, tmp_path: Path) -> None:
    """Frozen matrices are in bfloat16 or 4 bits; what is trained, and the norms, in float32."""
    flags = {"use_cpu": False, "bf16": True, "bits": bits, "lora_dropout": 0.0}
    result = run_training(*arguments(wide_parts, tmp_path, stage=2, **LORA, **flags))
    frozen = {
        parameter.dtype
        for name, parameter in result.model.get_decoder().named_parameters()
        if "_proj." in name and not parameter.requires_grad
    }
    assert frozen == {torch.bfloat16 if bits == 16 else torch.uint8}
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    losses = logged(result)
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
