"""Scale: a widened model is the same function, the peer has the same weights, growth by size."""
import json

import pytest
import torch

from appendix import figures
from appendix import scale as S
from appendix.fast import fast
from confidence import entropy
from conftest import assert_refused, call, shaken, tiny
from dssd import DSSD, Plain, generate
from heads import KINDS, ExitHeads, held_out
from model import InputError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [2, 3])
@torch.no_grad()
def test_a_widened_model_is_the_same_function(kind, r):
    model = tiny()
    heads = shaken(model, [1, 3], kind, measure="margin")
    heads.calibration = {"0.90": [0.1, None]}
    wide, wide_heads = S.widen(model, heads, r)
    assert wide.config.hidden_size == 32 * r and wide.config.num_attention_heads == 4 * r
    assert wide_heads.measure == "margin" and wide_heads.thresholds(0.9) == [0.1, None]
    ids = torch.randint(0, 96, (2, 20))
    logits, hidden = model(ids, [1, 3])
    wide_logits, wide_hidden = wide(ids, [1, 3])
    assert torch.allclose(logits, wide_logits, rtol=1e-4, atol=1e-3)
    for x, y in zip(hidden, wide_hidden):  # the residual stream, r times over
        assert torch.allclose(x.repeat(1, 1, r), y, rtol=1e-4, atol=1e-4)
    for x, y in zip(heads.logits(hidden), wide_heads.logits(wide_hidden)):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_widened_toy_writes_the_toys_text_with_any_vocabulary(toy, fast_heads, prompts):
    wide, wide_heads = S.widen(toy, fast_heads, 2, 5000)
    ids = torch.tensor([prompts[0]])
    logits, hidden = toy(ids, fast_heads.layers)
    wide_logits, wide_hidden = wide(ids, fast_heads.layers)
    assert wide_logits.shape[-1] == 5000
    assert torch.allclose(logits, wide_logits[..., :2048], rtol=1e-4, atol=2e-3)
    assert (wide_logits[..., 2048:] + 50).abs().max() < 0.01  # the padding is out of the running
    for x, y in zip(fast_heads.logits(hidden), wide_heads.logits(wide_hidden)):
        assert torch.allclose(entropy(x), entropy(y), atol=1e-3)
    generations = []
    for model, heads in ((toy, fast_heads), (wide, wide_heads)):
        decoder, twins = fast(model, heads)
        # the measure's medians, or nearly: some tokens leave at each exit
        thresholds = [1.0 if heads.measure == "entropy" else -0.5] * len(heads.layers)
        generations.append(generate(decoder, prompts[0], 24, DSSD(twins, thresholds)))
    narrow, wider = generations
    assert narrow.tokens == wider.tokens and narrow.depths == wider.depths
    assert len(set(narrow.depths)) > 1


def test_what_cannot_be_widened(toy, fast_heads):
    for r, vocab in ((0, 0), (1, 2047)):
        with pytest.raises(InputError, match="--widen"):
            S.widen(toy, fast_heads, r, vocab)
    with pytest.raises(InputError, match="kind lowrank"):
        S.widen(toy, ExitHeads(toy, [4], "lowrank"), 2, 5000)


def test_the_peer_has_the_same_weights(capsys):
    pytest.importorskip("transformers")
    prompts = [[1, 2, 3], [7]]
    narrow, heads = tiny(), shaken(tiny(), [2])
    for model, heads in ((narrow, heads), S.widen(narrow, heads, 2)):
        decoder, twins = fast(model, heads)
        plain = [generate(decoder, ids, 12, Plain()).tokens for ids in prompts]
        times = S.peer_times(model, prompts, 12, 1)
        assert len(times) == 2
        assert all(ms > 0 and texts == plain for ms, texts in times.values())
    record = S.beside_peers(model, decoder, DSSD(twins, [3.0]), prompts, 12, 1)
    assert list(record) == ["Plain", "DSSD", "transformers generate", "transformers lookup"]
    for name in S.PEERS:
        row, ms = record[name], record[name]["ms_per_token"]
        assert row["same_text"] == 1
        assert row["plain_is"] == pytest.approx(ms / record["Plain"]["ms_per_token"])
        assert row["dssd_is"] == pytest.approx(ms / record["DSSD"]["ms_per_token"])
    assert "same text as Plain on 100%" in capsys.readouterr().out


def test_growth_and_its_figure(toy, fast_heads, tmp_path, capsys):
    def make(decoder, twins):
        return DSSD(twins, [1.0] * len(twins.layers))

    record = S.growth(toy, fast_heads, make, held_out(), 1e9, widths=(1, 2),
                      contexts=(128, 256, 2045), new_tokens=4, repeats=1)
    assert [row[0] for row in record["width"]] == [128, 256]
    assert [row[0] for row in record["context"]] == [128, 256]  # 2045 + 4 do not fit in 2048
    assert [row[0] for row in record["depth"]] == [1, 2, 4, 8, 12, 15]
    assert all(min(row[1:]) > 0 for rows in record.values() for row in rows)
    (_, _, _, narrow), (_, _, _, wide) = record["width"]
    assert narrow / 4 < wide < narrow / 3  # nearly all bytes are the blocks' D x D matrices
    assert capsys.readouterr().out.count("tokens/s") == 3
    figures.growth(tmp_path / "growth.png", record)
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_command_line(tmp_path):
    status, out, errors = call(S, "--widen", 2, "--level", 0.8, "--prompts", 1, "--repeats", 1,
                               "--max-new-tokens", 4, "--json", tmp_path / "s.json")
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "s.json").read_text())
    assert record["Plain"]["ms_per_token"] > 0 and record["DSSD"]["ms_per_token"] > 0
    assert "D = 256" in out
    assert_refused(call(S, "--prompts", 0), "--prompts")


@pytest.mark.slow
def test_growth_from_the_command_line(tmp_path):
    status, out, errors = call(S, "--growth", "--widths", "1,2", "--level", 0.8, "--repeats", 1,
                               "--max-new-tokens", 4, "--figure", tmp_path / "growth.png")
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert [row[0] for row in record["context"]] == list(S.CONTEXTS)
    assert S.CONTEXTS[-1] == 1920
    assert record["gigabytes_per_second"] > 0.1
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_bad_options(tmp_path):
    assert_refused(call(S, "--widen", 0), "--widen")
    assert_refused(call(S, "--growth", "--widen", 2), "--growth", "--widen")
    none = tmp_path / "none"
    assert_refused(call(S, "--growth", "--figure", none / "g.png"), "there is no folder")
    assert_refused(call(S, "--figure", tmp_path / "g.png"), "--growth")
    assert_refused(call(S, "--json", none / "s.json"), "there is no folder")
    assert_refused(call(S, "--peer", "transformers", "--device", "cuda"), "--device")
    assert_refused(call(S, "--level", "much"), "--level")
