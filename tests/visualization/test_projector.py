"""The visualization projector against the reference numbers, and its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metamorph.visualization.projector import PROJECTOR_MODES, VisualizationProjector, pad_condition


GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("mlp", "mlp_2layers", "xattn", "xattnffn", "transformer")
CONFIG_KEYS = ("input_dim", "hidden_dim", "output_dim", "num_tokens", "num_layers", "num_heads", "mode")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "projectors.safetensors")


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((GOLDEN / "projectors.json").read_text())


def golden_projector(case: str, tensors: dict, facts: dict) -> VisualizationProjector:
    projector = VisualizationProjector(**{key: facts[case][key] for key in CONFIG_KEYS})
    prefix = f"{case}.w."
    weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    projector.network.load_state_dict(weights)
    return projector


def small_projector(mode: str, **options) -> VisualizationProjector:
    sizes = {"input_dim": 12, "hidden_dim": 16, "output_dim": 8, "num_tokens": 5, "num_heads": 2}
    return VisualizationProjector(mode=mode, **(sizes | options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_equal_the_reference(case, training, tensors, facts):
    projector = golden_projector(case, tensors, facts).train(training)
    with torch.set_grad_enabled(training):
        outputs = projector(tensors["x"])
    torch.testing.assert_close(outputs, tensors[f"{case}.y"], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in projector.parameters()) == facts[case]["params"]


@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_equal_the_reference(case, tensors, facts):
    projector = golden_projector(case, tensors, facts)
    outputs = projector(tensors["x"])
    (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum().backward()
    norm = torch.stack([p.grad.norm() for p in projector.parameters()]).norm()
    assert norm.item() == pytest.approx(facts[case]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("mode", PROJECTOR_MODES)
@pytest.mark.parametrize("extras", [{}, {"normalize_input": True, "num_positions": 4}])
def test_save_and_load_give_equal_outputs(mode, extras, tmp_path):
    projector = small_projector(mode, **extras).eval()
    projector.save_pretrained(tmp_path)
    loaded = VisualizationProjector.from_pretrained(tmp_path)
    tokens = torch.randn(3, 4, 12)
    torch.testing.assert_close(loaded(tokens), projector(tokens), rtol=0, atol=0)


def test_position_embedding_tells_equal_tokens_apart():
    tokens = torch.ones(1, 4, 12)
    plain = small_projector("mlp")(tokens)
    placed = small_projector("mlp", num_positions=4)(tokens)
    assert torch.equal(plain[:, 0], plain[:, 1])
    assert not torch.allclose(placed[:, 0], placed[:, 1])


@pytest.mark.parametrize("tokens", [1, 16, 64, 77, 256])
def test_r45_condition_is_padded_to_77_and_never_beyond(tokens):
    condition = torch.randn(2, tokens, 8)
    padded = pad_condition(condition)
    assert padded.shape == (2, max(tokens, 77), 8)
    assert torch.equal(padded[:, :tokens], condition)
    assert not padded[:, tokens:].any()


@pytest.mark.parametrize("mode", ["xattn", "xattnffn", "transformer"])
def test_r45_modes_with_77_queries_are_not_padded(mode):
    condition = small_projector(mode, num_tokens=77)(torch.randn(2, 9, 12))
    assert pad_condition(condition) is condition


def test_tokens_of_another_tower_are_refused():
    with pytest.raises(ValueError, match="another vision tower"):
        small_projector("mlp")(torch.randn(1, 4, 13))
    with pytest.raises(ValueError, match="position embeddings"):
        small_projector("mlp", num_positions=4)(torch.randn(1, 9, 12))


@pytest.mark.parametrize(
    ("mode", "options", "flag"),
    [
        ("mpl", {}, "--mode"),
        ("mlp", {"num_layers": 0}, "--num_layers"),
        ("xattn", {"num_heads": 3}, "--num_heads"),
        ("transformer", {"num_heads": 3}, "--hidden_dim"),
    ],
)
def test_wrong_values_name_the_flag(mode, options, flag):
    with pytest.raises(ValueError, match=flag):
        small_projector(mode, **options)
