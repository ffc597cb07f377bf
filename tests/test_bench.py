"""Chapter 7: the widened model is the same function, the counted bytes are right, and the benchmark's numbers add up."""
import json
import math

import pytest
import torch

import bench as B
from confidence import entropy
from conftest import TOY, assert_refused, run, tiny
from dssd import DSSD, EarlyExit, LayerSkip, Plain, fast, generate, held_out_prompts
from heads import KINDS, ExitHeads
from model import InputError
from test_heads import shaken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [2, 3])
def test_a_widened_model_is_the_same_function(kind, r):
    model = tiny()
    heads = shaken(model, [1, 3], kind)
    wide, wide_heads = B.widen(model, heads, r)
    assert wide.config.hidden_size == 32 * r and wide.config.num_attention_heads == 4 * r
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        (a, hidden), (b, wide_hidden) = model(ids, [1, 3]), wide(ids, [1, 3])
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        for x, y in zip(hidden, wide_hidden):
            assert torch.allclose(x.repeat(1, 1, r), y, rtol=1e-4, atol=1e-4)   # the residual stream, r times over
        for x, y in zip(heads.logits(hidden), wide_heads.logits(wide_hidden)):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-3)


def test_the_widened_toy_writes_the_toys_text_with_any_vocabulary(toy):
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", toy)
    wide, wide_heads = B.widen(toy, heads, 2, 5000)
    ids = held_out_prompts(TOY, 1)[0]
    with torch.no_grad():
        (a, hidden), (b, wide_hidden) = toy(torch.tensor([ids]), heads.layers), wide(torch.tensor([ids]), heads.layers)
        assert b.shape[-1] == 5000 and torch.allclose(a, b[..., :2048], rtol=1e-4, atol=2e-3)
        assert (b[..., 2048:] + 50).abs().max() < 0.01                    # the padding is out of the running
        for x, y in zip(heads.logits(hidden), wide_heads.logits(wide_hidden)):
            assert torch.allclose(entropy(x), entropy(y), atol=1e-3)
    policy = DSSD(heads, [1.0] * len(heads.layers))
    narrow = generate(fast(toy), ids, 24, policy)
    wider = generate(fast(wide), ids, 24, DSSD(wide_heads, policy.thresholds))
    assert narrow.tokens == wider.tokens and narrow.depths == wider.depths
    for r, vocab in ((0, 0), (1, 2047)):
        with pytest.raises(InputError, match="--widen"):
            B.widen(toy, heads, r, vocab)


def test_bytes_are_those_of_the_weights_and_the_cache():
    model = tiny()                                                        # float32: 4 bytes a number
    block, unembedding, position = 4 * 12 * 32 * 32, 4 * 32 * 96, 4 * 2 * 32
    heads = shaken(model, [2])
    plain = generate(model, [1, 2, 3], 4, Plain()).stats                  # three passes, over 4, 5 and 6 positions
    assert plain.bytes == pytest.approx(3 * (4 * block + unembedding) + 4 * (4 + 5 + 6) * position)
    drafted = generate(model, [1, 2, 3], 4, LayerSkip(heads, 2, 3)).stats
    # each draft reads two blocks and its head's matrix, each verification two blocks and the unembedding, whatever its rows
    steps = drafted.drafted + drafted.rounds
    least = steps * (2 * block + unembedding) + drafted.rounds * 2 * block
    assert least < drafted.bytes + steps * unembedding and drafted.bytes < least + steps * 6 * 4 * position
    early = generate(model, [1, 2, 3], 4, EarlyExit(heads, [math.inf], fill="copy")).stats
    assert early.bytes == pytest.approx(3 * (2 * block + unembedding + 2 * block / 6) + 2 * (4 + 5 + 6) * position)


def test_distinct_counts_ngrams():
    assert B.distinct([[1, 2, 3, 4, 5]]) == 1 and B.distinct([[7] * 10]) == 1 / 7
    assert B.distinct([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.5 and B.distinct([[1]]) == 0


def test_row_dependence_sees_a_dependence(toy):
    assert 0 <= B.row_dependence(fast(toy)) < 1e-3                        # float32: rounding alone

    class Odd:                                                            # a row's result depends on the rows beside it
        config, embed_in, new_cache, embed, unembed = (getattr(toy, n) for n in ("config", "embed_in", "new_cache", "embed", "unembed"))

        def run(self, x, start, stop, cache):
            return toy.run(x + (x.shape[1] - 1) * torch.linspace(-1, 1, 128), start, stop, cache)
    assert B.row_dependence(Odd(), 3) > 0.01


def test_command_line(tmp_path):
    status, out, errors = run("bench.py", "--prompts", 1, "--max-new-tokens", 6, "--repeats", 1, "--widen", 2,
                              "--json", tmp_path / "b.json", "--figures", tmp_path)
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "b.json").read_text())
    for part in ("greedy", "sampled at 0.8"):
        policies = record[part]["policies"]
        assert {"Plain", "EarlyExit 0.80", "DSSD 0.95", "DSSD auto"} <= set(policies) and len(record[part]["grid"]) == 2 + 2 * 3 * 8
        assert policies["Plain"]["x_plain"] == 1 and policies["Plain"]["acceptance"] is None
        for name, row in policies.items():
            assert row["min_ms"] <= row["ms_per_token"] <= row["max_ms"] and row["roofline"] > 0
            if part == "greedy" and not name.startswith("EarlyExit"):
                assert row["same_tokens"] == 1
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert_refused(run("bench.py", "--prompts", 0), "--prompts")
    assert_refused(run("bench.py", "--widen", 0), "--widen")
    assert_refused(run("bench.py", "--figures", tmp_path / "none"), "no such folder")
    assert_refused(run("bench.py", "--peer", "transformers", "--widen", 2), "--peer")


def test_growth_and_its_figure(toy, tmp_path):
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", toy)
    found = B.growth(toy, heads, TOY, DSSD(heads, [1.0] * len(heads.layers)), widths=(1, 2))
    assert [n for n, _, _ in found["width"]] == [128, 256] and [n for n, _, _ in found["context"]][-1] == 1920
    assert all(min(row[1:]) > 0 for rows in found.values() for row in rows)
    B.draw_growth(tmp_path / "growth.png", found)
    assert (tmp_path / "growth.png").stat().st_size > 5000
