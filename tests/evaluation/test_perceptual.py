"""LPIPS and FID with stand-ins for their networks: TorchScript files of the same interface."""

from __future__ import annotations

import sys

import pytest
import torch
from perceptual_parts import save_networks

from metamorph.evaluation.perceptual import ImageFeatures, frechet_distance, lpips_distances


def test_frechet_distance_of_diagonal_covariances():
    """There it is Σ (μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    base = (base - base.mean(dim=0)) @ torch.linalg.inv(torch.linalg.cholesky(base.T.cov())).T  # covariance 1
    first, second = base * torch.tensor([1.0, 2.0, 3.0]), base * torch.tensor([2.0, 2.0, 1.0]) + 5
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, second) == pytest.approx(3 * 25 + 1 + 0 + 4)


def test_networks_are_asked_for_the_right_features(tmp_path):
    lpips, inception = save_networks(tmp_path)
    black, grey = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    network = ImageFeatures.lpips(lpips)
    assert lpips_distances(network, black, grey) == [300.0, 300.0]
    features = ImageFeatures.inception(inception)(grey)
    assert torch.equal(features, torch.full((2, 2), 10.0, dtype=torch.float64))


def test_fid_without_torchmetrics_is_refused_first(tmp_path, monkeypatch):
    _, inception = save_networks(tmp_path)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"need torchmetrics.*\[evaluate\]"):
        ImageFeatures.inception(inception)


def test_files_that_are_no_networks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--lpips_weights"):
        ImageFeatures.lpips(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(ValueError, match=r"--inception_weights .* is not a TorchScript file"):
        ImageFeatures.inception(tmp_path / "text.pt")
