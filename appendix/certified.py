"""Appendix: a threshold with a guarantee, for a calibration sample of limited size.

Plain calibration takes the loosest threshold whose calibration tokens agree at least at the level.
It chooses among many thresholds, with the labels that judge them, so it is often a little too
loose: new tokens agree less than the level (in the simulation of the tests, for more than a third
of the samples). A certificate makes a promise about the draw of the calibration tokens:

    P(agreement on new tokens < level) <= delta.

The idea is "learn then test" (Angelopoulos et al. 2021), and our addition to 2407.21082.

1. *One threshold, chosen without these tokens.* Let n tokens be below it, x of them right. If the
   true agreement a is below the level, x is Binomial(n, a), and so many right ones are rare: the
   chance is at most P(Binomial(n, level) >= x). The threshold is accepted if this number is at most
   delta. So a bad threshold is accepted with probability delta at most.
2. *Many thresholds.* A fifth of the tokens places the candidates. The others test them, from strict
   to loose, and the first failure ends the sequence. To go wrong, a sequence must pass the first
   bad threshold that it meets. So the whole sequence errs with probability delta at most.
3. *More than one start.* A head may be wrong on just its most certain tokens. A sequence from the
   strict end then ends at once. So delta is dealt out at several places, and a test that is passed
   hands its share on (fixed-sequence testing with fallback, Wiens 2003). One half is dealt out
   evenly. The other half goes to the threshold that looks best on the fifth that placed it. The
   testing tokens have no part in this choice, so the promise holds.

What it assumes: the tokens are independent, and later ones are drawn as they are. Tokens of one
text are not independent: n of them say less than n, and the promise can be broken more often than
delta says. The remedy is `groups`: of each block of neighbours one token is kept. Fewer tokens are
left then, and fewer certificates are found.

    python -m appendix.certified        # plain, certified and blockwise columns, on the toy's heads
"""
import argparse
import math

import numpy as np

from confidence import (LEVELS, MEASURES, calibrate, check_level, checked, cumulate, obtained,
                        print_levels)
from heads import evaluate, load_model, measuring_windows, model_options
from model import InputError, command_line, seed_number

STEPS = 100      # thresholds that are tried
STARTS = 5       # evenly spread places where a sequence of tests starts; one more is chosen
PLACING = 0.2    # share of the tokens that places the thresholds
BLOCK = 16       # neighbouring tokens of which the blockwise certificate keeps one


def binomial_tail(successes, trials, p):
    """P(X >= successes) for X ~ Binomial(trials, p), 0 < p < 1: the exact sum.

    It is summed in logarithms, against underflow.
    The Clopper-Pearson lower bound with confidence 1 - delta is the p at which this is delta. So
    the bound is at least `level` exactly when binomial_tail(successes, trials, level) <= delta.
    """
    n, x = int(trials), int(successes)
    # ln P(X = x)
    ways = math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)
    first = ways + x * math.log(p) + (n - x) * math.log1p(-p)
    # ln of P(X = i + 1) / P(X = i), summed up, for all that follow
    i = np.arange(x, n)
    ratios = np.log((n - i) / (i + 1)) + math.log(p) - math.log1p(-p)
    logs = first + np.append(0, np.cumsum(ratios))
    largest = logs.max()
    return min(1.0, math.exp(largest) * float(np.exp(logs - largest).sum()))


def one_of_each(order, groups, generator):
    """Keeps the first token of each group in `order`, a permutation -> their new order."""
    if np.shape(groups) != order.shape:
        raise ValueError(f"groups must name the document or block of each of {len(order)} tokens")
    _, first = np.unique(np.asarray(groups)[order], return_index=True)
    return generator.permutation(order[first])


def candidates(placing, testing_size, level, delta):
    """Thresholds to test, ascending, from the uncertainties of the placing tokens; perhaps none.

    They are quantiles in geometric steps. A test with no error at all needs ln delta / ln level
    tokens to pass. The strictest threshold expects twice as many testing tokens below it; if there
    are not that many testing tokens, there is no threshold.
    """
    if level == 1 or len(placing) == 0:
        return np.array([])
    needed = 2 * math.log(delta) / math.log(level)
    if needed > testing_size:
        return np.array([])
    shares = np.geomspace(needed / testing_size, 1, STEPS)
    ranks = np.ceil(shares * (len(placing) - 1)).astype(int)
    thresholds = np.sort(placing)[ranks]
    return np.unique(thresholds[thresholds < np.inf])


def deal(thresholds, uncertainty, correct, level, delta):
    """How delta is dealt out before the tests -> {index of a threshold: its share}, sum delta.

    uncertainty and correct are the placing tokens'. The chosen threshold is the one whose excess of
    right ones over the level is the most standard deviations of Binomial(n, level).
    """
    places = {len(thresholds) * s // STARTS for s in range(STARTS)}
    shares = {place: delta / 2 / len(places) for place in places}
    values, count, right = cumulate(uncertainty, correct)
    below = np.searchsorted(values, thresholds)                   # distinct values below each
    n, x = np.append(0, count)[below], np.append(0, right)[below]
    excess = (x - n * level) / np.sqrt(np.maximum(n, 1) * level * (1 - level))
    excess[n == 0] = -math.inf
    chosen = int(excess.argmax())
    shares[chosen] = shares.get(chosen, 0) + delta / 2
    return shares


def calibrate_certified(uncertainty, correct, level, delta=0.05, groups=None, seed=0):
    """A threshold below which new tokens agree at least at `level`, with probability 1 - delta.

    The probability is over the draw of the calibration tokens. These must be independent. If they
    are not, give `groups`, the document or block of each token: one token of each group, drawn with
    the seed, is used. The groups must be independent then, and the promise is about a random token
    of a random group.
    One promise covers one head at one level; M heads at once need delta / M each.

    uncertainty (n,), correct (n,), groups (n,) or None -> float, or None: nothing was certified.
    ValueError: a level outside (0, 1], a delta outside (0, 1), groups of another length.
    """
    check_level(level)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), not {delta}")
    uncertainty, correct = checked(uncertainty, correct)
    # 1. a random fifth of the tokens places the thresholds and deals out delta
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(correct))
    if groups is not None:
        order = one_of_each(order, groups, generator)
    placing, testing = np.split(order, [round(PLACING * len(order))])
    thresholds = candidates(uncertainty[placing], len(testing), level, delta)
    if len(thresholds) == 0:
        return None
    shares = deal(thresholds, uncertainty[placing], correct[placing], level, delta)
    # 2. for the others all this is constant: how many are below each threshold, how many right?
    values, count, right = cumulate(uncertainty[testing], correct[testing])
    below = np.searchsorted(values, thresholds)                   # distinct values below each
    # 3. the tests, from strict to loose: the loosest accepted threshold is the answer
    accepted, alpha = None, 0
    for step, (threshold, j) in enumerate(zip(thresholds, below)):
        alpha += shares.get(step, 0)
        # a test that is passed hands its alpha to the next one; one that fails loses it
        if alpha and j and binomial_tail(right[j - 1], count[j - 1], level) <= alpha:
            accepted = float(threshold)
        else:
            alpha = 0
    return accepted


def blocks_of(windows, length, size=BLOCK):
    """The block of each of `windows` x `length` tokens; no block crosses the end of a window."""
    window, position = np.divmod(np.arange(windows * length), length)
    return window * (length // size + 1) + position // size


def compare_certificates(u_cal, c_cal, u_test, c_test, blocks, delta=0.05, seed=0):
    """Thresholds from the calibration tokens, judged on the test tokens.

    u and c (n, M) are uncertainties of one measure and correct; blocks (n,)
    -> {(method, level): [(agreement, coverage)] * M} for plain, certified, blockwise.
    """
    results = {}
    for level in LEVELS:
        thresholds = {"plain": [], "certified": [], "blockwise": []}
        for u, right in zip(u_cal.T, c_cal.T):
            thresholds["plain"].append(calibrate(u, right, level))
            alone = calibrate_certified(u, right, level, delta, seed=seed)
            thresholds["certified"].append(alone)
            kept = calibrate_certified(u, right, level, delta, groups=blocks, seed=seed)
            thresholds["blockwise"].append(kept)
        for method, each in thresholds.items():
            heads = zip(u_test.T, c_test.T, each)
            results[method, level] = [obtained(u, right, t) for u, right, t in heads]
    return results


def main():
    parser = argparse.ArgumentParser(description="Thresholds with a guarantee.")
    model_options(parser)
    parser.add_argument("--tokens", type=int, default=32_768, help="of each split (%(default)s)")
    parser.add_argument("--measure", choices=MEASURES, help="of uncertainty (the heads' own)")
    parser.add_argument("--delta", type=float, default=0.05, help="of an error (%(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0,
                        help="of the placing tokens (%(default)s)")
    args = parser.parse_args()
    if args.tokens < 256:
        raise InputError(f"--tokens {args.tokens}: at least one window of 256 tokens is needed")
    if not 0 < args.delta < 1:
        raise InputError(f"--delta {args.delta} is not between 0 and 1")
    model, heads, _, text = load_model(args)
    measure = args.measure or heads.measure
    chosen = {measure: MEASURES[measure]}
    windows = measuring_windows("calibration", args.tokens, text=text)    # (windows, 256)
    calibration = evaluate(model, heads, windows, chosen)
    test = evaluate(model, heads, measuring_windows("test", args.tokens, text=text), chosen)
    blocks = blocks_of(len(windows), windows.shape[1] - 1)        # (n,)
    results = compare_certificates(calibration.uncertainty[measure], calibration.agree,
                                   test.uncertainty[measure], test.agree,
                                   blocks, args.delta, args.seed)
    print(f"{measure}: agreement obtained on {len(test.agree):,} test tokens (share of tokens that "
          f"exit), delta = {args.delta}")
    print_levels(results, heads.layers)
    print("certified: assumes independent tokens, which those of one text are not\n"
          f"blockwise: certified on one token of {BLOCK} neighbours: closer to independent\n"
          "each head alone, on all tokens; never: no threshold was found")


if __name__ == "__main__":
    command_line(main)
