"""The rewritten decoder against the one before it, draft for draft. For one commit."""
import random

import old_decoder as old
import pytest
import torch

import dssd as new
from conftest import shaken, tiny
from heads import KINDS


def thresholds(rnd):
    return [rnd.choice((None, 0.0, rnd.random() * 4, rnd.random() * 4, float("inf"))) for _ in range(3)]


def pair(rnd, heads, twins):
    """The same random policy, for the old decoder and for the new one."""
    kind, t, cap = rnd.choice(("Plain", "EarlyExit", "LayerSkip", "DSSD", "DSSD")), thresholds(rnd), rnd.randint(1, 16)
    if kind == "Plain":
        return old.Plain(), new.Plain()
    if kind == "EarlyExit":
        fill = rnd.choice(("exact", "copy"))
        return old.EarlyExit(heads, t, fill), new.EarlyExit(twins, t, fill)
    if kind == "LayerSkip":
        exit = rnd.choice((1, 2, 3))
        return old.LayerSkip(heads, exit, cap), new.LayerSkip(twins, exit, cap)
    return old.DSSD(heads, t, cap), new.DSSD(twins, t, cap)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_new_equals_old(kind, fused, cases=300):
    rnd, compared = random.Random(f"{kind} {fused}"), 0
    while compared < cases:
        model = tiny(rnd.randrange(10 ** 6), vocab_size=24)
        heads = shaken(model, kind=kind)
        before, decoder, twins = model, model, heads
        if fused:
            from appendix.fast import fast
            before, (decoder, twins) = old.fast(model), fast(model, heads)
        for _ in range(10):
            ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63, 64)))]
            n, temperature = rnd.choice((1, 2, 7, 40)), rnd.choice((0.0, 0.0, 1.0))
            a, b = pair(rnd, heads, twins)
            options = {"temperature": temperature, "top_p": rnd.choice((1.0, 0.8)), "seed": rnd.randrange(99)}
            was, now = old.generate(before, ids, n, a, **options), new.generate(decoder, ids, n, b, **options)
            s = new.summarize(b, [now])
            assert was.tokens == now.tokens and was.depths == now.depths, (kind, fused, a)
            assert was.stats.blocks == round(s.layers_per_token * max(1, s.emitted - 1))
            assert (was.stats.rounds, was.stats.drafted, was.stats.accepted) == (s.rounds, s.drafted, s.accepted)
            assert was.stats.draft_lengths == s.draft_lengths
            compared += 1
