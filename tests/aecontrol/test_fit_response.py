"""The fit of dose response: against posteriors known by brute force, by METHODS' figures, and against NUTS."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.evidence_table import means_of
from aecontrol.fit_response import _half_normal, _table, criticise, fit_response, model
from aecontrol.response import Evidence, Response

Floats = NDArray[np.float64]


def ladder(
    fluences: Floats,
    seed: int,
    critical: float = 1000.0,
    gain: float = 1.0,
    sd: float = 0.05,
    shared: float = 0.0,
    patches: int = 50,
    exponent: float = 1.0,
    phase: int = 0,
) -> list[Evidence]:
    """Every exposure of a ladder against its first."""
    random = np.random.default_rng(seed)
    evidence = []
    for fluence in fluences[1:]:
        damage = np.exp(-((fluences[0] / critical) ** exponent)) - np.exp(-((fluence / critical) ** exponent))
        score = gain * damage + sd * random.normal(size=patches) + shared * random.normal()
        row = np.ones(patches)
        evidence.append(Evidence(phase, fluences[0] * row, fluence * row, score, sd * row))
    return evidence


def interval(values: Floats) -> tuple[float, float]:
    """Central 90 %."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)


def draws(response: Response) -> tuple[Floats, Floats]:
    """Critical fluence of the first phase and gain."""
    return np.array(response.critical_fluence_e_per_A2[0]), np.array(response.amplitude)


def brute_force(evidence: list[Evidence], reference: float, gain_sd: float) -> tuple[Floats, Floats]:
    """Posterior of log F_c of one phase on a grid, by summing over gain and shared error: grid and mass."""
    logs = np.linspace(np.log(reference) - 2.5, np.log(reference) + 2.5, 601)[:, None, None]
    gain = np.exp(gain_sd * np.linspace(-4.0, 4.0, 201))[None, :, None]
    sd = float(evidence[0].sd[0])
    shared = 0.3 * sd * np.linspace(0.05, 3.95, 24)[None, None, :]
    log_mass = -0.5 * (
        (logs - np.log(reference)) ** 2 / 4.25 + (np.log(gain) / gain_sd) ** 2 + (shared / 0.3 / sd) ** 2
    )
    for part in evidence:
        variance = sd**2 / len(part.score) + shared**2
        expected = gain * (np.exp(-part.first[0] / np.exp(logs)) - np.exp(-part.later[0] / np.exp(logs)))
        log_mass = log_mass - 0.5 * ((part.score.mean() - expected) ** 2 / variance + np.log(variance))
    mass = np.exp(log_mass - log_mass.max()).sum((1, 2))
    return np.exp(logs.ravel()), mass / mass.sum()


@pytest.mark.parametrize("highest", [100.0, 3000.0])
def test_agrees_with_the_posterior_summed_on_a_grid(highest: float) -> None:
    evidence = [  # no scatter within a pair: the grid knows of none beyond the null
        Evidence(part.phase, part.first, part.later, np.full_like(part.score, part.score.mean()), part.sd)
        for part in ladder(np.linspace(0.0, highest, 6), seed=1, shared=0.01)
    ]
    grid, mass = brute_force(evidence, reference=400.0, gain_sd=0.2)
    critical, _ = draws(fit_response(evidence, ["a"], 400.0, gain_sd=0.2, draws=512))
    at = np.interp(np.sort(critical), grid, np.cumsum(mass) - 0.5 * mass)
    assert np.abs(at - (np.arange(512) + 0.5) / 512).max() < 0.07  # Kolmogorov: 1.6 / sqrt(512), p = 0.01


def test_critical_fluence_is_found_beyond_it_and_only_the_slope_before() -> None:
    """The identifiability figures: A = 0.3, F_c = 1000, s = 0.02, 96 patches."""
    near, far = (
        fit_response(ladder(np.linspace(0.0, highest, 9), 3, gain=0.3, sd=0.02, patches=12), ["a"], 1000.0)
        for highest in (100.0, 3000.0)
    )
    (near_critical, near_gain), (critical, _) = draws(near), draws(far)
    low, high = interval(critical)
    assert 850.0 < low < 1000.0 < high < 1250.0
    low, high = interval(near_critical)
    assert high / low > 5.0
    low, high = interval(near_gain / near_critical)
    assert 1.8e-4 < low < 3e-4 < high < 4.2e-4
    assert far.diagnostics["r_hat"] < 1.05
    assert far.diagnostics["effective_draws"] > 500.0


def test_without_evidence_the_prior_is_returned() -> None:
    prior = fit_response([], ["a", "b"], 500.0, gain_sd=0.1)
    first, second = np.log(np.array(prior.critical_fluence_e_per_A2) / 500.0)
    assert prior.method == "prior"
    assert prior.patches == 0
    assert prior.tested_e_per_A2 == (0.0, 0.0)
    assert np.std(first) == pytest.approx(np.sqrt(6.25), rel=0.1)
    assert np.std(first - second) == pytest.approx(np.sqrt(4.5), rel=0.15)
    assert np.std(np.log(prior.amplitude)) == pytest.approx(0.1, rel=0.1)
    assert criticise(prior, []) == 1.0
    free = fit_response([], ["a"], 500.0, gain_sd=None)
    assert np.median(free.amplitude) == pytest.approx(0.674, rel=0.1)  # of the half normal distribution


def test_phases_are_told_apart_and_one_unseen_leans_on_the_others() -> None:
    fluences = np.linspace(0.0, 4000.0, 6)
    evidence = ladder(fluences, 1, critical=1500.0) + ladder(fluences, 2, critical=300.0, phase=1)
    response = fit_response(evidence, ["a", "b", "c"], 100.0, gain_sd=0.1)
    bounds = [interval(np.array(one)) for one in response.critical_fluence_e_per_A2]
    assert 1200.0 < bounds[0][0] < 1500.0 < bounds[0][1] < 1900.0
    assert 200.0 < bounds[1][0] < 300.0 < bounds[1][1] < 420.0
    assert 30.0 < bounds[2][1] / bounds[2][0] < 1000.0  # the prior alone: 3700
    assert response.tested_e_per_A2 == (4000.0, 4000.0, 0.0)


def test_a_first_frame_shows_a_specimen_more_whole_than_not() -> None:
    """A flat score could be that of a phase which the first frame has already destroyed."""
    evidence = [
        Evidence(0, np.full(16, 1e4), np.full(16, 1e4 * k), np.full(16, 0.1), np.full(16, 0.01), "first")
        for k in (2, 3, 4, 5)
    ]
    response = fit_response(evidence, ["a"], 1e5, gain_sd=0.6, metric_sd=0.05)
    assert np.median(response.critical_fluence_e_per_A2[0]) > 1e4


def test_the_same_evidence_gives_the_same_draws_and_leaves_torch_alone() -> None:
    import torch

    evidence = ladder(np.linspace(0.0, 2000.0, 5), 1)
    before = torch.random.get_rng_state()
    first = fit_response(evidence, ["a"], 500.0, gain_sd=0.1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert fit_response(evidence, ["a"], 500.0, gain_sd=0.1) == first
    assert fit_response(evidence, ["a"], 500.0, gain_sd=0.1, seed=1) != first


def test_more_patches_do_not_help_against_an_error_that_pairs_share() -> None:
    fluences = np.linspace(0.0, 3000.0, 6)
    few, many = (
        fit_response(ladder(fluences, 5, shared=0.04, patches=n), ["a"], 500.0, gain_sd=0.1) for n in (50, 5000)
    )
    widths = [np.ptp(np.log(interval(draws(response)[0]))) for response in (few, many)]
    assert widths[1] > 0.5 * widths[0]


def test_a_law_that_does_not_hold_is_noticed() -> None:
    fluences = np.linspace(0.0, 2500.0, 7)
    right, induced = [], []
    for seed in range(4):
        for exponent, found in ((1.0, right), (2.0, induced)):
            evidence = ladder(fluences, seed, shared=0.01, exponent=exponent)
            found.append(criticise(fit_response(evidence, ["a"], 700.0, gain_sd=0.1), evidence))
    assert min(right) > 0.01
    assert max(induced) < 0.01
    evidence = ladder(fluences, 0, shared=0.01, exponent=2.0)
    assert criticise(fit_response(evidence, ["a"], 700.0, exponent=2.0, gain_sd=0.1), evidence) > 0.01


def test_errors_of_comparisons_are_those_of_frames_and_units_simulated() -> None:
    """Covariance of the means of two looks with one first frame, over many simulated places."""
    random, shares, units, patches = np.random.default_rng(0), np.array([0.0, 0.3, 0.7]), 4, 60
    due = random.random((4000, patches, units))
    broken = (due[..., None] < shares).mean(axis=2)
    score = broken + 0.1 / np.sqrt(2.0) * random.normal(size=broken.shape)
    score = score[..., 1:] - score[..., :1]
    true = np.cov(score.mean(axis=1), rowvar=False)
    row, found = np.ones(patches), np.zeros((2, 2))
    for place in score[:200]:
        looks = (Evidence(0, 0.0 * row, (1.0 + look) * row, place[:, look], 0.1 * row, "a", units) for look in (0, 1))
        found += means_of(list(looks), True).error / 200.0
    assert found == pytest.approx(true, rel=0.12)
    apart = [Evidence(0, 0.0 * row, row, score[0, :, 0], 0.1 * row, name) for name in ("a", "b", "")]
    means = means_of([*apart, apart[2]], True)
    assert means.error == pytest.approx(np.diag(np.diag(means.error)))
    assert means.shared == pytest.approx(np.eye(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": np.array([0.1, np.nan])}, "not finite"),
        ({"first": np.array([-1.0, 0.0])}, "negative or falls"),
        ({"later": np.array([0.0, 0.0])}, "negative or falls"),
        ({"sd": np.array([0.0, 0.1])}, "deviation of 0"),
        ({"sd": np.array([0.1])}, "arrays of"),
        ({"phase": 1}, "phase 1 of 1"),
        ({"units": 0.0}, "0.0 bond units"),
    ],
)
def test_bad_evidence_is_refused(change: dict[str, object], words: str) -> None:
    good = {"phase": 0, "first": np.ones(2), "later": np.full(2, 9.0), "score": np.zeros(2), "sd": np.ones(2)}
    with pytest.raises(BadInput, match=words):
        fit_response([Evidence(**(good | change))], ["a"], 500.0)  # type: ignore[arg-type]


def test_bad_questions_are_refused() -> None:
    with pytest.raises(BadInput, match="without phases"):
        fit_response([], [], 500.0)
    with pytest.raises(BadInput, match="reference fluence"):
        fit_response([], ["a"], np.nan)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("highest", [100.0, 3000.0])
def test_agrees_with_nuts(highest: float) -> None:
    import torch
    from pyro.infer import MCMC, NUTS

    fluences = np.linspace(0.0, highest, 6)
    evidence = ladder(fluences, 1, shared=0.01) + ladder(fluences, 2, critical=500.0, shared=0.01, phase=1)
    table = _table(evidence, 2, np.log(400.0), 1.0, None, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chain = MCMC(NUTS(model, full_mass=True, max_tree_depth=7), 600, 300, disable_progbar=True)
        chain.run(table)
    point = chain.get_samples()["point"]
    log_critical = np.log(400.0) + (2.0 * point[:, 2:3] + 0.5 * point[:, :2]).numpy()
    response = fit_response(evidence, ["a", "b"], 400.0, draws=512)
    ours = np.log(np.array(response.critical_fluence_e_per_A2)).T
    gain = _half_normal(point[:, 3]).numpy()
    for theirs, mine in ((log_critical, ours), (gain[:, None], np.array(response.amplitude)[:, None])):
        assert np.abs(theirs.mean(0) - mine.mean(0)).max() < 0.3 * theirs.std(0).min()
        assert mine.std(0) == pytest.approx(theirs.std(0), rel=0.3)
