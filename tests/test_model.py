"""Chapter 1: the model against transformers and golden values, cache, files, tokenizer."""
import json
import os
import random
import re
import sys
import unicodedata

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
from conftest import ROOT, SHARED, assert_refused, call, run, tiny
from model import TOY, InputError, KVCache, Pythia, PythiaConfig, Tokenizer, official_name, sample

# the ten official sizes: D, L, H, V and the number of parameters
OFFICIAL = {"14m": (128, 6, 4, 50304, 14067712),
            "31m": (256, 6, 8, 50304, 30494720),
            "70m": (512, 6, 8, 50304, 70426624),
            "160m": (768, 12, 12, 50304, 162322944),
            "410m": (1024, 24, 16, 50304, 405334016),
            "1b": (2048, 16, 8, 50304, 1011781632),
            "1.4b": (2048, 24, 16, 50304, 1414647808),
            "2.8b": (2560, 32, 32, 50304, 2775208960),
            "6.9b": (4096, 32, 32, 50432, 6857302016),
            "12b": (5120, 36, 40, 50688, 11846072320)}


def test_official_sizes():
    for name, (D, L, H, V, parameters) in OFFICIAL.items():
        with torch.device("meta"):
            model = Pythia(PythiaConfig(V, D, 4 * D, L, H))
        assert sum(p.numel() for p in model.parameters()) == parameters, name


def test_costs_in_block_equivalents():
    model = tiny()
    config, matrices = model.config, [p for p in model.layers[0].parameters() if p.dim() == 2]
    assert config.block_weights == sum(p.numel() for p in matrices)
    assert config.unembed_cost == model.embed_out.weight.numel() / config.block_weights
    assert config.full_cost == 4 + config.unembed_cost


def test_official_configs_and_names():
    path = SHARED / "data" / "pythia" / "configs.json"
    if not path.exists():
        pytest.skip("official configurations not at hand")
    for name, d in json.loads(path.read_text()).items():
        c = PythiaConfig.from_dict(d)
        assert (c.hidden_size, c.rotary_pct) == (d["hidden_size"], 0.25) and c.use_parallel_residual
    header = json.loads((path.parent / "model.safetensors.header.json").read_text())
    with torch.device("meta"):
        ours = Pythia(PythiaConfig.from_dict(json.loads(path.read_text())["pythia-14m"]))
    assert {official_name(n): list(p.shape) for n, p in ours.named_parameters()} == {
        k: v["shape"] for k, v in header.items() if k != "__metadata__"}


@pytest.mark.parametrize("case", ["parallel", "sequential"])
def test_logits_equal_golden(case):
    path = ROOT / "tests" / "golden" / f"{case}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        model = Pythia(PythiaConfig.from_dict(json.loads(f.metadata()["config"])))
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: tensors[official_name(name)] for name in names})
    with torch.no_grad():
        logits, _ = model(tensors["ids"])
    assert (logits - tensors["logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("partial", [0.25, 1.0])
@pytest.mark.parametrize("D, H, L, shape", [
    (32, 4, 2, (1, 7)), (64, 2, 3, (3, 33)), (48, 3, 5, (2, 64))])
def test_logits_equal_transformers(parallel, partial, D, H, L, shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPTNeoXConfig(
        vocab_size=120, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=L,
        num_attention_heads=H, max_position_embeddings=128, use_parallel_residual=parallel,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                         "partial_rotary_factor": partial})
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(1 if p.dim() == 1 else 0, 0.3 if p.dim() == 2 else 0.1)
    theirs.save_pretrained(tmp_path)      # a checkpoint as current transformers writes it
    ours, ids = Pythia.from_pretrained(tmp_path), torch.randint(0, 120, shape)
    with torch.no_grad():
        assert (ours(ids)[0] - theirs(ids).logits).abs().max() <= 1e-4


def test_cached_equals_uncached_for_any_chunks_and_depths():
    rnd = random.Random(0)
    for trial in range(30):
        rotary_pct = rnd.choice((0.25, 1.0))
        model = tiny(trial, use_parallel_residual=trial % 2 == 0, rotary_pct=rotary_pct)
        L, B, T = 4, rnd.choice((1, 3)), rnd.randint(1, 40)
        ids = torch.randint(0, 96, (B, T))
        want, hidden = model(ids, exits=(1, 3))
        cuts = sorted({0, L, rnd.randrange(1, L), rnd.randrange(1, L)})   # segments of the depth
        cache = model.new_cache(B, T)
        waiting = {d: model.embed(ids)[:, :0] for d in cuts}   # a random order of advancing chunks
        arrived = 0
        while cache.length[-1] < T:
            if arrived < T and rnd.random() < 0.6:
                n = rnd.randint(1, T - arrived)
                waiting[0] = torch.cat((waiting[0], model.embed(ids[:, arrived:arrived + n])), 1)
                arrived += n
            for a, b in zip(cuts, cuts[1:]):
                if waiting[a].shape[1] and rnd.random() < 0.7:
                    waiting[b] = torch.cat((waiting[b], model.run(waiting[a], a, b, cache)), 1)
                    waiting[a] = waiting[a][:, :0]
        scale = want.abs().max().clamp(min=1)
        assert (model.unembed(waiting[L]) - want).abs().max() <= 1e-5 * scale
        assert torch.equal(hidden[0], model.hidden_states(ids, (1,))[0])


def test_cache_truncates_by_integers_and_reads_only_what_is_filled():
    model = tiny()
    cache = model.new_cache(1, 50)
    ids = torch.randint(0, 96, (1, 20))
    model.run(model.embed(ids), 0, 4, cache)
    filled = cache.append(0, torch.zeros(2, 1, 4, 3, 8))
    assert filled.shape == (2, 1, 4, 23, 8)   # attention is handed 23 columns, not 50
    before = cache.kv.clone()
    cache.truncate(10)
    # bit by bit: what is not filled may hold any number, also NaN
    assert cache.length == [10] * 4
    assert torch.equal(before.view(torch.int32), cache.kv.view(torch.int32))
    again = model.run(model.embed(ids[:, 10:]), 0, 4, cache)
    assert torch.allclose(again, model.hidden_states(ids, (4,))[0][:, 10:], atol=1e-5)


def test_full_context_and_beyond():
    model = tiny()
    with pytest.raises(InputError, match="65 tokens do not fit in a context of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="context of 5"):
        model.run(model.embed(torch.zeros(1, 6, dtype=torch.long)), 0, 4, model.new_cache(1, 5))
    assert len(list(sample(model, [1] * 64, 10))) == 1   # the last position predicts one token
    with pytest.raises(InputError, match="the prompt has 65 tokens"):
        next(sample(model, [1] * 65, 1))
    with pytest.raises(InputError, match="empty"):
        next(sample(model, [], 1))


def test_sample_equals_recomputing_everything():
    model = tiny()
    ids = [3, 1, 4]
    new = list(sample(model, ids, 12))
    for i, token in enumerate(new):
        assert model(torch.tensor([ids + new[:i]]))[0][0, -1].argmax() == token
    sampled = list(sample(model, ids, 12, temperature=1.0, seed=5))
    assert sampled == list(sample(model, ids, 12, temperature=1.0, seed=5)) != new


def test_blocks_of_one_run_must_be_equally_long():
    model = tiny()
    cache, x = model.new_cache(1, 10), model.embed(torch.zeros(1, 3, dtype=torch.long))
    model.run(x, 0, 2, cache)
    with pytest.raises(AssertionError, match="equally long"):
        model.run(x, 1, 3, cache)


def test_keys_values_are_what_the_block_leaves():
    model = tiny()
    whole, only = model.new_cache(1, 10), model.new_cache(1, 10)
    x = model.embed(torch.randint(0, 96, (1, 5)))
    for part in (x[:, :2], x[:, 2:]):
        model.run(part, 0, 1, whole)
        model.keys_values(part, 0, only)
    assert only.length == whole.length == [5, 0, 0, 0]
    assert torch.equal(only.kv[0, :, :, :, :5], whole.kv[0, :, :, :, :5])


def test_pick_goes_on_with_entries_of_the_batch():
    model, ids = tiny(), torch.randint(0, 96, (3, 8))
    cache = model.new_cache(3, 8)
    model.run(model.embed(ids[:, :7]), 0, 4, cache)
    cache.pick([2, 2, 0])
    x = model.run(model.embed(ids[[2, 2, 0], 7:]), 0, 4, cache)
    want = model.hidden_states(ids[[2, 2, 0]], (4,))[0][:, 7:]
    assert torch.allclose(x, want, atol=1e-5)
    with pytest.raises(InputError, match="9 tokens do not fit in a context of 8"):
        cache.check_room(9)
    assert len(KVCache(model.config, 1, 8, blocks=1).length) == 1


# ---------------------------------------------------------------- official files


def saved(model, folder, dtype=torch.float32, shards=1, extra=None, drop=()):
    """Write an official-style folder: config.json and the weights, also in shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    tensors = {official_name(name): p.to(dtype) for name, p in model.named_parameters()}
    tensors.update(extra or {})
    for name in drop:
        del tensors[name]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, places = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        places.update(dict.fromkeys(names[i::shards], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_from_pretrained(tmp_path, dtype, shards):
    model = tiny()
    loaded = Pythia.from_pretrained(saved(model, tmp_path / "m", dtype, shards))
    for (n, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a.to(dtype).float(), b) and not b.requires_grad
    short = Pythia.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert short.embed_in.weight.dtype == torch.bfloat16


def test_buffers_of_older_exports_are_skipped(tmp_path):
    old = {f"gpt_neox.layers.{i}.attention.{b}": torch.zeros(1) for i in range(4)
           for b in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    Pythia.from_pretrained(saved(tiny(), tmp_path / "m", extra=old))


def test_weights_that_do_not_fit_are_listed(tmp_path):
    with pytest.raises(InputError, match="missing gpt_neox.final_layer_norm.bias"):
        without = saved(tiny(), tmp_path / "a", drop=("gpt_neox.final_layer_norm.bias",))
        Pythia.from_pretrained(without)
    with pytest.raises(InputError, match="unexpected gpt_neox.stranger"):
        stranger = {"gpt_neox.stranger": torch.zeros(2)}
        Pythia.from_pretrained(saved(tiny(), tmp_path / "b", extra=stranger))
    with pytest.raises(InputError, match=r"embed_out.weight has shape \[5, 32\], not \[96, 32\]"):
        misshapen = {"embed_out.weight": torch.zeros(5, 32)}
        Pythia.from_pretrained(saved(tiny(), tmp_path / "c", extra=misshapen))
    folder = saved(tiny(), tmp_path / "d")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        Pythia.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"these are not weights at all")
    assert_refused(call(M, "--model", folder), "cannot be read as safetensors")
    (folder / "model.safetensors").unlink()
    assert_refused(call(M, "--model", folder), "model.safetensors.index.json is missing")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert_refused(call(M, "--model", folder), "no JSON object")


@pytest.mark.parametrize("field, value, named", [
    ("model_type", "llama", "model_type"), ("hidden_act", "relu", "hidden_act"),
    ("tie_word_embeddings", True, "tie_word_embeddings"),
    ("attention_bias", False, "attention_bias"),
    ("rope_scaling", {"type": "linear", "factor": 2}, "rope"),
    ("vocab_size", 0, "vocab_size is 0, supported is from 1 to 16777216"),
    ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0, supported is from 1"),
    ("num_attention_heads", 5, "hidden_size 32 is not a multiple of num_attention_heads 5")])
def test_unsupported_configurations_name_the_field(field, value, named):
    with pytest.raises(InputError, match=named):
        PythiaConfig.from_dict({**tiny().config.to_dict(), field: value})


def test_incomplete_configuration(tmp_path):
    sizes = dict(vocab_size=5, num_hidden_layers=1, intermediate_size=2, num_attention_heads=1)
    with pytest.raises(InputError, match="hidden_size is missing"):
        PythiaConfig.from_dict(sizes)
    with pytest.raises(InputError, match="config.json is missing; is this a model's folder?"):
        Pythia.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is not JSON"):
        Pythia.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        Pythia.from_pretrained(tmp_path)


def test_a_configuration_survives_its_own_file():
    config = tiny(use_parallel_residual=False, rotary_pct=0.5).config
    assert PythiaConfig.from_dict(config.to_dict()) == config


BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("fields, pct, base", [
    ({}, 0.25, 10000), ({"rotary_pct": 1, "rotary_emb_base": 5.0}, 1, 5),
    ({"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
     0.5, 500),
    ({"rotary_pct": 0.5, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
     1, 500),
    ({"rotary_emb_base": 7, "rope_parameters": {}, "rope_scaling": None}, 0.25, 7),
    ({"rope_scaling": {"type": "default", "rope_theta": 7.0},
      "rope_parameters": {"rope_theta": 500.0}}, 0.25, 7),
    ({"rope_theta": 10000, "partial_rotary_factor": 0.25, "head_dim": 8}, 0.25, 10000)])
def test_rope_is_read_where_transformers_reads_it(fields, pct, base):
    config = PythiaConfig.from_dict({**BASE, **fields})
    assert (config.rotary_pct, config.rotary_emb_base) == (pct, base)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoXConfig.from_dict(
        {**BASE, **json.loads(json.dumps(fields))}).rope_parameters
    assert (theirs["partial_rotary_factor"], theirs["rope_theta"]) == (pct, base)


@pytest.mark.parametrize("fields, named", [
    ({"rope_theta": 500.0}, "rope_theta = 500.0 stands in a place"),
    ({"rotary_dim": 8}, "rotary_dim"),
    ({"partial_rotary_factor": 1.0}, "partial_rotary_factor"), ({"head_dim": 16}, "head_dim"),
    ({"rope_type": "linear"}, "rope_type"),
    ({"rope_parameters": {"rope_theta": None}}, "rotary_emb_base is missing"),
    ({"rope_parameters": {"rope_theta": 5.0, "factor": 2.0}}, "factor = 2.0 stands"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
    ({"rope_parameters": "default"}, "rope"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rotary_pct": "0.25"}, "rotary_pct is '0.25'"),
    ({"rotary_pct": 2}, "rotary_pct is 2, supported is from 0.0 to 1.0"),
    ({"layer_norm_eps": None}, "layer_norm_eps is missing"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ({"max_position_embeddings": "2048"}, "max_position"),
    ({"use_parallel_residual": "false"}, "use_parallel_residual"),
    ({"vocab_size": 10 ** 18}, "vocab_size is 10+, supported is from 1 to 16777216"),
    ({"vocab_size": True}, "vocab_size"),
    ({"num_attention_heads": 32, "rotary_pct": 1.0}, "odd")])
def test_numbers_of_another_type_range_or_place_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        PythiaConfig.from_dict({**BASE, **fields})


ODD = [None, True, 0, -1, 2.5, float("nan"), float("inf"), 10 ** 18, 10 ** 400,
       "", "x", "0.25", [], [[1]], {}, {"a": 1}, "\ud800"]


def mutated(x, rnd):
    """A copy of JSON with something removed, exchanged or replaced by something odd."""
    x = node = json.loads(json.dumps(x))
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        k, other = rnd.choice(keys), rnd.choice(keys)
        if not isinstance(node[k], (dict, list)) or not node[k] or rnd.random() < 0.3:
            break
        node = node[k]
    way = rnd.random()
    if way < 0.2:
        del node[k]
    elif way < 0.4:
        node[k], node[other] = node[other], node[k]
    else:
        node[k] = rnd.choice(ODD)
    return x


def used_or_refused(use):
    """Whether use() worked. It may end in an InputError of one line, in nothing else."""
    try:
        use()
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return False
    return True


def test_a_damaged_configuration_is_used_or_refused_in_one_line(tmp_path):
    folder, rnd, used = saved(tiny(), tmp_path / "m"), random.Random(0), 0
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    for _ in range(60):
        fields = mutated({**tiny().config.to_dict(), "rope_parameters": rope}, rnd)
        (folder / "config.json").write_text(json.dumps(fields))
        used += used_or_refused(lambda: Pythia.from_pretrained(folder)(torch.tensor([[1, 2, 3]])))
    assert 5 < used < 50
    for damage in ("[" * 10 ** 5, '{"a":' * 10 ** 5, "\xff", "1" * 10 ** 4, "", "[]", "null",
                   '{"a": "' + "x" * 2 ** 24 + '"}'):
        (folder / "config.json").write_bytes(damage.encode("latin-1"))
        assert not used_or_refused(lambda: Pythia.from_pretrained(folder))


def test_lm_head_is_the_unembedding_and_bin_weights_are_not_read(tmp_path):
    model = tiny()
    folder = saved(model, tmp_path / "a", extra={"lm_head.weight": model.embed_out.weight + 0},
                   drop=("embed_out.weight",))
    assert torch.equal(Pythia.from_pretrained(folder).embed_out.weight, model.embed_out.weight)
    both = saved(model, tmp_path / "b", extra={"lm_head.weight": model.embed_out.weight + 1})
    with pytest.raises(InputError, match="embed_out.weight twice"):
        Pythia.from_pretrained(both)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="bin weights are not read: they are pickles.*"
                                         "save them as safetensors"):
        Pythia.from_pretrained(folder)


def test_ids_beyond_the_model_are_refused(tmp_path):
    from appendix.fast import fast
    from dssd import Plain, generate
    model = tiny()
    decoder, _ = fast(model)
    for wrong in (96, -1, 10 ** 9):
        for use in (lambda ids: model(torch.tensor([ids])), lambda ids: next(sample(model, ids, 1)),
                    lambda ids: generate(model, ids, 2, Plain()),
                    lambda ids: generate(decoder, ids, 2, Plain())):
            with pytest.raises(InputError, match="not all in 0 .. 95"):
                use([1, wrong])
    # the toy's tokenizer has 2048
    folder = saved(tiny(vocab_size=2050), tmp_path / "m")
    spec = json.loads((TOY / "tokenizer.json").read_text())
    for more, refused in ((0, False), (2, False), (3, True)):
        new = [{**spec["added_tokens"][0], "id": 2048 + n, "content": f"<{n}>"}
               for n in range(more)]
        (folder / "tokenizer.json").write_text(
            json.dumps({**spec, "added_tokens": spec["added_tokens"] + new}))
        if refused:
            assert_refused(call(M, "--model", folder),
                           "token 2050, b'<2>', has no row in the embedding")
        else:
            assert Tokenizer.load(folder).vocab_size == 2048 + more


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    from dssd import distribution
    model = tiny()
    assert list(sample(model, [1, 2], 9, temperature)) == list(sample(model, [1, 2], 9))
    p = distribution(torch.tensor([[1.0, 3.0, 2.0]]), temperature, 1.0)
    assert p.tolist() == [[0, 1, 0]]


def test_official_names_need_the_appendix(monkeypatch):
    unknown = call(M, "--model", "pythia-13b")
    assert_refused(unknown, "neither a folder nor an official name", "pythia-70m")
    monkeypatch.setitem(sys.modules, "appendix.hub", None)   # as where model.py was copied alone
    assert_refused(call(M, "--model", "pythia-70m"), "need appendix/hub.py", "not there")
    assert M.locate(str(TOY)) == TOY


# ---------------------------------------------------------------- the tokenizer


def random_texts(n, seed=0):
    """Strings rich in what tokenizers get wrong: marks, emoji, controls, spaces, special tokens."""
    rnd = random.Random(seed)
    pools = [range(0x300, 0x370), range(0x1F300, 0x1F700),
             [*range(32), 0x7F, 0x85, 0xA0, 0x2028, 0x3000, 0x200B, 0xFEFF],
             [32] * 5 + [9, 10, 13], range(97, 123), range(0x20, 0x300), range(0x900, 0xD00),
             range(0x1100, 0x1200), [*range(48, 58), 0xB2, 0x2160, 0x661],
             [*range(0xD800), *range(0xE000, 0x110000, 97)]]

    def piece():
        if rnd.random() < 0.05:
            return rnd.choice(("<|endoftext|>", "<|padding|>", "<|endof", "'ll", "'s"))
        if rnd.random() < 0.1:
            return " " * rnd.randint(1, 60)
        return chr(rnd.choice(rnd.choice(pools)))

    for _ in range(n):
        yield "".join(piece() for _ in range(rnd.randint(1, 40)))


def nfc(text):
    """NFC as the official tokenizer applies it: between the special tokens."""
    parts = re.split(r"(<\|endoftext\|>|<\|padding\|>)", text)
    # The tokens are in NFC already
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


def test_tokenizer_round_trip(toy_tokenizer):
    for text in random_texts(2000):
        ids = toy_tokenizer.encode(text)
        assert toy_tokenizer.decode(ids) == nfc(text) and all(0 <= i < 2048 for i in ids)
    assert toy_tokenizer.encode(" " * 24 + "x<|endoftext|>")[::2] == [2025, toy_tokenizer.end]


def assert_same_ids(folder, texts, left_out=0):
    """Our ids are the tokenizers library's.

    Both normalise, but the library orders combining marks by an older Unicode than Python's. Texts
    that this changes are left out, at most `left_out` of them.
    """
    tokenizers = pytest.importorskip("tokenizers")
    normalizer = tokenizers.normalizers.NFC()
    ours = Tokenizer.load(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    same = [t for t in texts if normalizer.normalize_str(t) == unicodedata.normalize("NFC", t)]
    assert len(same) >= len(texts) - left_out
    for text in same:
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text[:80])


OFFICIAL_TOKENIZER = SHARED / "data" / "tokenizer"


@pytest.mark.parametrize("folder", [TOY, OFFICIAL_TOKENIZER], ids=["toy", "official"])
def test_tokenizer_equals_tokenizers(folder):
    if not folder.exists():
        pytest.skip("official tokenizer not at hand")
    code = [(ROOT / name).read_text("utf-8") for name in ("model.py", "README.md")]
    assert_same_ids(folder, code + list(random_texts(500)), left_out=5)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [TOY, OFFICIAL_TOKENIZER], ids=["toy", "official"])
def test_tokenizer_equals_tokenizers_on_much_text(folder):
    if not folder.exists():
        pytest.skip("official tokenizer not at hand")
    from train import stdlib_documents
    texts = [text for _, text in stdlib_documents()][::40 if folder == TOY else 8]
    assert_same_ids(folder, texts + list(random_texts(2500)), left_out=25)
    for name in ("wikitext2.test.txt", "tinyshakespeare.txt"):
        path = SHARED / "data" / "text" / name
        if path.exists():
            assert_same_ids(folder, [path.read_bytes().decode()])
    if folder == OFFICIAL_TOKENIZER:
        known = (SHARED / "data" / "text" / "wikitext2.test.txt").read_bytes().decode()
        assert len(Tokenizer.load(folder).encode(known)) == 287159


def test_decode_tolerates_anything(toy_tokenizer):
    assert toy_tokenizer.decode([2047 + 5]) == ""
    assert "\ufffd" in toy_tokenizer.decode([toy_tokenizer.encode("é")[0]])


def test_damaged_tokenizer(tmp_path):
    with pytest.raises(InputError, match="missing"):
        Tokenizer.load(tmp_path)
    for text in ("{", "{}", '{"model": {"type": "WordPiece"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="not JSON|not a GPT-NeoX tokenizer.json"):
            Tokenizer.load(tmp_path)


LONG = ["\n" * 10 ** 6, "x" + "\t" * 10 ** 6 + "x", "\n" * 9999 + "a",
        "a" + " \u3000" * 5000 + " b", "\x1c" * 10 ** 4 + "y"]


def test_a_million_spaces_in_a_row(toy_tokenizer):
    # tiktoken's pattern alone panics at the first two
    for text in LONG:
        assert toy_tokenizer.decode(toy_tokenizer.encode(text)) == text
    assert toy_tokenizer.encode("\n" * 10 ** 5) == toy_tokenizer.bpe.encode_ordinary("\n" * 10 ** 5)


def test_long_runs_of_spaces_equal_tokenizers():
    assert_same_ids(TOY, ["x" + "\n" * 10 ** 5 + "x", "\t" * 10 ** 5, *LONG[2:]])


@pytest.mark.parametrize("place, value", [
    ("normalizer", None), ("normalizer", {"type": "NFKC"}), ("normalizer", "NFC"),
    ("truncation", {"max_length": 5}), ("padding", {"strategy": "BatchLongest"}),
    ("pre_tokenizer.add_prefix_space", True), ("pre_tokenizer.use_regex", False),
    ("pre_tokenizer", {"type": "Whitespace"}), ("post_processor.type", "RobertaProcessing"),
    ("decoder.type", "Metaspace"),
    ("post_processor", {"type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}),
    ("model.type", "Unigram"), ("model.dropout", 0.1),
    ("model.ignore_merges", True), ("model.byte_fallback", True),
    ("model.continuing_subword_prefix", "##"), ("model.end_of_word_suffix", "</w>"),
    ("added_tokens.0.lstrip", True), ("added_tokens.0.rstrip", True),
    ("added_tokens.5.single_word", True), ("added_tokens.5.id", 3000), ("added_tokens.5.id", 7),
    ("added_tokens.5.content", ""), ("added_tokens.1.id", 0),
    ("added_tokens.6.content", " " * 24),
    ("model.vocab.!", 7), ("model.vocab.!", 2.0), ("model.vocab.!", None),
    ("model.vocab", []), ("model.merges", []), ("model.merges.3", "q q"),
    ("added_tokens", None), ("model", None)])
def test_what_changes_ids_is_refused_by_name(tmp_path, toy_tokenizer, place, value):
    spec = json.loads(json.dumps(toy_tokenizer.spec))
    *path, last = [int(name) if name.isdigit() else name for name in place.split(".")]
    node = spec
    for name in path:
        node = node[name]
    node[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path)
    by_name = place.split(".")[0] not in ("added_tokens", "model") or last in ("dropout", "lstrip")
    assert not by_name or str(last) in str(error.value)


def test_what_changes_no_ids_is_read(tmp_path, toy_tokenizer):
    """Merges as pairs, a template of the text alone, empty affixes: as current libraries write the
    same tokenizer."""
    spec = json.loads(json.dumps(toy_tokenizer.spec))
    spec["model"].update(merges=[pair.split(" ") for pair in spec["model"]["merges"]],
                         dropout=0.0, ignore_merges=False,
                         continuing_subword_prefix="", end_of_word_suffix="", byte_fallback=False)
    spec["post_processor"] = {"type": "TemplateProcessing",
                              "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                              "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                                       {"Sequence": {"id": "B", "type_id": 1}}],
                              "special_tokens": {}}
    spec["added_tokens"][5].update(normalized=False)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 2048,
                                 "content": "e\u0301", "normalized": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode("\xe9 e\u0301" + " " * 21) == [
        2048, *toy_tokenizer.encode(" "), 2048, 2028]
    assert_same_ids(tmp_path, list(random_texts(100)) + ["\xe9 e\u0301" + " " * 21], left_out=5)


def test_a_damaged_tokenizer_is_used_or_refused_in_one_line(tmp_path, toy_tokenizer):
    rnd, texts, used = random.Random(0), [
        "  x e\u0301\n\n   foo's <|endoftext|>\t\xe9 12", " " * 30 + "\u1e9b\u0323"], 0
    parts = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"]
    try:
        from tokenizers import Tokenizer as Theirs
    except ImportError:
        Theirs = None
    for _ in range(60):
        part = rnd.choice(parts)
        spec = {**toy_tokenizer.spec,
                part: mutated({part: toy_tokenizer.spec[part]}, rnd).get(part)}
        if rnd.random() < 0.3:
            spec = mutated(toy_tokenizer.spec, rnd)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        if used_or_refused(lambda: Tokenizer.load(tmp_path)):
            used += 1
            ours = [Tokenizer.load(tmp_path).encode(text) for text in texts]
            try:
                theirs = Theirs and Theirs.from_file(str(tmp_path / "tokenizer.json"))
            except Exception:             # what the library itself refuses
                theirs = None
            assert theirs is None or ours == [theirs.encode(text).ids for text in texts], spec
    assert 5 < used < 50


def test_printer_holds_back_an_unfinished_character(toy_tokenizer, capsys):
    show, (first, *rest) = M.printer(toy_tokenizer), toy_tokenizer.encode("é")
    show(first)
    assert capsys.readouterr().out == "" and rest
    for token in rest:
        show(token)
    assert capsys.readouterr().out == "é"


# ---------------------------------------------------------------- files and the command line


def test_a_failed_run_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(OSError), M.written_whole(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    with M.written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_command_line():
    status, out, _ = call(M, "--prompt", "import ", "--max-new-tokens", "5")
    assert status == 0 and out.startswith("import ") and "5 tokens in" in out and "tokens/s" in out
    assert_refused(call(M, "--prompt", ""), "empty")
    assert_refused(call(M, "--prompt", "x " * 2100), "the context holds 2048")
    assert_refused(call(M, "--max-new-tokens", "0"), "at least 1")
    assert_refused(call(M, "--temperature", "nan"), "--temperature must be")
    assert_refused(run("model.py", "--temperature", "-1"), "--temperature must be")
