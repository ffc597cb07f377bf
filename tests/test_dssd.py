"""Chapter 5: DSSD equals its definition and plain decoding, nothing twice, exact sampling, the
accounts."""
import math
import os
import random
from collections import Counter
from itertools import product

import pytest
import torch

import dssd as D
from conftest import assert_refused, call, run, shaken, tiny
from dssd import (DSSD, AutoDSSD, ByGain, Costs, EarlyExit, LayerSkip, Plain, by_definition,
                  generate, summarize)
from heads import KINDS, ExitHeads
from model import InputError, sample


def random_thresholds(rnd, n, low=0.0, high=4.0):
    """For every exit: never, (nearly) never certain, somewhere in between, or always."""
    between = rnd.uniform(low, high), rnd.uniform(low, high)
    return [rnd.choice((None, low, *between, math.inf)) for _ in range(n)]


def silence(model, blocks):
    """Make deep blocks add nothing, so that a shallower depth knows all that the full model knows.
    """
    for i in blocks:
        for linear in (model.layers[i].attention.dense, model.layers[i].mlp.dense_4h_to_h):
            linear.weight.zero_(), linear.bias.zero_()
    return model


class Counted:
    """Wraps model.run and counts for itself how often every (position, block) is computed."""

    def __init__(self, model):
        self.model, self.times, self.run_before = model, Counter(), model.run

    def __enter__(self):
        def run(x, start, stop, cache=None, between=None):
            offset = cache.length[start]
            for position in range(offset, offset + x.shape[1]):
                for block in range(start, stop):
                    self.times[position, block] += 1
            return self.run_before(x, start, stop, cache, between)
        self.model.run = run
        return self

    def __exit__(self, *_):
        del self.model.run


# --------------------------------------------------------------- the definition, and plain decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["entropy", "margin"])
@pytest.mark.parametrize("cases", [10, pytest.param(24, marks=pytest.mark.slow)])
def test_dssd_equals_its_definition(kind, measure, cases):
    """Tokens, depths, rounds, draft lengths and acceptance, on 100 random cases, in CI on 240."""
    rnd, drafted = random.Random(f"{kind}, {measure}"), 0
    low, high = (0.0, 4.0) if measure == "entropy" else (-1.0, 0.0)
    for case in range(cases):
        model = tiny(case, vocab_size=24)
        if case % 2 == 0:
            # then many drafts are right
            silence(model, (2, 3))
        heads = shaken(model, kind=kind, measure=measure)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 58, 64)))]
        n, stop = rnd.choice((1, 7, 12, 20)), rnd.choice((None, rnd.randrange(24)))
        policy = DSSD(heads, random_thresholds(rnd, 3, low, high), rnd.randint(1, 8))
        if case % 4 == 3:
            policy = LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 8))
        tokens, depths, rounds = by_definition(model, ids, n, policy, stop)
        out = generate(model, ids, n, policy, stop=stop)
        assert (out.tokens, out.depths, out.log.rounds) == (tokens, depths, rounds), (
            case, policy.thresholds)
        s = summarize(policy, [out])
        assert s.drafted == sum(d for d, _ in rounds) and s.accepted == sum(k for _, k in rounds)
        assert s.draft_lengths == Counter(d for d, _ in rounds)
        drafted += s.drafted
    assert drafted >= cases // 2


def test_plain_equals_the_reference_loop():
    model = tiny()
    assert generate(model, [5, 6, 7], 20, Plain()).tokens == list(sample(model, [5, 6, 7], 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trials", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_lossless_and_nothing_computed_twice(kind, trials):
    """Against plain decoding on random models. A block is computed again only where a draft was
    rejected."""
    rnd = random.Random(2)
    for trial in range(trials):
        model = tiny(trial, vocab_size=24)
        heads = shaken(model, kind=kind)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63, 64)))]
        n, stop = rnd.choice((1, 2, 7, 40)), rnd.choice((None, rnd.randrange(24)))
        plain = generate(model, ids, n, Plain(), stop=stop)
        assert summarize(Plain(), [plain]).layers_per_token == (4 if len(plain.tokens) > 1 else 0)
        for policy in (DSSD(heads, random_thresholds(rnd, 3), rnd.randint(1, 16)),
                       LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 16))):
            with Counted(model) as counted:
                out = generate(model, ids, n, policy, stop=stop)
            s = summarize(policy, [out])
            assert out.tokens == plain.tokens, (trial, policy)
            by_log = Counter()
            for first, end, start, last in out.log.passes:
                by_log.update((p, b) for p in range(first, end) for b in range(start, last))
            # the log tells what was run
            assert counted.times == by_log
            # position by position: how often a token there was rejected and replaced
            again, at = Counter(), len(ids)
            for drafts, kept in out.log.rounds:
                again.update(range(at + kept + 1, at + drafts + 1))
                at += kept + 1
            for (position, _), times in counted.times.items():
                assert times <= 1 + again[position]
            assert sum(s.exits.values()) == s.emitted == len(out.tokens) == len(out.depths)
            assert sum(k * v for k, v in s.draft_lengths.items()) == s.drafted >= s.accepted
            assert max(s.draft_lengths, default=0) <= policy.max_draft


def check_on_the_toy(model, heads, prompts, new, seed=3):
    """Random settings, prompts up to the end of the context, and stop tokens: the text is Plain's.
    """
    rnd, accepted = random.Random(seed), 0
    for i, ids in enumerate(prompts):
        ids = ids[:rnd.choice((1, 8, 64))]
        if i == len(prompts) - 1:
            ids = (prompts[0] * 32)[:2048 - rnd.choice((0, 10, new - 1))]
        chosen = heads[i % 2]
        plain = generate(model, ids, new, Plain()).tokens
        assert len(plain) == min(new, 2048 - len(ids) + 1)
        # it then ends the text, often in a draft
        stop = rnd.choice(plain) if i % 7 == 0 else None
        low, high = (0.0, 4.0) if chosen.measure == "entropy" else (-1.0, 0.0)
        policy = DSSD(chosen, random_thresholds(rnd, len(chosen.layers), low, high),
                      rnd.randint(1, 16))
        if i % 5 == 4:
            policy = LayerSkip(chosen, rnd.choice(chosen.layers), rnd.randint(1, 16))
        out = generate(model, ids, new, policy, stop=stop)
        wanted = plain if stop is None else plain[:plain.index(stop) + 1]
        assert out.tokens == wanted, (i, policy.thresholds)
        accepted += summarize(policy, [out]).accepted
    return accepted


def test_lossless_on_the_toy(toy, paper_heads, fast_heads, prompts):
    assert check_on_the_toy(toy, [paper_heads, fast_heads], prompts[:6], 16) > 10


@pytest.mark.slow
def test_lossless_on_fifty_prompts_of_the_toy(toy, paper_heads, fast_heads, prompts):
    from appendix.fast import fast
    heads = []
    for own in (paper_heads, fast_heads):
        decoder, twins = fast(toy, own)
        heads.append(twins)
    assert check_on_the_toy(decoder, heads, prompts, 128) > 100


def test_cache_after_rejections_equals_a_fresh_one(monkeypatch):
    """After a generation: keys, values, and what a block head has read, beside a fresh cache over
    the same text."""
    frontiers = []

    class Kept(D.Frontier):
        def __init__(self, *args):
            super().__init__(*args)
            frontiers.append(self)

    monkeypatch.setattr(D, "Frontier", Kept)
    rnd = random.Random(4)
    for trial in range(8):
        model = tiny(trial, vocab_size=24)
        heads, ids = (shaken(model, kind="block" if trial % 2 else "linear"),
                      [rnd.randrange(24) for _ in range(6)])
        policy = DSSD(heads, [2.5, None, 3.0], rnd.randint(1, 6))
        text = ids + generate(model, ids, 30, policy).tokens
        f, fresh = frontiers[-1], model.new_cache(1, 64)
        n = f.reached[-1]
        with torch.no_grad():
            for layer, head, cache in zip((1, 3), f.heads, f.head_caches):
                if cache is not None:
                    known, own = cache.length[0], head.new_cache(1, 64)
                    head.body(model.hidden_states(torch.tensor([text[:known]]), (layer,))[0], own)
                    assert torch.allclose(own.kv[..., :known, :], cache.kv[..., :known, :],
                                          atol=1e-4)
                    assert 0 < known <= n
            model.run(model.embed(torch.tensor([text[:n]])), 0, 4, fresh)
        assert f.cache.length == [n] * 4
        assert torch.allclose(f.cache.kv[..., :n, :], fresh.kv[..., :n, :], atol=1e-4)


def test_unconsulted_heads_are_never_evaluated(monkeypatch):
    model = tiny()
    heads = shaken(model)
    monkeypatch.setattr(heads.heads[1], "body",
                        lambda *a: pytest.fail("a head with threshold None was asked"))
    generate(model, [1, 2, 3], 30, DSSD(heads, [2.0, None, math.inf]))
    policy = DSSD(heads, [None, None, None])
    out = generate(model, [1, 2, 3], 30, policy)
    s = summarize(policy, [out])
    assert s.drafted == 0 and s.layers_per_token == 4 and out.log.asked == []


def test_always_certain_counts_by_hand():
    model = tiny()
    policy = LayerSkip(ExitHeads(model, [2], "tied"), 2, 4)
    s = summarize(policy, [generate(model, [1, 2, 3], 21, policy)])
    assert s.rounds == sum(s.draft_lengths.values()) and s.emitted == 21
    assert s.tau == pytest.approx(20 / s.rounds)
    # each round: its drafts, and one of the full model
    assert s.accepted + s.rounds == 20
    assert s.wasted == s.drafted - s.accepted
    assert s.layers_per_token == pytest.approx(4 + 4 * s.wasted / 20)


def test_drafts_of_a_perfect_head_are_all_accepted():
    model = silence(tiny(), (2, 3))
    policy = DSSD(ExitHeads(model, [2], "tied"), [math.inf], 4)
    out = generate(model, [1, 2, 3], 26, policy)
    s = summarize(policy, [out])
    assert s.acceptance == 1 and s.tau == 5 and out.depths[1:6] == [2, 2, 2, 2, 4]


def test_a_summary_adds_generations_up():
    model = tiny()
    policy = DSSD(shaken(model), [2.5, None, 3.0], 4)
    runs = [generate(model, [i], 12, policy) for i in range(3)]
    each, all_ = [summarize(policy, [g]) for g in runs], summarize(policy, runs)
    for name in ("emitted", "drafted", "accepted", "wasted", "rounds", "prefill_seconds"):
        assert getattr(all_, name) == pytest.approx(sum(getattr(s, name) for s in each))
    assert all_.layers_per_token == pytest.approx(sum(s.layers_per_token for s in each) / 3)
    assert (math.isnan(summarize(Plain(), runs[:0]).tau)
            and math.isnan(summarize(Plain(), runs[:0]).acceptance))


# ---------------------------------------------------------------- drafts where they pay


def priced(plain, question, draft, exits=3):
    """Two Costs, in ms, the same for all positions and drafts. A draft's includes the question."""
    return [Costs(n, plain, question, draft, draft, [0.0] * exits, [0.0] * 17)
            for n in (0, 1000)]


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_that_follow_the_gain_are_lossless_and_nothing_is_computed_twice(kind):
    rnd, drafted = random.Random(5), 0
    for trial in range(6):
        model = tiny(trial, vocab_size=24)
        heads = shaken(model, kind=kind)
        heads.calibration = {"0.90": [1.0, 1.5, None], "0.50": [2.0, 1.5, 2.5]}
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63)))]
        policy = AutoDSSD(heads, priced(4.0, 0.1, rnd.uniform(0.1, 0.6)), rnd.randint(1, 9))
        with Counted(model) as counted:
            out = generate(model, ids, 40, policy)
        by_log = Counter()
        for first, end, start, last in out.log.passes:
            by_log.update((p, b) for p in range(first, end) for b in range(start, last))
        assert counted.times == by_log
        assert out.tokens == generate(model, ids, 40, Plain()).tokens
        drafted += summarize(policy, [out]).drafted
    assert drafted > 10


def test_what_cannot_pay_is_probed_ever_more_rarely():
    model = tiny(max_position_embeddings=256)
    policy = AutoDSSD(shaken(model), priced(1.0, 0.1, 2.0))
    log = generate(model, [1, 2, 3], 200, policy).log
    # one question at a time, and rests of 8, 16, 32, 64 tokens
    asked = [end - 4 for _, first, end in log.asked if first >= 3]
    assert asked == [0, 9, 26, 59, 124, 189]
    assert all(drafts == 0 for drafts, _ in log.rounds)


def test_what_always_holds_is_drafted_to_the_cap():
    model = silence(tiny(max_position_embeddings=128), (2, 3))
    policy = AutoDSSD(ExitHeads(model, [2], "tied"), priced(4.0, 0.1, 0.6, 1), 8)
    s = summarize(policy, [generate(model, [1, 2, 3] * 20, 50, policy)])
    assert s.acceptance == 1 and max(s.draft_lengths) == 8 and s.tau > 6


def by_gain(costs, exits=(1, 3), cap=16, **calibration):
    """A rule with these costs, whose exits of 4 blocks have these calibrated thresholds."""
    heads = shaken(tiny(), list(exits))
    heads.calibration = calibration
    policy = AutoDSSD(heads, [Costs(n, *costs) for n in (0, 1000)], cap)
    return ByGain(policy, 100, D.Choice(0.0, 1.0))


def test_the_rule_by_hand():
    rule = by_gain((10.0, 0.5, 2.5, 3.0, [0.0, 1.0], [0.0] * 17), **{"0.90": [1.0, 1.0]})
    for record, chances in zip(rule.records, ((0.9, 0.1), (0.8, 0.7))):
        record.seen, record.right = [1.0, 1.0], list(chances)
    rule.take(0)
    # the first draft, and up to two more if they were as sure: 9 - 2.5, 8.1 - 3 and 7.29 - 3 ms
    assert rule.exits_to_ask(0) == [0] and rule.rest == 0
    assert rule.gain(0.9) == pytest.approx(15.89) and rule.gain(0.1) == pytest.approx(-1.5)
    assert rule.gain(0.6) == pytest.approx(6 - 2.5 + 3.6 - 3)
    assert rule.drafts(0, certain(0.99), torch.tensor(1)) and rule.chance == pytest.approx(0.9)
    # a later one is asked for by the usual answer: 5 - 3 ms. Once asked, it is nearly free
    rule.chance = 1.0
    assert rule.exits_to_ask(1) == [0] and rule.gain(0.5) == pytest.approx(2)
    assert rule.gain(0.1) == pytest.approx(-2) and rule.ask_ms == 3
    assert rule.drafts(0, torch.zeros(2048), torch.tensor(1)) and rule.chance == pytest.approx(0.1)
    # with little hope for the drafts before it, a further one does not pay
    rule.chance = 0.25
    assert rule.exits_to_ask(1) == []
    record = rule.records[0]
    record.learn(1, 1.0)
    assert record.chance(1) == pytest.approx((D.MEMORY * 0.1 + 1) / (D.MEMORY + 1))
    # of the answers more than half fall into the second bin now
    share = (D.MEMORY + 1) / (2 * D.MEMORY + 1)
    assert record.mean() == pytest.approx(0.9 + share * (record.chance(1) - 0.9))


def test_costs_lie_on_a_line_through_two_measured_ones():
    few = Costs(100, 1.0, 0.3, 0.5, 0.4, [0.0, 0.1], [0.0, 0.2])
    many = Costs(1100, 3.0, 0.1, 0.7, 0.4, [0.0, 0.3], [0.0, 0.1])
    at = D.costs_between(few, many, 2100)
    # the question's cost and a row's fell by chance
    assert (at.positions, at.plain, at.question) == pytest.approx((2100, 5.0, 0.3))
    assert at.first == pytest.approx(0.9) and at.deeper == pytest.approx([0.0, 0.5])
    assert at.rows == pytest.approx([0.0, 0.2])


def test_an_answer_that_does_not_pay_its_row_is_not_drafted():
    rule = by_gain((10.0, 0.5, 2.5, 3.0, [0.0, 1.0], [0.0] + [4.0] * 16))
    rule.record.seen, rule.record.right = [1.0], [0.1]
    rule.take(0)
    rule.exits_to_ask(0)
    # 1 ms for 0.5, which is spent, and for 2 and a row of 4
    assert rule.gain(0.1) == pytest.approx(1 - 6.5)
    assert not rule.drafts(0, torch.zeros(2048), torch.tensor(1)) and rule.spent == 10.5
    # it would have been right, as the verification says
    rule.learn([1], 0, [])
    assert rule.record.right[0] == pytest.approx(D.MEMORY * 0.1 + 1)
    # the two drafts after this one count, but only where the cap leaves room for them
    for cap, pays in ((16, True), (1, False)):
        rule = by_gain((10.0, 0.5, 5.0, 0.2, [0.0, 1.0], [0.0] * 17), cap=cap)
        rule.exits_to_ask(0)
        assert (rule.gain(0.42) > 0) == pays and len(rule.draft_ms) == cap


def certain(p, V=2048):
    """Logits (V,) of a head that gives one token the probability p."""
    z = torch.full((V,), math.log((1 - p) / (V - 1)))
    z[1] = math.log(p)
    return z


def test_the_exit_with_the_most_tokens_per_second_drafts():
    rule = by_gain((10.0, 0.5, 2.5, 3.0, [0.0, 1.0], [0.0] * 17))
    for record, chance in zip(rule.records, (0.5, 0.75)):
        record.seen, record.right = [1.0], [chance]
    # one draft from exit 1: 1.5 tokens in 12.5 ms. Two from exit 3: 1 + 0.75 + 0.75^2 in 17.5 ms
    assert rule.rate(0) == pytest.approx(1.5 / 12.5)
    assert rule.rate(1) == pytest.approx(2.3125 / 17.5)
    # where blocks 2 and 3 do nothing, exit 2 is always right, and exit 1 is not
    model = silence(tiny(max_position_embeddings=128), (2, 3))
    costs = [Costs(n, 4.0, 0.1, 0.6, 0.6, [0.0, 0.1], [0.0] * 17) for n in (0, 1000)]
    policy = AutoDSSD(ExitHeads(model, [1, 2], "tied"), costs)
    assert set(generate(model, [1, 2, 3] * 20, 50, policy).depths) == {2, 4}


def test_a_row_that_is_dear_ends_a_round():
    rows = [0.0, 0.5, 1.0, 9.0, 9.5]                     # the fourth row starts a second load
    rule = by_gain((10.0, 0.5, 2.0, 1.0, [0.0, 1.0], rows))
    rule.record.seen, rule.record.right = [1.0], [0.9]
    rule.take(0)
    for drafted in (0, 1):
        assert rule.exits_to_ask(drafted) == [0]
        assert rule.drafts(0, torch.zeros(2048), torch.tensor(1))
    # first: 2 and a row of 0.5; second: 1 and 0.5. A third brings 0.9^3 of 10 ms, for 1 and 8; and
    # with a fourth 0.9^4, for 1 and 0.5
    assert rule.spent == pytest.approx(10 + 2.5 + 1.5) and rule.draft_ms == [2.5, 1.5, 9, 1.5]
    rule.drafted = 2
    assert rule.gain(0.9) == pytest.approx(7.29 - 9 + 6.561 - 1.5)
    rule.chance = 0.5
    assert rule.exits_to_ask(2) == []
    assert rule.exits_to_ask(4) == []                    # beyond what was measured


def test_rounds_that_save_nothing_end_in_a_rest_whatever_the_record_says():
    """The record promises 0.4 ms a round, but rounds lose 3: they cost 13 ms and keep nothing."""
    rule, rounds = by_gain((10.0, 1.0, 3.0, 30.0, [0.0], [0.0] * 17), [1]), 0
    while rule.rest == 0:
        rule.record.seen, rule.record.right = [1.0], [0.34]
        assert rule.exits_to_ask(0) == [0] and rounds < 20
        assert rule.drafts(0, torch.zeros(2048), torch.tensor(1))
        assert rule.spent == pytest.approx(13)
        rule.learn([0, 0], 0, [0.0])
        rounds += 1
    # saved: -3, -5.7, .. -14.1 ms after 1, 2, .. 6 rounds, beside 32 times the promise; one more
    assert rounds == 7 and rule.rest == 8 and [rule.exits_to_ask(0) for _ in range(8)] == [[]] * 8


# ---------------------------------------------------------------- early exit


def test_early_exit_exact_equals_recomputing_with_full_prefixes():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    thresholds = [1.5, 2.0, 2.5]
    policy = EarlyExit(heads, thresholds)
    out = generate(model, [1, 2, 3], 30, policy)
    text = [1, 2, 3]
    for i, (token, depth) in enumerate(zip(out.tokens, out.depths)):
        full, hidden = model(torch.tensor([text]), exits=heads.layers)
        say = [(n, z[0, -1]) for n, z, t in zip(heads.layers, heads.logits(hidden), thresholds)
               if D.MEASURES["entropy"](z[0, -1]) < t]
        # the prefill's token is the full model's
        n, z = say[0] if say and i else (4, full[0, -1])
        assert (token, depth) == (z.argmax().item(), n)
        text.append(token)
    assert 0 < summarize(policy, [out]).layers_per_token < 4


def test_copied_state_is_another_approximation():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    layers = {}
    for fill in ("exact", "copy"):
        policy = EarlyExit(heads, [2.2, 2.4, 2.6], fill)
        s = summarize(policy, [generate(model, [1, 2, 3], 40, policy)])
        layers[fill] = s.layers_per_token
        assert s.emitted == 40
    assert layers["copy"] <= layers["exact"]
    never = generate(model, [1, 2, 3], 40, EarlyExit(heads, [0.0] * 3, "copy"))
    assert never.tokens == generate(model, [1, 2, 3], 40, Plain()).tokens


# ---------------------------------------------------------------- sampling


@torch.inference_mode()
def exact_joint(model, ids, temperature, top_p, n=3):
    """P(first n tokens) by walking the whole tree."""
    paths = {(): 1.0}
    for _ in range(n):
        grown = {}
        for path, p in paths.items():
            logits, _ = model(torch.tensor([ids + list(path)]))
            q = D.distribution(logits[0, -1], temperature, top_p)
            grown.update({(*path, t): p * q[t].item() for t in range(len(q))})
        paths = grown
    return paths


# per case; CI takes 10,000 in all
DRAWS = int(os.environ.get("NANOEXIT_DRAWS", 200))


def chi_square(model, policy, temperature, top_p, draws=DRAWS):
    """The statistic of `draws` generations against the exact joint of 3 tokens, as a normal
    deviate."""
    torch.manual_seed(0)
    want, seen = exact_joint(model, [1, 2], temperature, top_p), Counter()
    # the fourth token lets the third be a draft
    for i in range(draws):
        out = generate(model, [1, 2], 4, policy, temperature=temperature, top_p=top_p, seed=i)
        seen[tuple(out.tokens[:3])] += 1
    assert all(want[path] > 0 for path in seen)
    big = {path: p * draws for path, p in want.items() if p * draws >= 8}
    rest = draws - sum(big.values())
    chi2 = sum((seen[path] - e) ** 2 / e for path, e in big.items())
    if rest > 1:
        chi2 += (draws - sum(seen[path] for path in big) - rest) ** 2 / rest
    df = len(big) - (rest <= 1)
    return (chi2 - df) / math.sqrt(2 * df)


def small(kind="linear"):
    model = tiny(vocab_size=4, hidden_size=16, intermediate_size=32,
                 num_hidden_layers=3, num_attention_heads=2)
    return model, shaken(model, [1, 2], kind)


@pytest.mark.parametrize("kind, thresholds, temperature, top_p", [
    ("linear", (math.inf, None), 1.0, 1.0), ("block", (0.9, 1.2), 0.7, 1.0),
    pytest.param("linear", (0.8, math.inf), 1.5, 0.85, marks=pytest.mark.slow)])
def test_sampled_output_has_the_full_models_distribution(kind, thresholds, temperature, top_p):
    model, heads = small(kind)
    assert abs(chi_square(model, DSSD(heads, thresholds, 3), temperature, top_p)) < 4


def one_by_one(full, drafts, choice, keep=None):
    """The older accept rule, draft by draft: min(1, p / q), or a wrong chance to keep a draft."""
    for i, (x, _, q) in enumerate(drafts):
        p = full[i]
        if choice.random() >= (keep(p, q)[x] if keep else p[x] / q[x]):
            return i, choice.draw(p if keep else (p - q).clip(0)), [1.0] * len(drafts)
    return len(drafts), choice.draw(full[-1]), [1.0] * len(drafts)


def keep_too_much(full, drafts, choice):
    return one_by_one(full, drafts, choice, lambda p, q: torch.ones_like(p))


def keep_by_the_root(full, drafts, choice):
    return one_by_one(full, drafts, choice, lambda p, q: p.sqrt())


@pytest.mark.parametrize("rule, kept", [(one_by_one, 10 / 9), (D.verify, 11 / 9)])
def test_a_block_keeps_more_than_its_drafts_one_by_one(rule, kept):
    """Two drafts of a head that always says q, to a model that always says p (Sun et al. 2025)."""
    p, q, choice = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3]), D.Choice(1.0, 1.0, 0)
    seen, total, n = Counter(), 0, 4000
    for _ in range(n):
        drafts = [D.Draft(choice.draw(q), 1, q) for _ in range(2)]
        stay, token, chances = rule([p] * 3, drafts, choice)
        # the text of three tokens: what was kept, one drawn, and plain decoding
        text = [draft.token for draft in drafts[:stay]] + [token]
        text += [choice.draw(p) for _ in range(3 - len(text))]
        seen[tuple(text)] += 1
        total += stay
        if rule is D.verify:
            second = 1.0 if drafts[0].token == 0 else 2 / 3
            assert chances == pytest.approx([2 / 3, second], abs=1e-6)
    assert total / n == pytest.approx(kept, abs=0.04)
    chi2 = 0
    for text in product(range(2), repeat=3):
        want = n * math.prod(p[x].item() for x in text)
        chi2 += (seen[text] - want) ** 2 / want
    assert chi2 < 24.3                                   # 7 degrees of freedom: once in 1,000


def test_a_block_of_certain_or_equal_heads_is_kept_or_dropped_whole():
    choice, p = D.Choice(1.0, 1.0, 0), torch.tensor([0.25, 0.75, 0.0])
    never, drafts = torch.tensor([0.0, 0.0, 1.0]), [D.Draft(1, 1, p)] * 3
    for _ in range(50):
        assert D.verify([p] * 4, drafts, choice)[0] == 3
        kept, token, chances = D.verify([p] * 3, [D.Draft(2, 1, never)] * 2, choice)
        assert kept == 0 and token < 2 and chances == [0.0]


def test_learning_while_sampling_keeps_the_distribution():
    model, heads = small("block")
    heads.calibration = {"0.80": [0.8, 1.0]}
    policy = AutoDSSD(heads, priced(3.0, 0.02, 0.1, 2), 3)
    assert sum(d for d, _ in generate(model, [1, 2], 4, policy, temperature=1.0).log.rounds)
    assert abs(chi_square(model, policy, 1.0, 1.0)) < 4


@pytest.mark.parametrize("wrong, draws", [
    (keep_too_much, 150), pytest.param(keep_by_the_root, 800, marks=pytest.mark.slow)])
def test_a_wrong_accept_rule_fails_the_same_test(monkeypatch, wrong, draws):
    model, heads = small()
    monkeypatch.setattr(D, "verify_block", wrong)
    assert chi_square(model, DSSD(heads, (math.inf, None), 3), 1.0, 1.0, draws) > 6


def test_sampling_is_reproducible_and_top_p_is_the_nucleus():
    model, heads = small()
    runs = [generate(model, [1], 20, DSSD(heads, [1.0, 1.0]), temperature=1.0, seed=s).tokens
            for s in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    p = D.distribution(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 1.0, 0.7)
    assert torch.allclose(p, torch.tensor([0.625, 0.375, 0, 0]))


# ---------------------------------------------------------------- bad input, command line


def test_bad_requests():
    model = tiny()
    heads = shaken(model)
    strange = shaken(model, measure="mood")
    for ids, n, policy, options, words in (
            ([], 5, Plain(), {}, "empty"), ([1] * 65, 5, Plain(), {}, "the context holds 64"),
            ([1], 0, Plain(), {}, "at least 1"),
            ([1], 5, DSSD(heads, [1.0]), {}, "1 thresholds were given for 3 heads"),
            ([1], 5, Plain(), {"temperature": -1}, "temperature"),
            ([1], 5, Plain(), {"top_p": 0}, "top_p"),
            ([1], 5, DSSD(strange, [1.0] * 3), {}, "'mood' is not one of entropy")):
        with pytest.raises(InputError, match=words):
            generate(model, ids, n, policy, **options)
    for make in (lambda: LayerSkip(heads, 5, 2), lambda: LayerSkip(heads, 1, 0),
                 lambda: DSSD(heads, [1] * 3, 0), lambda: AutoDSSD(heads, priced(1, 1, 1), 0),
                 lambda: EarlyExit(heads, [1] * 3, "guess")):
        with pytest.raises(InputError):
            make()


def test_the_stream_is_coloured_on_a_terminal_only(toy_tokenizer, monkeypatch, capsys):
    pairs = [(toy_tokenizer.encode("def")[0], 4), (toy_tokenizer.encode("\u00e9")[0], 16),
             (toy_tokenizer.end, 16)]
    monkeypatch.setattr(D.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert D.show_stream(toy_tokenizer, pairs, 16) == pairs
    coloured = capsys.readouterr().out
    assert f"\033[38;5;{D.terminal_colour(4, 16)}mdef" in coloured
    assert f"\033[38;5;{D.terminal_colour(16, 16)}m16 of 16 blocks 67%" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    D.show_stream(toy_tokenizer, pairs, 16)
    assert "\033" not in capsys.readouterr().out
    assert len({D.terminal_colour(d, 16) for d in (2, 4, 10, 16)}) == 4


def test_command_line(tmp_path):
    status, out, errors = call(D, "--prompts", 1, "--max-new-tokens", 8, "--level", "0.9",
                               "--figure", tmp_path / "tokens.png")
    assert status == 0, errors
    assert ("\033" not in out and "LayerSkip 4x8" in out
            and (tmp_path / "tokens.png").stat().st_size > 3000)
    rows = [line.split() for line in out.splitlines()
            if line.startswith(("DSSD,", "DSSD ", "LayerSkip"))]
    assert len(rows) == 4 + 9 and all(row[-1] == "100%" for row in rows)  # the same text as Plain
    assert_refused(run("dssd.py", "--level", "high"), "argument --level", "'high'")
    assert_refused(call(D, "--level", "0.4"), "not calibrated for level 0.4")
    assert_refused(call(D, "--prompt", ""), "empty")
    assert_refused(call(D, "--heads", tmp_path / "none"), "cannot be read as a heads file")
    assert_refused(call(D, "--figure", tmp_path / "none" / "f.png"), "there is no folder")
