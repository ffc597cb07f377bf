"""The costs of drafting: measured with the loop, and near what fixed pieces of work cost."""
import time

import pytest

import appendix.tune as T
from conftest import assert_refused, call, shaken, tiny
from dssd import AutoDSSD, Plain, generate
from model import TOY


def slowed(model, ms):
    """The model, with every block of every pass taking `ms` milliseconds more for each row."""
    run = model.run

    def slow(x, start, stop, *others):
        until = time.perf_counter() + (stop - start) * x.shape[1] * ms / 1000
        out = run(x, start, stop, *others)
        while time.perf_counter() < until:
            pass
        return out
    model.run = slow
    return model


def test_costs_are_those_of_the_work_that_is_done():
    model = slowed(tiny(max_position_embeddings=64), 3.0)
    heads = shaken(model, [1, 3])
    few, many = T.measure_costs(model, heads, new=10, repeats=3)
    assert (few.positions, many.positions) == (4, 32)
    for costs in (few, many):
        # a plain step: 4 blocks; one more draft: 4 blocks for one more row; a question: no block
        assert 12 <= costs.plain < 24
        assert all(q < 6 for q in costs.question)
        assert all(9 < f + q < 24 for f, q in zip(costs.further, costs.question))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_automatic_is_lossless(temperature):
    model = tiny()
    policy = T.automatic(model, shaken(model), temperature)
    assert policy.name == "DSSD auto" and len(policy.costs) == 2
    out = generate(model, [1, 2, 3], 30, policy, temperature=temperature, seed=0)
    assert len(out.tokens) == 30
    if temperature == 0:
        assert out.tokens == generate(model, [1, 2, 3], 30, Plain()).tokens
    assert AutoDSSD(shaken(model), policy.costs).max_draft == 16


def test_command_line():
    status, out, errors = call(T, "--repeats", 1)
    assert status == 0, errors
    assert "128 positions cached" in out and "a draft pays from p = " in out
    assert_refused(call(T, "--repeats", 0), "--repeats")
    assert_refused(call(T, "--heads", TOY / "config.json"), "cannot be read as a heads file")
