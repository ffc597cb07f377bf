"""Chapter 3. Knowing when to stop: measures of uncertainty, how well they separate, calibration.

An exit head proposes a token. Would the full model choose the same one? The full model itself gives
the labels: a head's token is called correct when it is the full model's most likely token. So
calibration needs text, but no annotation. At run time the answer is one comparison (arXiv
2407.21082, confidence metrics and calibration):

    exit  <=>  uncertainty(logits) < threshold                              is_certain

1. The measure. Let p = softmax(logits), with p1 >= p2 the two largest and z1 >= z2 their logits.
       entropy  -sum p ln p (nats)    max_probability  1 - p1      margin        p2 - p1
       logit_gap  z2 - z1             max_logit  -z1               topk_entropy  of the k largest
   Every measure is lower when the head is more certain.
2. The separation. A good measure puts the wrong tokens last. Order n tokens from certain to
   uncertain. The risk r(i) is the share of wrong ones among the first i; i / n is the coverage.
       AUROC = P(a wrong token is more uncertain than a right one)          higher is better
       AURC  = mean of r(i) over i = 1 .. n                                 lower is better
3. The threshold for a level a, the agreement with the full model that we want.
       plain        the loosest threshold below which 1 - r(i) >= a (the paper's max-coverage)
       in a cascade the same thresholds, when each head sees only what the shallower heads pass on
       conditional  each head calibrated on just those tokens (our addition)
   appendix/certified.py adds a guarantee for samples of limited size.

    python confidence.py                            # the two tables on the toy's heads
    python confidence.py --figure separation.png    # and the figure
Expect a table of measures by exits, a line that says which measure separates best, and a table of
the levels asked for and the agreement obtained on text that calibration has not seen.

Letters: B batch, T positions, V vocabulary, n tokens, M exits.
"""
import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

# ------------------------------------------------------------ measures of uncertainty
# logits (..., V) -> (...), float32. A logit of -inf is a token that is ruled out.


def never_certain_if_broken(uncertainty):
    """Puts +inf, which is never certain, in the place of NaN and of infinite values."""
    return uncertainty.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)


def probabilities(logits):
    """softmax in float32, whatever the logits are."""
    return logits.softmax(-1, dtype=torch.float32)                # (..., V)


def entropy(logits):
    """Shannon entropy in nats, 0 .. ln V."""
    terms = torch.special.entr(probabilities(logits))             # (..., V), -p ln p, 0 at p = 0
    return never_certain_if_broken(terms.sum(-1))


def one_minus_max(logits):
    """1 - the largest probability, 0 .. 1."""
    return never_certain_if_broken(1 - probabilities(logits).amax(-1))


def negative_margin(logits):
    """Second largest minus largest probability ("breaking ties"), -1 .. 0. Needs V >= 2."""
    largest, second = probabilities(logits).topk(2).values.unbind(-1)     # (...) each
    return never_certain_if_broken(second - largest)


def negative_logit_gap(logits):
    """Second largest minus largest logit: ln(p2 / p1), at most 0. V >= 2; needs no softmax."""
    largest, second = logits.topk(2).values.float().unbind(-1)    # (...) each
    second = second.clamp(min=-1e38)                              # finite if one token is left
    return never_certain_if_broken(second - largest)


def negative_max_logit(logits):
    """Minus the largest logit. A constant added to all logits changes this measure alone."""
    return never_certain_if_broken(-logits.amax(-1).float())


def topk_entropy(logits, k=10):
    """Entropy in nats, 0 .. ln k, of the k largest probabilities scaled so that they sum to 1."""
    return entropy(logits.topk(min(k, logits.shape[-1])).values)


MEASURES = {
    "entropy": entropy,
    "max_probability": one_minus_max,
    "margin": negative_margin,
    "logit_gap": negative_logit_gap,
    "max_logit": negative_max_logit,
    "topk_entropy": topk_entropy,
}


def unit_of(name):
    """The unit of a measure's thresholds: "nats" for the entropies, else ""."""
    if name in ("entropy", "topk_entropy"):
        return "nats"
    return ""


def is_certain(uncertainty, threshold):
    """The decision rule, at run time and in calibration: strictly below the threshold.

    A threshold of None means never. uncertainty: a number, array or tensor.
    The answer is of its kind, boolean. NaN and +inf are never certain.
    """
    if threshold is None:
        threshold = -math.inf
    return uncertainty < threshold


# ------------------------------------------------------------ separation


def checked(uncertainty, correct):
    """Both as arrays (n,): float32, as the measures return, and bool. NaN becomes +inf.

    ValueError: they are not two vectors of one length, or correct holds more than true and false.
    """
    uncertainty, correct = np.asarray(uncertainty, dtype=np.float32), np.asarray(correct)
    if uncertainty.ndim != 1 or uncertainty.shape != correct.shape:
        raise ValueError(f"uncertainty and correct must be two vectors of one length, "
                         f"not {uncertainty.shape} and {correct.shape}")
    if correct.dtype != bool and not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must hold only true and false (or 1 and 0), one per token")
    uncertainty = np.where(np.isnan(uncertainty), np.float32(np.inf), uncertainty)
    return uncertainty, correct.astype(bool)


def cumulate(uncertainty, correct):
    """Tokens of one uncertainty stay together. -> values, count, right, each (distinct values,).

    values: the distinct uncertainties in ascending order. count: how many tokens are at most that
    uncertain. right: how many of these are correct.
    """
    values, which, new = np.unique(uncertainty, return_inverse=True, return_counts=True)
    new_right = np.bincount(which, correct, len(values))
    return values, new.cumsum(), new_right.cumsum()


@dataclass
class Separation:
    """How well an uncertainty tells wrong tokens from right ones; all between 0 and 1."""
    auroc: float           # P(wrong is more uncertain than right), ties half; NaN if all are alike
    aurc: float            # area under the risk-coverage curve, lower is better
    coverage: np.ndarray   # (distinct values,) share of tokens that are at most this uncertain
    risk: np.ndarray       # (distinct values,) share of wrong ones among them


def separation(uncertainty, correct):
    """uncertainty (n,), correct (n,) -> Separation. ValueError without tokens.

    Tied tokens enter the two areas as if in random order, and the curve as one step.
    """
    values, count, right = cumulate(*checked(uncertainty, correct))
    if len(count) == 0:
        raise ValueError("separation needs at least one token")
    n, wrong = count[-1], count - right
    # AUROC: for each wrong token, the right ones strictly below it and half of those tied with it
    new_right, new_wrong = np.diff(right, prepend=0), np.diff(wrong, prepend=0)
    right_below = right - new_right / 2
    pairs = right[-1] * wrong[-1]
    auroc = new_wrong @ right_below / pairs if pairs else math.nan
    # AURC: within a tie, the expected number of wrong ones among the first i grows linearly
    i = np.arange(1, n + 1)
    wrong_among = np.interp(i, np.append(0, count), np.append(0, wrong))
    return Separation(
        auroc=float(auroc),
        aurc=float((wrong_among / i).mean()),
        coverage=count / n,
        risk=wrong / count)


# ------------------------------------------------------------ calibration


def check_level(level):
    """ValueError unless a level is in (0, 1]."""
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], not {level}")


def calibrate(uncertainty, correct, level):
    """Plain calibration: the loosest threshold below which the tokens agree at least at `level`.

    This is max-coverage of 2407.21082: the largest i with 1 - r(i) >= level. It promises nothing
    for new tokens: there the agreement may be somewhat below the level.

    uncertainty (n,), correct (n,) -> float, or None where no number of tokens reaches the level.
    Tokens of one uncertainty stay together. The threshold is the float32 next above the last
    accepted value, so that is_certain accepts exactly the tokens counted here.
    ValueError: a level outside (0, 1].
    """
    check_level(level)
    values, count, right = cumulate(*checked(uncertainty, correct))
    enough = (right / count >= level) & (values < np.inf)
    if not enough.any():
        return None
    last = values[enough][-1]
    return float(np.nextafter(last, np.float32(np.inf)))


def calibrate_conditional(uncertainties, correct, level):
    """Plain calibration of each head on the tokens that no shallower head is certain of.

    These are the tokens that reach it. A head that is calibrated on all tokens promises too much in
    a cascade: the easy tokens, on which it would agree, have left before.

    uncertainties (n, M) and correct (n, M), shallow to deep -> [float or None] * M.
    """
    uncertainties, correct = np.asarray(uncertainties, dtype=np.float32), np.asarray(correct)
    if uncertainties.ndim != 2 or uncertainties.shape != correct.shape:
        raise ValueError(f"uncertainties and correct must both be (n, M), "
                         f"not {uncertainties.shape} and {correct.shape}")
    waiting, thresholds = np.ones(len(correct), dtype=bool), []
    for u, right in zip(uncertainties.T, correct.T):
        threshold = calibrate(u[waiting], right[waiting], level)
        thresholds.append(threshold)
        waiting &= ~is_certain(u, threshold)
    return thresholds


def obtained(uncertainty, correct, threshold, waiting=True):
    """What one head does at a threshold -> (agreement, coverage), both 0 .. 1.

    agreement: the share of correct ones among the tokens that exit, NaN if none does.
    coverage: the share of all tokens that exit. Tokens can exit only where `waiting` is true.
    uncertainty (n,) float32, correct (n,) bool.
    """
    leaves = is_certain(uncertainty, threshold) & waiting
    agreement = float(correct[leaves].mean()) if leaves.any() else math.nan
    return agreement, float(leaves.mean())


def cascade(uncertainties, correct, thresholds):
    """What each head does when all decide one after the other -> [(agreement, coverage)] * M.

    A head sees what no shallower head has taken; coverage is still a share of all tokens.
    uncertainties (n, M) float32, correct (n, M) bool, shallow to deep.
    """
    waiting, pairs = np.ones(len(correct), dtype=bool), []
    for u, right, threshold in zip(uncertainties.T, correct.T, thresholds):
        pairs.append(obtained(u, right, threshold, waiting))
        waiting &= ~is_certain(u, threshold)
    return pairs


# ------------------------------------------------------------ what this chapter shows on the toy

LEVELS = (0.80, 0.85, 0.90, 0.95, 0.98)


def compare_measures(calibration, test):
    """Every measure at every exit, on the test tokens; both arguments are a heads.Evaluation.

    -> {measure: [Separation] * M} and {measure: [coverage at level 0.95] * M}.
    The thresholds for the coverage come from the calibration tokens.
    """
    separations, coverages = {}, {}
    for name, u_test in test.uncertainty.items():
        u_cal = calibration.uncertainty[name]                     # (n, M)
        separations[name], coverages[name] = [], []
        for m in range(u_test.shape[1]):
            threshold = calibrate(u_cal[:, m], calibration.agree[:, m], 0.95)
            _, coverage = obtained(u_test[:, m], test.agree[:, m], threshold)
            separations[name].append(separation(u_test[:, m], test.agree[:, m]))
            coverages[name].append(coverage)
    return separations, coverages


def print_measures(separations, coverages, layers):
    """The table of measures by exits, and the verdict below it."""
    print("AUROC: higher is better; AURC: lower; coverage: share of tokens that exit at level 0.95")
    titles = [f"   exit {n:<2} AUROC    AURC coverage" for n in layers]
    print(f"{'measure':<16}" + "".join(titles))
    for name, each in separations.items():
        cells = [f"{s.auroc:17.3f}{s.aurc:8.4f}{c:9.1%}" for s, c in zip(each, coverages[name])]
        print(f"{name:<16}" + "".join(cells))
    # the verdict: who has the lowest AURC at how many exits, and what it means for decoding
    best = []
    for m in range(len(layers)):
        best.append(min(separations, key=lambda name: separations[name][m].aurc))
    winners = [f"{name} at {best.count(name)}" for name in MEASURES if name in best]
    print(f"lowest AURC, of {len(layers)} exits: {', '.join(winners)} "
          "(the paper finds that entropy separates best on Pythia)")
    for name in ("entropy", "margin"):
        shares = [f"{c:.1%}" for c in coverages[name]]
        print(f"tokens that exit at level 0.95 by {name}: {', '.join(shares)}")


def compare_calibrations(u_cal, c_cal, u_test, c_test):
    """Thresholds from the calibration tokens, judged on the test tokens; all arrays are (n, M).

    -> {(method, level): [(agreement, coverage)] * M} for plain, in a cascade, conditional.
    """
    results = {}
    for level in LEVELS:
        plain = [calibrate(u, right, level) for u, right in zip(u_cal.T, c_cal.T)]
        alone = [obtained(u, right, t) for u, right, t in zip(u_test.T, c_test.T, plain)]
        conditional = calibrate_conditional(u_cal, c_cal, level)
        results["plain", level] = alone
        results["in a cascade", level] = cascade(u_test, c_test, plain)
        results["conditional", level] = cascade(u_test, c_test, conditional)
    return results


def print_levels(results, layers):
    """The table of levels, a column a method; {(method, level): [(agreement, coverage)] * M}."""
    methods = list(dict.fromkeys(method for method, _ in results))
    levels = list(dict.fromkeys(level for _, level in results))
    print("exit level" + "".join(f"{method:>17}" for method in methods))
    for m, n in enumerate(layers):
        for level in levels:
            row = f"{n:4} {level:5.0%}"
            for method in methods:
                agreement, coverage = results[method, level][m]
                cell = "never" if math.isnan(agreement) else f"{agreement:.1%} ({coverage:5.1%})"
                row += f"{cell:>17}"
            print(row)


def main():
    from heads import evaluate, load_model, measuring_windows, model_options
    from model import InputError
    parser = argparse.ArgumentParser(description="Uncertainty and calibration of a model's heads.")
    model_options(parser)
    parser.add_argument("--tokens", type=int, default=32_768, help="of each split (%(default)s)")
    parser.add_argument("--measure", choices=MEASURES, help="of the levels (the heads' own)")
    parser.add_argument("--figure", help="also draw the tables to this PNG")
    args = parser.parse_args()
    if args.tokens < 256:
        raise InputError(f"--tokens {args.tokens}: at least one window of 256 tokens is needed")
    if args.figure:
        from appendix import figures
        figures.check(args.figure)
    model, heads, _, text = load_model(args)
    measure, began = args.measure or heads.measure, time.time()
    windows = [measuring_windows(s, args.tokens, text=text) for s in ("calibration", "test")]
    calibration, test = (evaluate(model, heads, ids, MEASURES) for ids in windows)
    print(f"{len(calibration.agree):,} calibration and {len(test.agree):,} test tokens "
          f"in {time.time() - began:.0f} s")
    separations, coverages = compare_measures(calibration, test)
    print_measures(separations, coverages, heads.layers)
    results = compare_calibrations(calibration.uncertainty[measure], calibration.agree,
                                   test.uncertainty[measure], test.agree)
    print(f"\n{measure}: agreement obtained on the test tokens (share of tokens that exit)")
    print_levels(results, heads.layers)
    print("plain: each head alone, on all tokens; in a cascade: the same thresholds,\n"
          "each head on the tokens that reach it; conditional: thresholds for just these tokens")
    if args.figure:
        figures.separation(args.figure, test, separations, results, measure, heads.layers,
                           model.config.num_hidden_layers)
        print(f"wrote {args.figure}")


if __name__ == "__main__":
    from model import command_line
    command_line(main)
