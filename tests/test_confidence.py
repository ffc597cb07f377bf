"""Chapter 3: measures against direct float64 computations, separation against hand-made and
brute-force values, calibration against its definition, the chapter's tables and figure."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, call, run

import confidence
from appendix import figures
from confidence import (MEASURES, calibrate, calibrate_conditional, cascade, is_certain, obtained,
                        separation)

INF = math.inf


# ------------------------------------------------------------ measures


def entropy_of(row):
    """Entropy in nats of the softmax of a list of logits."""
    exponentials = [math.exp(x - max(row)) for x in row]
    total = sum(exponentials)
    return -sum(x / total * math.log(x / total) for x in exponentials if x)


def by_definition(z, k=10):
    """All measures of one row of logits, in plain float64 Python, in the order of MEASURES."""
    top = sorted(z, reverse=True)
    exponentials = [math.exp(x - top[0]) for x in top]
    p = [x / sum(exponentials) for x in exponentials]
    return [entropy_of(top), 1 - p[0], p[1] - p[0], top[1] - top[0], -top[0], entropy_of(top[:k])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_measures_equal_their_definition(dtype, scale):
    z = (torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    rows = [by_definition(row.double().tolist()) for row in z.flatten(0, 1)]
    expected = torch.tensor(rows).view(2, 3, len(MEASURES))
    for i, measure in enumerate(MEASURES.values()):
        u = measure(z)
        assert u.dtype == torch.float32 and u.shape == (2, 3)
        torch.testing.assert_close(u, expected[..., i].float(), rtol=1e-5, atol=1e-6)


def test_closed_forms():
    flat = torch.zeros(1, 64)
    assert confidence.entropy(flat).item() == pytest.approx(math.log(64), rel=1e-6)
    assert confidence.topk_entropy(flat, k=8).item() == pytest.approx(math.log(8), rel=1e-6)
    assert confidence.one_minus_max(flat).item() == pytest.approx(63 / 64)
    assert confidence.negative_margin(flat).item() == 0
    assert confidence.negative_logit_gap(flat).item() == 0
    torch.testing.assert_close(confidence.topk_entropy(flat, k=999), confidence.entropy(flat))


def test_measures_fall_as_the_favourite_grows():
    z = torch.randn(30, generator=torch.Generator().manual_seed(2)).repeat(20, 1)
    z[:, 7] = torch.linspace(3, 9, 20)
    for measure in MEASURES.values():
        assert (measure(z).diff() < 0).all()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_extreme_logits(measure):
    big = torch.tensor([[1e4, -1e4, 0.0, -1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, -1e4]])
    assert torch.isfinite(measure(big)).all()
    assert measure(big)[0] <= measure(big)[2]
    z = torch.tensor([[2.0, 1.0, -INF, 0.5, -INF]])
    # ruled out is the same as not there
    torch.testing.assert_close(measure(z), measure(z[:, [0, 1, 3]]))
    # one token left: as certain as can be
    assert measure(torch.tensor([[1.0, -INF, -INF]])).isfinite().all()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_broken_logits_are_never_certain(measure, dtype):
    for bad in (math.nan, INF):
        for at in range(4):
            z = torch.tensor([[9.0, 1.0, 0.0, -5.0], [9.0, 1.0, 0.0, -5.0]], dtype=dtype)
            z[0, at] = bad
            u = measure(z)
            assert u[0] == INF and torch.isfinite(u[1])
            assert not is_certain(u, 3e38)[0] and not is_certain(u, INF)[0]
    # nothing left to choose
    assert measure(torch.full((1, 4), -INF, dtype=dtype)) == INF


def test_names_and_units():
    names = ["entropy", "max_probability", "margin", "logit_gap", "max_logit", "topk_entropy"]
    assert list(MEASURES) == names
    assert [confidence.unit_of(name) for name in names] == ["nats", "", "", "", "", "nats"]


def test_is_certain_is_strict_and_none_is_never():
    for kind in (torch.tensor, np.array):
        u = kind([-INF, 0.5, 1.0, math.nan, INF])
        assert is_certain(u, 1.0).tolist() == [True, True, False, False, False]
        assert not is_certain(u, None).any()
    assert is_certain(0.5, 1.0) and not is_certain(1.0, 1.0) and not is_certain(0.5, None)


# ------------------------------------------------------------ separation


def test_separation_by_hand():
    s = separation([1, 2, 3, 4], [True, True, False, True])
    assert s.auroc == pytest.approx(2 / 3)                         # 3 pairs, the wrong one wins two
    assert s.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert s.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert s.aurc == pytest.approx((1 / 3 + 1 / 4) / 4)


def test_separation_in_the_limits():
    best = separation([0, 1, 2, 3], [1, 1, 0, 0])
    worst = separation([3, 2, 1, 0], [1, 1, 0, 0])
    tied = separation([5, 5, 5, 5], [1, 1, 0, 0])
    assert best.auroc == 1
    assert best.aurc == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)   # the ideal order
    assert worst.auroc == 0 and tied.auroc == 0.5
    assert tied.aurc == 0.5 and tied.risk.tolist() == [0.5] and tied.coverage.tolist() == [1]
    all_right = separation([1, 2], [1, 1])
    assert math.isnan(all_right.auroc) and all_right.aurc == 0


def test_separation_equals_brute_force_with_ties():
    for seed in range(5):
        generator = np.random.default_rng(seed)
        u, correct = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.6
        s = separation(u, correct)
        wrong, right = u[~correct, None], u[correct]
        pairs = (wrong > right) + 0.5 * (wrong == right)
        assert s.auroc == pytest.approx(pairs.mean())
        # AURC: the mean over 4,000 random orders of the ties
        noise = generator.random((4000, 40))
        order = np.lexsort((noise, np.broadcast_to(u, noise.shape)))
        risk = np.cumsum(~correct[order], axis=1) / np.arange(1, 41)
        areas = risk.mean(1)
        assert s.aurc == pytest.approx(areas.mean(), abs=5 * areas.std() / 4000**0.5)


# ------------------------------------------------------------ calibration


def test_calibrate_takes_the_largest_prefix_by_hand():
    u, correct = np.float32([0.1, 0.2, 0.3, 0.4, 0.5]), [1, 0, 1, 1, 0]
    # agreement of the most certain 1 .. 5: 1, 1/2, 2/3, 3/4, 3/5
    assert is_certain(u, calibrate(u, correct, 0.75)).tolist() == [True, True, True, True, False]
    assert is_certain(u, calibrate(u, correct, 0.9)).tolist() == [True] + 4 * [False]
    assert is_certain(u, calibrate(u, correct, 0.6)).all()
    assert calibrate([1, 2], [0, 0], 0.5) is None and calibrate([], [], 0.5) is None


def test_calibrate_against_all_thresholds():
    """The largest {u <= value} that agrees enough is accepted; in float32 exactly it exits."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        u = np.round(generator.random(60), 1 + seed % 3).astype(np.float32)
        u *= np.float32(10.0 ** generator.integers(-30, 30))
        correct = generator.random(60) < 1 - 0.6 * u / u.max()
        level = generator.choice([0.6, 0.8, 0.9])
        enough = [value for value in np.unique(u) if correct[u <= value].mean() >= level]
        threshold = calibrate(u, correct, level)
        expected = u <= max(enough) if enough else np.zeros(60, bool)
        assert (is_certain(u, threshold) == expected).all()
        assert (is_certain(torch.tensor(u), threshold).numpy() == expected).all()
        assert threshold is None or float(np.float32(threshold)) == threshold


def test_calibrate_never_splits_ties_nor_accepts_broken_rows():
    assert calibrate([1, 1, 1], [1, 1, 0], 0.9) is None
    threshold = calibrate([0, 1, INF, math.nan], [1, 1, 1, 1], 0.5)
    assert not is_certain(np.float32([INF, math.nan]), threshold).any()
    assert calibrate([INF, math.nan], [1, 1], 0.5) is None
    u = np.zeros(10, np.float32)
    assert is_certain(u, calibrate(u, np.arange(10) < 9, 0.9)).all()   # 9 / 10 >= 0.9 holds exactly


def test_bad_input():
    with pytest.raises(ValueError, match="one length"):
        calibrate([1, 2], [1], 0.9)
    with pytest.raises(ValueError, match="only true and false"):
        calibrate([1, 2], [1, 3], 0.9)
    for level in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="level"):
            calibrate([1], [1], level)
    with pytest.raises(ValueError, match="at least one"):
        separation([], [])
    with pytest.raises(ValueError, match="M"):
        calibrate_conditional([1, 2], [1, 1], 0.9)


def test_obtained_and_cascade_by_hand():
    u = np.float32([[0, 0], [2, 0], [2, 0], [2, 2]])
    correct = np.array([[1, 1], [0, 1], [0, 0], [0, 0]], bool)
    assert obtained(u[:, 1], correct[:, 1], 1.0) == (2 / 3, 3 / 4)
    assert math.isnan(obtained(u[:, 1], correct[:, 1], None)[0])
    assert cascade(u, correct, [1.0, 1.0]) == [(1, 1 / 4), (1 / 2, 2 / 4)]


def test_conditional_calibrates_on_what_is_left():
    generator = np.random.default_rng(3)
    z = generator.random((20_000, 1))
    u = (z + 0.1 * generator.random((20_000, 3))).astype(np.float32)
    correct = generator.random((20_000, 3)) < np.clip([1.1, 1.2, 1.3] - z, 0, 0.99)
    thresholds = calibrate_conditional(u, correct, 0.9)
    # the definition, head by head
    left = np.ones(20_000, bool)
    for m, threshold in enumerate(thresholds):
        assert threshold == calibrate(u[left, m], correct[left, m], 0.9)
        left &= ~(u[:, m] < threshold)
    alone = [calibrate(u[:, m], correct[:, m], 0.9) for m in range(3)]
    assert thresholds[0] == alone[0]
    assert all(agreement >= 0.9 for agreement, _ in cascade(u, correct, thresholds))
    # the promise of thresholds from all tokens breaks on what reaches the head
    assert all(agreement < 0.89 for agreement, _ in cascade(u, correct, alone)[1:])


# ------------------------------------------------------------ the chapter's tables and figure


def pretended(seed):
    """As heads.evaluate: two heads see the full model's logits, with much and with little noise."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(2400, 12, generator=generator) * 3
    noise = torch.randn(2, 2400, 12, generator=generator)
    logits = torch.stack([full + 3 * noise[0], full + noise[1]], 1)   # (n, M, V)
    agree = logits.argmax(-1) == full.argmax(-1)[:, None]
    uncertainty = {name: measure(logits).numpy() for name, measure in MEASURES.items()}
    return SimpleNamespace(uncertainty=uncertainty, agree=agree.numpy())


def test_tables_and_figure(tmp_path, capsys):
    calibration, test = pretended(0), pretended(1)
    separations, coverages = confidence.compare_measures(calibration, test)
    confidence.print_measures(separations, coverages, [1, 2])
    out = capsys.readouterr().out
    # the verdict
    assert all(name in out for name in MEASURES)
    for name in MEASURES:
        wins = 0
        for m in range(2):
            wins += separations[name][m].aurc == min(each[m].aurc for each in separations.values())
        assert (f"{name} at {wins}" in out) == (wins > 0)
    for name in ("entropy", "margin"):
        shares = ", ".join(f"{share:.1%}" for share in coverages[name])
        assert f"by {name}: {shares}" in out
    # the levels
    u, u_test = calibration.uncertainty["entropy"], test.uncertainty["entropy"]
    results = confidence.compare_calibrations(u, calibration.agree, u_test, test.agree)
    leaves = u_test[:, 1] < calibrate(u[:, 1], calibration.agree[:, 1], 0.9)
    assert results["plain", 0.9][1] == (test.agree[leaves, 1].mean(), leaves.mean())
    confidence.print_levels(results, [1, 2])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(confidence.LEVELS)
    confidence.print_levels({("plain", 0.9): [(math.nan, 0.0), (0.5, 0.25)]}, [1, 2])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert "never" in rows[0] and "50.0% (25.0%)" in rows[1]
    # the figure
    path = tmp_path / "f.png"
    figures.separation(path, test, separations, results, "entropy", [1, 2], 4)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and list(tmp_path.iterdir()) == [path]


def test_chapter_on_the_toy():
    status, out, errors = call(confidence, "--tokens", 512, "--measure", "margin")
    assert status == 0, errors
    assert "510 calibration and 510 test tokens" in out
    assert "margin: agreement obtained on the test tokens" in out


def test_bad_options(tmp_path):
    assert_refused(call(confidence, "--tokens", 255), "--tokens", "256")
    assert_refused(call(confidence, "--figure", "x.txt"), "--figure", ".png")
    assert_refused(call(confidence, "--figure", tmp_path / "no" / "x.png"), "--figure", "folder")
    assert_refused(call(confidence, "--measure", "luck"), "--measure", "luck")
    assert_refused(run("confidence.py", "--heads", tmp_path / "none"), "none", "train.py")
