"""Connector files: ours, those of LLaVA and of the original system, and those that must be refused."""

import pickle
from pathlib import Path

import pytest
import torch
from family_parts import save_language_model, save_vision_model
from training_parts import arguments, make_language_model

from metamorph.models.connector import load_connector, save_connector
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.build import load_model, resolve_model
from metamorph.training.checkpoints.weights import load_weights


pytestmark = pytest.mark.integration


def build(parts: Path, **flags: object) -> MetaMorphForConditionalGeneration:
    model_args, _, _ = arguments(parts, parts / "unused", stage=2, from_scratch_connector=True, **flags)
    return load_model(model_args, resolve_model(model_args))


@pytest.fixture
def model(parts: Path) -> MetaMorphForConditionalGeneration:
    torch.manual_seed(1)
    return build(parts)


@pytest.fixture
def other(parts: Path) -> MetaMorphForConditionalGeneration:
    torch.manual_seed(2)
    model = build(parts)
    model.get_input_embeddings().weight.data[[382, 383]] = 7.0
    return model


def llava_file(model: MetaMorphForConditionalGeneration, path: Path, rows: int | None = None) -> Path:
    """What the original writes: wrapped names, and the embedding table whose last rows are the new tokens'."""
    tensors = {f"model.mm_projector.{name}": value for name, value in model.model.mm_projector.state_dict().items()}
    table = model.get_input_embeddings().weight.detach()[:384]  # the original has no placeholder token
    tensors["model.embed_tokens.weight"] = table if rows is None else table[-rows:].clone()
    torch.save(tensors, path)
    return path


def assert_same_connector(one: MetaMorphForConditionalGeneration, two: MetaMorphForConditionalGeneration) -> None:
    theirs = two.model.mm_projector.state_dict()
    for name, weight in one.model.mm_projector.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    rows = [one.config.image_start_token_id, one.config.image_end_token_id]
    assert torch.equal(one.get_input_embeddings().weight[rows], two.get_input_embeddings().weight[rows])


@pytest.mark.parametrize("as_folder", [True, False])
def test_connector_round_trip(as_folder: bool, model, other, tmp_path: Path) -> None:
    file = save_connector(other, tmp_path)
    untouched = model.lm_head.weight.clone()
    load_connector(model, tmp_path if as_folder else file)
    assert_same_connector(model, other)
    for name, weight in other.vision_head.state_dict().items():  # it is trained in this configuration
        assert torch.equal(model.vision_head.state_dict()[name], weight)
    assert torch.equal(model.lm_head.weight, untouched)


@pytest.mark.parametrize("rows", [None, 2])
def test_r31_bin_of_llava_and_the_original(rows: int | None, model, other, tmp_path: Path) -> None:
    load_connector(model, llava_file(other, tmp_path / "mm_projector.bin", rows))
    assert_same_connector(model, other)


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_r31_pickles_that_run_code_are_refused(model, tmp_path: Path) -> None:
    file, target = tmp_path / "mm_projector.bin", tmp_path / "attacked"
    torch.save({"model.mm_projector.0.weight": Attack(target)}, file)
    with pytest.raises(ValueError, match="refused, because loading other objects can run code"):
        load_connector(model, file)
    file.write_bytes(pickle.dumps({"x": Attack(target)}))
    with pytest.raises(ValueError, match="refused"):
        load_connector(model, file)
    assert not target.exists()


def test_connector_of_another_tower_names_both_sizes(parts: Path, model, tmp_path: Path) -> None:
    tensors = {f"mm_projector.{name}": value for name, value in model.model.mm_projector.state_dict().items()}
    tensors["mm_projector.0.weight"] = torch.zeros(32, 1152)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"\(32, 1152\).*\(32, 24\).*--vision_tower"):
        load_connector(model, tmp_path)


def test_connector_of_another_type_names_the_flag(parts: Path, other, tmp_path: Path) -> None:
    save_connector(other, tmp_path)
    with pytest.raises(ValueError, match="--mm_projector_type"):
        load_connector(build(parts, mm_projector_type="linear"), tmp_path)


def test_rows_of_another_language_model(parts: Path, model, tmp_path: Path) -> None:
    torch.save(
        {"model.embed_tokens.weight": torch.zeros(2, 99)}
        | {f"model.mm_projector.{name}": value for name, value in model.model.mm_projector.state_dict().items()},
        tmp_path / "mm_projector.bin",
    )
    with pytest.raises(ValueError, match=r"has 99 features, the language model 32.*--model_name_or_path"):
        load_connector(model, tmp_path)


def test_other_settings_than_in_stage_1_are_warned_of(parts: Path, other, tmp_path: Path, caplog) -> None:
    save_connector(other, tmp_path)
    load_connector(build(parts, num_image_tokens=1, normalize_vision=False), tmp_path)
    assert "num_image_tokens=4, this run uses 1" in caplog.text
    assert "normalize_vision=True, this run uses False" in caplog.text


def test_what_is_not_a_connector(parts: Path, model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no connector at .*nowhere"):
        load_connector(model, tmp_path / "nowhere")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="not a connector of stage 1"):
        load_connector(model, tmp_path / "weights.bin")
    (tmp_path / "mm_projector.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is damaged"):
        load_connector(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="pass it as --model_name_or_path"):
        load_connector(model, tmp_path / "model")


def test_token_mixer_travels_with_the_connector(parts: Path, tmp_path: Path) -> None:
    source = build(parts, image_token_reduction="mlpmixer")
    save_connector(source, tmp_path)
    target = build(parts, image_token_reduction="mlpmixer")
    load_connector(target, tmp_path)
    for name, weight in source.model.vision_tower.reduction.state_dict().items():
        assert torch.equal(target.model.vision_tower.reduction.state_dict()[name], weight), name
    with pytest.raises(ValueError, match="--image_token_reduction"):
        load_connector(build(parts), tmp_path)


@pytest.mark.parametrize(
    ("tower", "family"), [("siglip", "smollm"), ("dinov2", "smollm"), ("siglip", "mixtral"), ("siglip", "qwen3_moe")]
)
def test_r25_checkpoint_of_any_family_loads(tower: str, family: str, parts: Path, tmp_path: Path) -> None:
    """The weights of some families are saved under other names, or in other pieces, than the model has them in."""
    flags = {
        "vision_tower": save_vision_model(tmp_path / "tower", tower),
        "model_name_or_path": save_language_model(tmp_path / "llm", family),
        "version": "auto",
    }
    torch.manual_seed(1)
    source, target = build(parts, **flags), build(parts, **flags)
    for weight in source.parameters():
        weight.data += 0.5
    source.save_pretrained(tmp_path / "saved")
    load_weights(target, tmp_path / "saved")
    for name, weight in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], weight), name


def test_sharded_checkpoint_loads(model, other, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_weights(model, tmp_path)
    for name, weight in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    next(tmp_path.glob("model-00001-*")).unlink()
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path)


def test_tied_checkpoint_loads(parts: Path, tmp_path: Path) -> None:
    folder = make_language_model(tmp_path / "tied", tie_word_embeddings=True)
    source = build(parts, model_name_or_path=str(folder))
    source.lm_head.weight.data += 1
    source.save_pretrained(tmp_path / "saved")
    target = build(parts, model_name_or_path=str(folder))
    load_weights(target, tmp_path / "saved")
    assert torch.equal(target.lm_head.weight, source.lm_head.weight)
    assert target.lm_head.weight is target.get_input_embeddings().weight


def test_checkpoint_of_another_model_is_refused(parts: Path, model, tmp_path: Path) -> None:
    build(parts, mm_projector_type="linear").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mm_projector"):
        load_weights(model, tmp_path)
