"""A side room: how speed changes with size, and how another library does on the same weights.

Real sizes without real weights. `widen` makes a model of the same function, with matrices r times
wider and taller. It repeats the residual stream r times: x becomes (x, x, .., x).

    LayerNorm    mean and variance stay, so its scale g and offset b are repeated
    y = W x + c  becomes (W .. W; ..; W .. W) / r times (x, .., x) + (c, .., c) = (y, .., y)
    logits       (U .. U) / r times (x, .., x) = U x, as many as before

Attention gets r times as many heads, copies of the old ones. `vocab` adds rows to the unembedding.
They never win. So the text, the drafts and the acceptance are the narrow model's, while the cost is
that of a real model: the toy x 16 has D = 2,048, as Pythia-1B. The limits: the heads are as good as
the narrow model's, which says nothing about a real one's, and the depth stays what it is.

`growth` measures tokens/s by context, by width, and by the depth at which tokens leave, beside the
roofline. This is the rate at which memory can deliver the bytes that Plain must read for a token:

    roofline in tokens/s = bandwidth in bytes/s / bytes per token

`beside_peers` runs transformers' cached greedy `generate` on the same weights, if it is installed.

    python -m appendix.scale --growth --figure growth.png    minutes, up to 11 GB of memory
    python -m appendix.scale --peer transformers             Plain and DSSD beside another library
    python -m appendix.scale --widen 8 --dtype bfloat16 --peer transformers --prompts 4
Expect a line per curve or per library. The last line of stdout is one JSON object.
`python bench.py --widen 8` compares all policies on a widened model.
"""
import argparse
import time
from dataclasses import replace
from statistics import median_high
from typing import NamedTuple

import torch

from appendix.fast import fast
from bench import (bandwidth, cost_of, finish, hardware, middle_of,
                   run_in_turn)
from dssd import DSSD, EarlyExit, Plain, always
from heads import (FAST, ExitHeads, held_out_prompts, load_model, measuring_windows,
                   model_options)
from model import InputError, Pythia, check_file, command_line, official_name

# ------------------------------------------------------------ a wider model of the same function


@torch.no_grad()
def widen(model, heads, r, vocab=0):
    """The same function, r times as wide, padded to `vocab` entries: (Pythia, ExitHeads)."""
    c = model.config
    if r < 1 or 0 < vocab < c.vocab_size:
        raise InputError(f"--widen must be at least 1, and --vocab at least the model's "
                         f"{c.vocab_size} entries")
    if vocab and heads.kind not in ("linear", "block"):
        raise InputError(f"--vocab cannot pad heads of kind {heads.kind}: their matrix does not "
                         f"read a norm of its own")
    wide, wide_heads = empty_wider(model, heads, r, max(vocab, c.vocab_size))
    # the model
    for (name, narrow), wider in zip(model.named_parameters(), wide.parameters()):
        if name == "embed_in.weight":
            wider.zero_()
            wider[:c.vocab_size] = narrow.repeat(1, r)  # (V, r D)
        elif name == "embed_out.weight":
            fill_output(wider, narrow, model.final_layer_norm, r)
        else:
            fill(wider, narrow, r)
    # its heads
    for head, wide_head in zip(heads.heads, wide_heads.heads):
        for (name, narrow), wider in zip(head.named_parameters(), wide_head.parameters()):
            if name == "out.weight":
                fill_output(wider, narrow, head.norm, r)
            else:
                fill(wider, narrow, r)
    return wide, wide_heads


def empty_wider(model, heads, r, vocab):
    """A frozen model and heads of the wider shape. Their weights are still to be filled."""
    c, like = model.config, model.embed_in.weight
    config = replace(c, vocab_size=vocab, hidden_size=r * c.hidden_size,
                     intermediate_size=r * c.intermediate_size,
                     num_attention_heads=r * c.num_attention_heads)
    with torch.device("meta"):
        wide = Pythia(config)
    wide = wide.to(like.dtype).to_empty(device=like.device).requires_grad_(False).eval()
    wide_heads = ExitHeads(wide, heads.layers, heads.kind, "random", heads.measure)
    wide_heads.calibration = heads.calibration
    return wide, wide_heads.requires_grad_(False).eval()


def fill(wider, narrow, r):
    """A vector is repeated, a matrix is tiled r x r and divided by r."""
    if narrow.dim() == 1:
        wider.copy_(narrow.repeat(r))
    else:
        wider.copy_(narrow.repeat(r, r) / r)


def fill_output(wider, narrow, norm, r):
    """A matrix (V, D) that gives logits: rows stay, and new rows never win.

    A new row w has w . (g x + b) = -50 for every normalised x. The entries of x sum to 0, so
    w = c / g with c = -50 / sum(b / g) does it. Such a logit adds e^-50 to the softmax.
    """
    V = len(narrow)
    wider[:V] = narrow.repeat(1, r) / r
    if len(wider) > V:
        g, b = norm.weight.float(), norm.bias.float()  # (D,) each
        row = -50 / (b / g).sum() / g  # (D,)
        wider[V:] = row.repeat(r) / r


# ------------------------------------------------------------ beside another library

PEERS = {"transformers generate": {}, "transformers lookup": {"prompt_lookup_num_tokens": 10}}


def peer_classes():
    """transformers' config and model of a GPT-NeoX. InputError where it is not installed."""
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        raise InputError("--peer transformers: it is not installed; pip install transformers, "
                         "or leave --peer out") from None
    return GPTNeoXConfig, GPTNeoXForCausalLM


def peer_of(model):
    """transformers' GPT-NeoX with this model's weights."""
    config, architecture = peer_classes()
    peer = architecture(config.from_dict(model.config.to_dict()))
    weights = {official_name(name): p for name, p in model.named_parameters()}
    if hasattr(peer, "lm_head"):  # the unembedding's name since version 5
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    peer = peer.to(model.embed_in.weight.dtype).eval()
    peer.load_state_dict(weights)
    return peer


def continuation(peer, prompt, max_new_tokens, options):
    """What the peer writes after a prompt, greedily and with its cache: a list of ids."""
    ids = torch.tensor([prompt])  # (1, T)
    out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens,
                        pad_token_id=1, eos_token_id=None, **options)
    return out[0, len(prompt):].tolist()


def peer_times(model, prompts, max_new_tokens, repeats):
    """{peer: (ms per token, texts)} on a list of prompts, in turn: medians, prefill included."""
    peer = peer_of(model)
    for options in PEERS.values():  # the first call warms up
        continuation(peer, prompts[0], max_new_tokens, options)
    times = {name: [] for name in PEERS}
    for _ in range(repeats):
        seconds = {name: 0.0 for name in PEERS}
        texts = {name: [] for name in PEERS}
        for prompt in prompts:
            for name, options in PEERS.items():
                begin = time.perf_counter()
                text = continuation(peer, prompt, max_new_tokens, options)
                seconds[name] += time.perf_counter() - begin
                texts[name].append(text)
        for name in PEERS:
            times[name].append(1000 * seconds[name] / len(prompts) / max_new_tokens)
    return {name: (median_high(times[name]), texts[name]) for name in PEERS}


def whole_ms(generations, max_new_tokens):
    """Milliseconds per token of one repeat, prefill included, as a peer's are taken."""
    seconds = sum(g.prefill_seconds + g.decode_seconds for g in generations)
    return 1000 * seconds / len(generations) / max_new_tokens


def beside_peers(model, decoder, policy, prompts, max_new_tokens, repeats, peer="transformers"):
    """Print and return ms per token of Plain, of a DSSD policy, and of the peers, all greedy.

    decoder: a twin of `model`, for which the policy was made. peer None: without any.
    """
    policies = {"Plain": Plain(), "DSSD": policy}
    runs = run_in_turn(decoder, policies, prompts, max_new_tokens, repeats=repeats)
    ms, record = {}, {}
    for name, counted in runs.items():
        ms[name] = median_high([whole_ms(generations, max_new_tokens) for generations in counted])
        record[name] = {"ms_per_token": ms[name]}
    print(f"{len(prompts)} prompts x {max_new_tokens} new tokens, prefill included: "
          f"Plain {ms['Plain']:.2f}, DSSD {ms['DSSD']:.2f} ms/token")
    plain_texts = [g.tokens for g in runs["Plain"][0]]
    times = peer_times(model, prompts, max_new_tokens, repeats) if peer else {}
    for name, (peer_ms, texts) in times.items():
        same = sum(a == b for a, b in zip(texts, plain_texts)) / len(texts)
        plain_is, dssd_is = peer_ms / ms["Plain"], peer_ms / ms["DSSD"]
        print(f"{name}: {peer_ms:.2f} ms/token, same text as Plain on {same:.0%} of the prompts; "
              f"Plain is {plain_is:.2f} x, DSSD {dssd_is:.2f} x as fast")
        record[name] = {"ms_per_token": peer_ms, "plain_is": plain_is, "dssd_is": dssd_is,
                        "same_text": same}
    return record


# ------------------------------------------------------------ how speed changes with size

CONTEXTS = (128, 256, 512, 1024, 1920)  # tokens of the prompts
WIDTHS = (1, 4, 8, 16)  # times the toy's; 16 takes 11 GB in all


class Pace(NamedTuple):
    """Tokens per second."""
    plain: float
    dssd: float
    roofline: float  # of Plain: how fast its bytes can be read


def pace(decoder, policy, prompts, max_new_tokens, repeats, bytes_per_second):
    """Plain and a DSSD policy in turn on the prompts -> Pace, medians of the repeats."""
    policies = {"Plain": Plain(), "DSSD": policy}
    runs = run_in_turn(decoder, policies, prompts, max_new_tokens, repeats=repeats)
    plain = middle_of(policies["Plain"], runs["Plain"])
    dssd = middle_of(policy, runs["DSSD"])
    _, bytes_per_token = cost_of(decoder, policies["Plain"], runs["Plain"][0])
    roofline = bytes_per_second / bytes_per_token
    return Pace(plain.tokens_per_second, dssd.tokens_per_second, roofline)


def by_context(model, heads, make, text, lengths, new_tokens, repeats, bytes_per_second):
    """Rows (tokens in the prompt, *Pace) on two texts."""
    decoder, twins = fast(model, heads)
    policy = make(decoder, twins)
    texts = measuring_windows("test", 2 * text.context, text.context, text).tolist()
    rows = []
    for n in lengths:
        prompts = [ids[:n] for ids in texts]
        rows.append((n, *pace(decoder, policy, prompts, new_tokens, repeats, bytes_per_second)))
    return rows


def by_width(model, heads, make, prompts, widths, new_tokens, repeats, bytes_per_second):
    """Rows (hidden size, *Pace) of the model widened."""
    rows = []
    for r in widths:
        wide, wide_heads = widen(model, heads, r)
        decoder, twins = fast(wide, wide_heads)
        policy = make(decoder, twins)
        speeds = pace(decoder, policy, prompts, new_tokens, repeats, bytes_per_second)
        rows.append((wide.config.hidden_size, *speeds))
    return rows


def by_depth(model, prompts, new_tokens, repeats):
    """Rows (depth, tokens per second) if every token left there.

    The text is of no use, its pace is. The deeper blocks' keys and values are copied from the exit
    state (fill="copy").
    """
    L = model.config.num_hidden_layers
    tied = ExitHeads(model, range(1, L), "tied").requires_grad_(False)
    decoder, twins = fast(model, tied)
    rows = []
    for depth in sorted({1, 2, L // 4, L // 2, 3 * L // 4, L - 1} & set(tied.layers)):
        policy = EarlyExit(twins, always(twins, depth), fill="copy")
        runs = run_in_turn(decoder, {"exit": policy}, prompts, new_tokens, repeats=repeats)
        rows.append((depth, middle_of(policy, runs["exit"]).tokens_per_second))
    return rows


def growth(model, heads, make, text, bytes_per_second, widths=WIDTHS, contexts=CONTEXTS,
           new_tokens=64, repeats=3):
    """Print and return tokens/s: {"context": rows, "depth": rows, "width": rows}.

    make: gives the DSSD policy for a decoder and its heads.
    """
    length, new_tokens = text.fit(64, new_tokens)
    prompts = held_out_prompts(2, length, text=text)
    contexts = [n for n in contexts if n + new_tokens <= text.context] or [length]
    record = {
        "context": by_context(model, heads, make, text, contexts, new_tokens, repeats,
                              bytes_per_second),
        "depth": by_depth(model, prompts, new_tokens, repeats),
        "width": by_width(model, heads, make, prompts, widths, min(24, new_tokens), repeats,
                          bytes_per_second),
    }
    for name, unit in (("context", "tokens in the prompt"), ("width", "hidden size")):
        parts = [f"{n:,}: {plain:.0f} / {dssd:.0f} / {roofline:.0f}"
                 for n, plain, dssd, roofline in record[name]]
        print(f"tokens/s by {unit}, Plain / DSSD / Plain's roofline: {', '.join(parts)}")
    parts = [f"{depth}: {speed:.0f}" for depth, speed in record["depth"]]
    print(f"tokens/s if every token left at a depth (keys and values copied): {', '.join(parts)}")
    return record


# ------------------------------------------------------------ command line


def width_list(text):
    return [int(part) for part in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(prog="python -m appendix.scale",
                                     description="Speed by size, and beside another library.")
    parser.add_argument("--growth", action="store_true",
                        help="tokens/s by context, by width and by depth")
    parser.add_argument("--widths", type=width_list, default=list(WIDTHS),
                        help="of --growth: times as wide, joined by commas (default: 1,4,8,16)")
    parser.add_argument("--figure", help="draw --growth to this file")
    parser.add_argument("--peer", choices=("transformers",), help="a library to compare with")
    parser.add_argument("--widen", type=int, default=1, help="times as wide, the same function")
    parser.add_argument("--vocab", type=int, default=0, help="rows to pad the unembedding to")
    model_options(parser, FAST)
    parser.add_argument("--level", default="auto", help="of DSSD: a level such as 0.9, or auto")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts of 64 tokens")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of every policy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of weights and arithmetic")
    parser.add_argument("--json", help="also write the JSON object to this file")
    args = parser.parse_args()
    check(args)
    return args


def check(args):
    """InputError for options that cannot be used, or not together."""
    if min(args.prompts, args.repeats) < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts and --repeats must be at least 1, --max-new-tokens at least 2")
    if args.growth and (args.widen != 1 or args.vocab or args.peer):
        raise InputError("--growth widens by itself; leave --widen, --vocab and --peer out")
    if args.figure and not args.growth:
        raise InputError("--figure draws --growth; give that, too")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; use cpu")
    if args.peer and args.device != "cpu":
        raise InputError("--peer compares on the CPU; leave --device out")
    if args.figure:
        from appendix import figures
        figures.check(args.figure)
    if args.json:
        check_file(args.json, "--json")
    if args.peer:
        peer_classes()


def dssd_maker(level):
    """What makes the DSSD policy of a decoder and its heads: at a level, or by costs (auto)."""
    if level == "auto":
        from appendix import tune
        return tune.automatic
    try:
        level = float(level)
    except ValueError:
        raise InputError(f"--level {level!r} must be a number such as 0.9, or auto") from None

    def at_level(decoder, twins):
        return DSSD(twins, twins.thresholds(level))
    return at_level


def main():
    args = arguments()
    make = dssd_maker(args.level)
    model, heads, _, text = load_model(args, FAST)
    if args.widen != 1 or args.vocab:
        model, heads = widen(model, heads, args.widen, args.vocab)
    decoder, twins = fast(model, heads)
    device, c = model.embed_in.weight.device, model.config
    print(f"{hardware(device)}; {args.dtype}, L = {c.num_hidden_layers}, D = {c.hidden_size:,}, "
          f"V = {c.vocab_size:,}")
    if args.growth:
        speed = bandwidth(device)
        record = growth(model, heads, make, text, speed, args.widths,
                        new_tokens=args.max_new_tokens, repeats=args.repeats)
        record["gigabytes_per_second"] = speed / 1e9
        if args.figure:
            from appendix import figures
            figures.growth(args.figure, record)
            print(f"wrote {args.figure}")
    else:
        length, args.max_new_tokens = text.fit(64, args.max_new_tokens)
        prompts = held_out_prompts(args.prompts, length, text=text)
        policy = make(decoder, twins)
        record = beside_peers(model, decoder, policy, prompts, args.max_new_tokens, args.repeats,
                              args.peer)
    finish(record, args)


if __name__ == "__main__":
    command_line(main)
