"""Model cards and the resumable training loop of the asset builds."""

import json

import pytest
import torch
from torch import nn

from metamorph.mini import ASSETS, AssetError, asset_path
from tools.miniature import build_llama, build_sd, build_siglip
from tools.miniature.cards import AssetCard, verify_asset, verify_folder, write_card
from tools.miniature.probes import PROBE_NAMES
from tools.miniature.rebuild import rebuild
from tools.miniature.training_state import TrainingSchedule, train


CARD = AssetCard(
    name="mini-test",
    summary="A test.",
    build_command="none",
    seed=7,
    seconds=3600.0,
    recipe={"steps": 10},
    figures={"singles": {"shape": 0.99}, "loss": 0.1},
    gates={"shape": 0.97},
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part" / "weights.bin").write_bytes(b"1234")
    write_card(tmp_path, CARD)
    return tmp_path


def test_card_keeps_its_facts(folder):
    card = verify_folder(folder)
    assert (card.name, card.seed, card.recipe, card.gates) == ("mini-test", 7, {"steps": 10}, {"shape": 0.97})
    assert card.figures == {"singles": {"shape": 0.99}, "loss": 0.1}
    assert set(card.sha256) == {"config.json", "part/weights.bin"}
    assert "| singles.shape | 0.99 | 0.97 |" in (folder / "README.md").read_text()


def test_changed_missing_and_unknown_files_are_named(folder):
    (folder / "part" / "weights.bin").write_bytes(b"4321")
    (folder / "config.json").unlink()
    (folder / "extra.txt").write_text("?")
    with pytest.raises(AssetError, match=r"missing \['config.json'\].*changed \['part/weights.bin'\].*extra.txt"):
        verify_folder(folder)


def test_folder_without_card_is_an_error(tmp_path):
    with pytest.raises(AssetError, match="model card"):
        verify_folder(tmp_path)


def test_unknown_asset_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match="mini-siglip"):
        asset_path("mini-clip")
    with pytest.raises(ValueError, match="choose among mini-siglip"):
        rebuild(["clip"], tmp_path)


class _Regression:
    """A linear regression whose data of step n depend on n alone."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)

    def loss_of_step(self, step):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean(), {}


class _Interrupted(Exception):
    pass


def test_resumed_training_equals_uninterrupted(tmp_path):
    schedule = TrainingSchedule(steps=20, learning_rate=0.05, warmup_steps=3, save_every=5)
    uninterrupted, parts = _Regression(), _Regression()
    train(
        uninterrupted.model,
        schedule,
        uninterrupted.loss_of_step,
        tmp_path / "uninterrupted",
        fingerprint="x",
        resume=False,
    )

    def stop_at_12(step):
        if step == 12:
            raise _Interrupted
        return parts.loss_of_step(step)

    with pytest.raises(_Interrupted):
        train(parts.model, schedule, stop_at_12, tmp_path / "parts", fingerprint="x", resume=True)
    again = _Regression()
    train(again.model, schedule, again.loss_of_step, tmp_path / "parts", fingerprint="x", resume=True)
    torch.testing.assert_close(again.model.weight, uninterrupted.model.weight, rtol=0, atol=0)


def test_state_of_another_recipe_is_not_resumed(tmp_path, caplog):
    schedule = TrainingSchedule(steps=4, learning_rate=0.05, warmup_steps=1)
    first, second, fresh = _Regression(), _Regression(), _Regression()
    train(first.model, schedule, first.loss_of_step, tmp_path, fingerprint="seed 0", resume=True)
    train(second.model, schedule, second.loss_of_step, tmp_path, fingerprint="seed 1", resume=True)
    train(fresh.model, schedule, fresh.loss_of_step, tmp_path / "fresh", fingerprint="seed 1", resume=False)
    torch.testing.assert_close(second.model.weight, fresh.model.weight, rtol=0, atol=0)
    assert "starting over" in caplog.text


def test_loss_that_is_not_finite_stops_the_build(tmp_path):
    schedule = TrainingSchedule(steps=2, learning_rate=0.05, warmup_steps=1)
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, schedule, lambda _: (model.weight.sum() * torch.inf, {}), tmp_path, fingerprint="", resume=False)


GOOD = dict.fromkeys(PROBE_NAMES, 1.0)


@pytest.mark.parametrize(
    ("build", "low", "missed"),
    [
        (build_llama, {"vqa": {"all": 0.96, "yes_no": 0.7}, "facts": 0.9}, r"vqa\.yes_no.*facts"),
        (build_sd, {**dict.fromkeys(build_sd.GATES, 1.0), "attributes.pairs": 0.5}, r"attributes\.pairs.*0\.5"),
        (build_siglip, {"singles": GOOD, "pairs": {**GOOD, "size": 0.5}}, r"pairs\.size"),
    ],
)
def test_shipped_parts_match_their_cards_and_pass_gates_that_low_figures_miss(build, low, missed):
    card = verify_asset(build.NAME)
    assert card.figures.keys() >= low.keys()
    build.check_gates(card.figures)
    with pytest.raises(AssetError, match=missed):
        build.check_gates(low)


def test_cards_of_llama_and_sd_state_what_is_promised():
    assert verify_asset("mini-llama").gates == build_llama.GATES
    assert sum(path.stat().st_size for path in asset_path("mini-sd").rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize("name", ASSETS)
def test_shipped_files_name_no_folder_of_the_builder(name):
    for path in asset_path(name).rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_a_card_is_written_without_the_builders_folders(tmp_path):
    config = {"hidden_size": 8, "text_config": {"_name_or_path": "/home/builder/llama", "layers": [{"size": 2}]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, CARD)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "hidden_size": 8,
        "text_config": {"layers": [{"size": 2}]},
    }
    verify_folder(tmp_path)
