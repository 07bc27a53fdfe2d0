"""`metamorph convert --from original`: checkpoints and connectors of the original give the original's numbers."""

import json
from pathlib import Path

import pytest
import torch
from golden_parts import GOLDEN, assert_close, golden_batch, golden_model, numbers, tensors
from safetensors.torch import save_file
from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from metamorph.cli import main
from metamorph.models.connector import CONNECTOR_FILE, load_connector, read_connector
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.original import load_original
from metamorph.models.processing_metamorph import MetaMorphProcessor


pytestmark = pytest.mark.integration


FORMATS = ("safetensors", "bin", "shards")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of the golden sizes with other weights: its configuration and image processor are needed."""
    folder = tmp_path_factory.mktemp("tower")
    sizes = numbers("micro/config")
    config = SiglipVisionConfig(**sizes["vision"], layer_norm_eps=sizes["siglip_layer_norm_eps"])
    SiglipVisionModel(config).save_pretrained(folder)
    side = sizes["vision"]["image_size"]
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def original_config(tower: Path) -> dict:
    """`config.json` as the original writes it: Llama's fields, and LLaVA's among them."""
    sizes = numbers("micro/config")
    return {
        **sizes["llama"],
        "model_type": "metamorph_llama",
        "architectures": ["MetaMorphLlamaForCausalLM"],
        "vocab_size": sizes["vocab_size"],
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope_theta": sizes["rope_theta"],
        "tie_word_embeddings": False,
        "bos_token_id": sizes["ids"]["bos"],
        "eos_token_id": sizes["ids"]["eot"],
        "mm_vision_tower": str(tower),
        "mm_hidden_size": sizes["vision"]["hidden_size"],
        "use_mm_proj": True,
        "normalize_vision": True,
        **{
            name: sizes[name]
            for name in (
                "image_token_reduction",
                "mm_projector_type",
                "mm_vision_select_layer",
                "num_image_tokens",
                "vision_head_type",
            )
        },
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
    }


def write_original(folder: Path, tower: Path, form: str = "safetensors", **fields: object) -> Path:
    """A checkpoint folder of the original layout with the golden weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**original_config(tower), **fields}))
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    weights = dict(tensors("micro/weights"))
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = sorted(weights)
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in shards.items():
            torch.save({name: weights[name] for name in held}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_a_converted_checkpoint_gives_the_golden_losses(form: str, tower: Path, tmp_path: Path) -> None:
    original = write_original(tmp_path / "original", tower, form)
    output = tmp_path / "ours"
    assert main(["convert", "--from", "original", "--model", str(original), "--output", str(output)]) == 0
    model, info = MetaMorphForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    batch, reference = golden_batch(), tensors("micro/stage2")
    assert model.config.image_token_id == 384  # as in the batch: the placeholder is the one token that ours adds
    with torch.no_grad():
        result = model(**batch)
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    scalars, known = numbers("micro/scalars")["scalars"]["stage2"], numbers("micro/config")["vocab_size"]
    # Ours has one token more, the placeholder, which the original's softmax does not know: its logit is left out.
    supervised = batch["labels"][:, 1:] != -100
    text_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1][supervised][:, :known], batch["labels"][:, 1:][supervised]
    )
    assert text_loss.item() == pytest.approx(scalars["loss_language"], abs=1e-5)
    assert result.text_loss.item() == pytest.approx(scalars["loss_language"], abs=1e-2)  # a 385th word, of 384
    assert result.visual_loss.item() == pytest.approx(scalars["loss_image_ar"] + 1, abs=1e-5)
    real = batch["attention_mask"].bool()
    assert_close(logits[real][:, :known], reference["logits"][real], tolerance=2e-5)


def test_the_processor_comes_along(tower: Path, tmp_path: Path) -> None:
    model, processor = load_original(write_original(tmp_path, tower))
    assert isinstance(processor, MetaMorphProcessor)
    assert model.config.version == "llama3_original"
    assert (model.config.image_start_token_id, model.config.image_end_token_id) == (382, 383)
    assert processor.end_of_turn_token_ids == model.generation_config.eos_token_id


def test_half_precision(tower: Path, tmp_path: Path) -> None:
    original = write_original(tmp_path / "original", tower)
    flags = ["--model", str(original), "--output", str(tmp_path / "ours"), "--dtype", "bfloat16"]
    assert main(["convert", "--from", "original", *flags]) == 0
    model = MetaMorphForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_without_tower_takes_it_from_elsewhere(tower: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path, tower, mm_vision_tower="somebody/elsewhere")
    kept = {name: value for name, value in tensors("micro/weights").items() if "vision_tower" not in name}
    save_file(kept, folder / "model.safetensors")
    model, _ = load_original(folder, vision_tower=str(tower))
    theirs = SiglipVisionModel.from_pretrained(tower).state_dict()
    for name, weight in model.model.vision_tower.encoder.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_connector_of_the_original(as_folder: bool, tmp_path: Path) -> None:
    weights = tensors("micro/weights")
    kept = {name: value for name, value in weights.items() if "mm_projector" in name}
    file = tmp_path / "stage1" / "mm_projector.bin"
    file.parent.mkdir()
    torch.save({**kept, "model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, file)
    source = file.parent if as_folder else file
    assert main(["convert", "--from", "original", "--model", str(source), "--output", str(tmp_path / "ours")]) == 0
    connector = read_connector(tmp_path / "ours" / CONNECTOR_FILE)
    for name, weight in connector.parts["mm_projector"].items():
        assert torch.equal(weight, weights[f"model.mm_projector.{name}"])
    model = golden_model()
    with torch.no_grad():
        for parameter in model.model.mm_projector.parameters():
            parameter.zero_()
        model.get_input_embeddings().weight[[382, 383]] = 0
    load_connector(model, tmp_path / "ours")
    with torch.no_grad():
        loss = model(**golden_batch()).text_loss.item()
    assert loss == pytest.approx(numbers("micro/scalars")["scalars"]["stage2"]["loss_language"], abs=1e-5)


def test_what_cannot_be_converted(tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_original(tmp_path / "good", tower)
    other = write_original(tmp_path / "other", tower, model_type="gpt2")
    wrong = write_original(tmp_path / "wrong", tower, intermediate_size=99)
    small = write_original(tmp_path / "small", tower)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, small / "model.safetensors")
    cut = write_original(tmp_path / "cut", tower)
    (cut / "model.safetensors").write_bytes(b"cut off")
    deep = write_original(tmp_path / "deep", tower, num_hidden_layers=10**7)
    endless = write_original(tmp_path / "endless", tower)
    save_file(
        {**tensors("micro/weights"), "lm_head.weight": torch.full((384, 32), torch.inf)}, endless / "model.safetensors"
    )
    (tmp_path / "empty").mkdir()
    output = str(tmp_path / "new")
    cases = [
        (["--from", "original", "--model", str(good), "--output", str(good)], "is not an empty folder"),
        (["--from", "original", "--output", output], "needs --model"),
        (["--from", "original", "--model", "/nowhere", "--output", output], "--model /nowhere does not exist"),
        (["--from", "original", "--model", str(tmp_path / "empty"), "--output", output], "has no config.json"),
        (["--from", "original", "--model", str(other), "--output", output], "model_type 'gpt2'"),
        (["--from", "original", "--model", str(wrong), "--output", output], "has shape [32, 80], but its config"),
        (["--from", "original", "--model", str(small), "--output", output], "not a finished model of the original"),
        (["--from", "original", "--model", str(cut), "--output", output], "is damaged"),
        (["--from", "original", "--model", str(deep), "--output", output], "asks for 10000000 layers"),
        (["--from", "original", "--model", str(endless), "--output", output], "lm_head.weight holds NaN or infinite"),
        (["--merge-adapter", str(good), "--output", output], "give the folder of a run with --lora_enable True"),
        (["--merge-adapter", str(good), "--model", "x", "--output", output], "--model x does not exist"),
        (["--merge-adapter", str(good), "--tokenizer", "x", "--output", output], "--tokenizer belongs to --from"),
    ]
    for flags, message in cases:
        assert main(["convert", *flags]) == 2, flags
        assert message in capsys.readouterr().err, flags
    assert not Path(output).exists()


def test_three_layer_heads_are_refused(tower: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path, tower)
    weights = {**tensors("micro/weights"), "vision_head.4.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers 0, 2, 4; heads of one \(linear\) or two"):
        load_original(folder)
