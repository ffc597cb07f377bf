"""DSSD auto: the rule by hand, lossless, nothing twice, the full model's distribution."""
import math
import random

import pytest
import torch

from appendix.gain import MEMORY, AutoDSSD, ByGain, Costs, costs_between
from conftest import shaken, tiny
from dssd import Choice, Plain, generate, summarize
from heads import KINDS, ExitHeads
from model import InputError
from test_dssd import Counted, chi_square, logged, silence, small


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
        assert counted.times == logged(out.log)
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
    return ByGain(policy, 100, Choice(0.0, 1.0))


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
    assert record.chance(1) == pytest.approx((MEMORY * 0.1 + 1) / (MEMORY + 1))
    # of the answers more than half fall into the second bin now
    share = (MEMORY + 1) / (2 * MEMORY + 1)
    assert record.mean() == pytest.approx(0.9 + share * (record.chance(1) - 0.9))


def test_costs_lie_on_a_line_through_two_measured_ones():
    few = Costs(100, 1.0, 0.3, 0.5, 0.4, [0.0, 0.1], [0.0, 0.2])
    many = Costs(1100, 3.0, 0.1, 0.7, 0.4, [0.0, 0.3], [0.0, 0.1])
    at = costs_between(few, many, 2100)
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
    assert rule.record.chance(0) == pytest.approx((MEMORY * 0.1 + 1) / (MEMORY + 1))
    # the two drafts after this one count, but only where the cap leaves room for them
    for cap, pays in ((16, True), (1, False)):
        rule = by_gain((10.0, 0.5, 5.0, 0.2, [0.0, 1.0], [0.0] * 17), cap=cap)
        rule.exits_to_ask(0)
        assert (rule.gain(0.42) > 0) == pays and len(rule.draft_ms) == cap


def test_what_verification_says_is_learned_up_to_the_first_rejected():
    for full, kept, chances, learned in (
            # the third answer did not draft, and would have been right
            ([5, 6, 7], 2, [0.9, 0.4], [(0, 0.9), (1, 0.4), (0, 1.0)]),
            # the second draft was rejected: nobody has judged the third
            ([5, 6, 7, 8], 1, [0.9, 0.4, 0.7], [(0, 0.9), (1, 0.4)])):
        rule = by_gain((10.0, 0.5, 2.5, 3.0, [0.0, 1.0], [0.0] * 17), **{"0.90": [1.0, 1.0]})
        expected = by_gain((10.0, 0.5, 2.5, 3.0, [0.0, 1.0], [0.0] * 17), **{"0.90": [1.0, 1.0]})
        for b, chance in learned:
            expected.record.learn(b, chance)
        rule.asked, rule.spent = [(0, 5), (1, 6), (0, 7)], 15.0
        rule.learn(full, kept, chances)
        assert vars(rule.record) == vars(expected.record)
        assert rule.tokens == pytest.approx(8 * 0.9 + kept + 1) and rule.asked == []
        assert rule.ms == pytest.approx(80 * 0.9 + 15)


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


def test_learning_while_sampling_keeps_the_distribution():
    model, heads = small("block")
    heads.calibration = {"0.80": [0.8, 1.0]}
    policy = AutoDSSD(heads, priced(3.0, 0.02, 0.1, 2), 3)
    assert sum(d for d, _ in generate(model, [1, 2], 4, policy, temperature=1.0).log.rounds)
    assert abs(chi_square(model, policy, 1.0, 1.0)) < 4


def test_a_cap_holds_a_draft_at_least():
    with pytest.raises(InputError, match="max_draft must be at least 1"):
        AutoDSSD(shaken(tiny()), priced(1, 1, 1), 0)
