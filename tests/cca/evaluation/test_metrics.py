"""Metrics compared with the figures of the published evaluator."""

import numpy as np
import pytest
import torch
from golden_models import golden

from cca.evaluation.metrics import (
    Gaussian,
    RunningGaussian,
    ball_radii,
    frechet_distance,
    inception_score,
    precision_recall,
)

FIGURES = {key: value.numpy() for key, value in golden("metrics").items()}
REFERENCE, SAMPLES = FIGURES["reference_features"], FIGURES["sample_features"]


def test_fid():
    distance = frechet_distance(Gaussian.of(SAMPLES), Gaussian.of(REFERENCE))
    assert distance == pytest.approx(float(FIGURES["fid"]), rel=1e-6)


def test_inception_score():
    assert inception_score(FIGURES["class_probabilities"]) == pytest.approx(
        float(FIGURES["inception_score"]), rel=1e-6
    )


def test_inception_score_is_the_mean_over_splits():
    """A split holds consecutive images in the order of the file."""
    splits = FIGURES["class_probabilities"].reshape(4, 500, 10)
    expected = np.mean([inception_score(part) for part in splits])
    assert inception_score(FIGURES["class_probabilities"], split=500) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block", [137, 5000])
def test_precision_and_recall(block):
    assert precision_recall(SAMPLES, REFERENCE, block=block) == (
        float(FIGURES["precision"]),
        float(FIGURES["recall"]),
    )


def test_radii():
    for features, name in ((REFERENCE, "reference_radii"), (SAMPLES, "sample_radii")):
        np.testing.assert_allclose(
            ball_radii(torch.from_numpy(features).double()), FIGURES[name][:, 0], rtol=1e-5
        )


def test_identical_sets_with_singular_covariance():
    flat = np.concatenate([SAMPLES, SAMPLES[:, :5]], axis=1)
    assert frechet_distance(Gaussian.of(flat), Gaussian.of(flat)) == pytest.approx(0, abs=1e-6)
    assert precision_recall(flat, flat) == (1.0, 1.0)


def test_running_gaussian_far_from_zero():
    features = np.random.default_rng(0).normal(1e4, 1, (1000, 5))
    running = RunningGaussian()
    for part in np.array_split(features, 7):
        running.add(part)
    np.testing.assert_allclose(running.fit().sigma, np.cov(features, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(Gaussian.of(features).mu, features.mean(0), rtol=1e-12)
