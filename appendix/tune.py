"""Side room: the automatic level. DSSD's thresholds and cap, chosen for a machine by its own clock.

A low threshold drafts rarely and wastes little. A high one drafts often and wastes more. Which one
is the fastest depends on the machine: on what a block costs there, a head, one more row in a pass.
So we

    record     let the full model continue a few prompts, and note at every token what each head
               would have said: its uncertainty, and the chance that its draft would be kept
    measure    time one block for 1, 2, .. rows, and all else that a draft or a pass needs
    replay     add these times up over the recorded tokens, for given thresholds and cap, without
               running the model: the expected milliseconds per token
    tune       replay many settings: every head, every pair of heads, many levels, all caps
    race       run the best six expected settings and plain decoding, and take the fastest

What is expected leaves out the time of the decoding loop itself. And behind a wrong draft it takes
the recorded uncertainties for those of the wrong text, which nobody recorded. The race knows both,
but it sees few settings. Tuning goes beyond the paper, which sets one level by hand.

    python -m appendix.tune             on the toy: the settings that raced, and the fastest of them
    python dssd.py --level auto         the same before the chapter's table
Expect several settings within a few percent of each other.

Letters: N recorded tokens, M exits, L blocks, D hidden size, V vocabulary.
"""
import argparse
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from confidence import MEASURES, calibrate, is_certain, unit_of
from dssd import DSSD, Plain, distribution, generate, summarize
from heads import ExitHeads, held_out_prompts
from model import TOY, InputError, Pythia, Tokenizer, command_line, locate

CAPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)                  # on the drafts of a round, all tried
LEVELS = (0.98, 0.95, 0.93, 0.91, 0.89, 0.87, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
MOST_ROWS = max(CAPS) + 1                                 # of one pass: a token and its drafts
RACERS = 6                                                # settings that race beside plain decoding

# ---------------------------------------------------------------- record


@torch.inference_mode()
def record(model, heads, prompts, max_new_tokens, temperature=0.0, top_p=1.0, decoder=None):
    """The full model's continuations of prompts, and what every head would have said at each token.

    Returns numpy arrays (N, M) over the new tokens of all prompts, their first ones left out: the
    uncertainty, on the heads' measure, and the chance that the head's draft is kept. This chance is
    0 or 1 at temperature 0 (is it the full model's choice?), else sum_x min(p(x), q(x)).
    `decoder`, a fast twin of the model, writes the continuations faster.
    """
    measure, decoder = MEASURES[heads.measure], decoder or model
    uncertainties, chances = [], []
    for prompt in prompts:
        done = generate(decoder, prompt, max_new_tokens, Plain(), temperature=temperature,
                        top_p=top_p, seed=0)
        text = torch.tensor([prompt + done.tokens], device=model.embed_in.weight.device)
        full, hidden = model(text[:, :-1], exits=heads.layers)
        # the prompt's pass gives the first new token, so drafts begin behind it
        full = full[0, len(prompt):]                                      # (n - 1, V)
        said = [z[0, len(prompt):] for z in heads.logits(hidden)]         # M x (n - 1, V)
        uncertainties.append(torch.stack([measure(z) for z in said], 1))
        kept = [chance_kept(full, z, temperature, top_p) for z in said]
        chances.append(torch.stack(kept, 1))
    return torch.cat(uncertainties).float().cpu().numpy(), torch.cat(chances).cpu().numpy()


def chance_kept(full, head, temperature, top_p):
    """How likely verification keeps a head's draft; logits (n, V) -> (n,)."""
    if temperature == 0:
        return (head.argmax(-1) == full.argmax(-1)).float()
    p = distribution(full, temperature, top_p)
    q = distribution(head, temperature, top_p)
    return torch.minimum(p, q).sum(-1)


# ---------------------------------------------------------------- measure


@dataclass
class Costs:
    """Milliseconds on this machine."""
    block: list       # one block, for a pass of 1, 2, .. rows
    ends: list        # embedding, unembedding and choice, for 1, 2, .. rows
    draft: list       # embedding, and the head's answer with its uncertainty, at each exit
    always: list      # the same where the head is always certain: nothing is measured


@torch.inference_mode()
def measure_costs(decoder, heads, most_rows=MOST_ROWS, repeats=30, cached=128):
    """Time the pieces of decoding, after `cached` positions -> Costs: medians.

    decoder and heads: what will decode, the readable ones or their fast twins.
    """
    cached = min(cached, decoder.config.max_position_embeddings - most_rows)
    L, measure = decoder.config.num_hidden_layers, MEASURES[heads.measure]
    cache = filled_cache(decoder, cached, most_rows)
    # every piece is a function without arguments
    pieces = {"block": [], "ends": [], "draft": [], "always": []}
    for n in range(1, most_rows + 1):
        pieces["block"].append(blocks_piece(decoder, cache, cached, n))
        pieces["ends"].append(ends_piece(decoder, n))
    for head in heads.heads:
        own = filled_head_cache(decoder, head, cached)
        pieces["draft"].append(draft_piece(decoder, head, own, cached, measure))
        pieces["always"].append(draft_piece(decoder, head, own, cached, None))
    # in turn: a slow moment of the machine is everyone's; three rounds warm up
    times = {name: [[] for _ in column] for name, column in pieces.items()}
    for i in range(repeats + 3):
        for name, column in pieces.items():
            for piece, spent in zip(column, times[name]):
                begin = time.perf_counter()
                piece()
                if i >= 3:
                    spent.append(1000 * (time.perf_counter() - begin))
    middle = {name: medians(column) for name, column in times.items()}
    middle["block"] = [ms / L for ms in middle["block"]]
    return Costs(**middle)


def medians(column):
    return [statistics.median(spent) for spent in column]


def filled_cache(decoder, cached, room):
    """A cache that holds `cached` positions, with room for more."""
    cache = decoder.new_cache(1, cached + room)
    ids = torch.zeros(1, cached, dtype=torch.long, device=decoder.embed_in.weight.device)
    decoder.run(decoder.embed(ids), 0, decoder.config.num_hidden_layers, cache)
    return cache


def filled_head_cache(decoder, head, cached):
    """The same of an exit head; None for a head without memory."""
    cache = head.new_cache(1, cached + 1)
    if cache is not None:
        head.body(states_of(decoder, cached), cache)
    return cache


def states_of(decoder, n):
    """Some residual stream of n positions (1, n, D)."""
    ids = torch.zeros(1, n, dtype=torch.long, device=decoder.embed_in.weight.device)
    return decoder.embed(ids)


# Each piece ends with a number on the host, as decoding does: this also waits for a GPU.


def blocks_piece(decoder, cache, cached, n):
    """n rows through all blocks."""
    x, L = states_of(decoder, n), decoder.config.num_hidden_layers

    def piece():
        decoder.run(x, 0, L, cache)[0, 0, 0].item()
        cache.truncate(cached)
    return piece


def ends_piece(decoder, n):
    """n tokens are embedded, unembedded, and their likeliest next tokens are read."""
    device = decoder.embed_in.weight.device

    def piece():
        x = decoder.embed(torch.tensor([[0] * n], device=device))         # (1, n, D)
        decoder.unembed(x)[0].argmax(-1).tolist()
    return piece


def draft_piece(decoder, head, cache, cached, measure):
    """A token is embedded, and a head answers; measure None: its uncertainty is not asked for."""
    device = decoder.embed_in.weight.device

    def piece():
        x = decoder.embed(torch.tensor([[0]], device=device))             # (1, 1, D)
        z = head.output(head.body(x, cache))[0, 0]                        # (V,)
        if measure is None or is_certain(measure(z), math.inf):
            z.argmax().item()
        if cache is not None:
            cache.truncate(cached)
    return piece


# ---------------------------------------------------------------- replay


def replay(bounds, costs, draft_ms, exits, kept, max_draft):
    """Milliseconds per token that DSSD would take on recorded tokens, without running the model.

    bounds: 0, the consulted exits, L. draft_ms: what asking each of these exits costs.
    exits[p]: which of them, counted from 0, drafts token p, or None. kept[p]: is that draft kept?
    """
    most, position, ms = len(costs.block), 0, 0.0
    while position < len(exits):
        # one round, as in dssd.decode: rows wait at every bound until a pass takes them on
        waiting, drafted, certain = [0] * (len(bounds) - 1), 0, True
        while certain:
            # the newest token arrives; it is drafted for if there is room
            waiting[0] += 1
            newest, certain = position + drafted, False
            asking = drafted < max_draft and newest < len(exits) - 1
            for s in range(len(draft_ms)):
                # all that wait at this bound go on to the next exit, in one pass
                rows = min(waiting[s], most)
                ms += (bounds[s + 1] - bounds[s]) * costs.block[rows - 1]
                waiting[s + 1] += waiting[s]
                waiting[s] = 0
                if asking:
                    ms += draft_ms[s]
                    certain = exits[newest] == s
                if certain:
                    drafted += 1
                    break
        # nobody is certain: all that wait go to full depth
        rows = min(waiting[-1], most)
        ms += (bounds[-1] - bounds[-2]) * costs.block[rows - 1] + costs.ends[rows - 1]
        # the drafts before the first wrong one, and the full model's token
        accepted = 0
        while accepted < drafted and kept[position + accepted]:
            accepted += 1
        position += accepted + 1
    return ms / position


# ---------------------------------------------------------------- tune


class Setting(NamedTuple):
    expected: float               # milliseconds per token
    thresholds: list              # one per head; None: never consulted
    max_draft: int


def tune(layers, L, uncertainty, chance, costs):
    """DSSD's settings under the measured costs, the fastest expected first: a list of Settings.

    layers: depths of the M exits. uncertainty, chance: what `record` gave. All `candidates` are
    tried with every cap. Of each choice of heads and cap, the fastest level is kept. Plain decoding
    is among them: all its thresholds are None.
    """
    # draw once which drafts are kept
    kept = np.random.default_rng(0).random(chance.shape) < chance         # (N, M)
    plain = L * costs.block[0] + costs.ends[0]
    fastest = {"plain": Setting(plain, [None] * len(layers), 1)}
    for chosen, thresholds in candidates(uncertainty, kept):
        exits, hits = first_certain(chosen, thresholds, uncertainty, kept)
        bounds = [0, *(layers[m] for m in chosen), L]
        # an always certain head need not be measured
        ask = costs.always if thresholds[chosen[0]] == math.inf else costs.draft
        draft_ms = [ask[m] for m in chosen]
        for cap in CAPS:
            ms = replay(bounds, costs, draft_ms, exits, hits, cap)
            best = fastest.get((chosen, cap))
            if best is None or ms < best.expected:
                fastest[chosen, cap] = Setting(ms, thresholds, cap)
    return sorted(fastest.values(), key=expectation)


def expectation(setting):
    return setting.expected


def candidates(uncertainty, kept):
    """Every head alone and every pair of heads, with thresholds: a list of (heads, thresholds).

    Thresholds are calibrated on the record itself, both heads at one level. A head alone may also
    draft always (infinity). A head that no threshold brings to the level drops out.
    """
    M = kept.shape[1]
    tried = []
    for chosen in [*itertools.combinations(range(M), 1), *itertools.combinations(range(M), 2)]:
        for level in LEVELS:
            thresholds = [None] * M
            for m in chosen:
                thresholds[m] = calibrate(uncertainty[:, m], kept[:, m], level)
            if all(thresholds[m] is not None for m in chosen):
                tried.append((chosen, thresholds))
        if len(chosen) == 1:
            tried.append((chosen, [math.inf if m == chosen[0] else None for m in range(M)]))
    return tried


def first_certain(chosen, thresholds, uncertainty, kept):
    """Two lists: which of the chosen heads drafts each token (or None), and is that draft kept?"""
    exits, hits = [None] * len(kept), [False] * len(kept)
    # from the deepest to the shallowest: the shallowest has the last word
    for s, m in reversed(list(enumerate(chosen))):
        for p in np.flatnonzero(is_certain(uncertainty[:, m], thresholds[m])):
            exits[p], hits[p] = s, bool(kept[p, m])
    return exits, hits


# ---------------------------------------------------------------- race


def race(decoder, policies, prompts, max_new_tokens, temperature=0.0, top_p=1.0, repeats=2):
    """Milliseconds per token of every policy, the best of the repeats: a list."""
    options = {"temperature": temperature, "top_p": top_p}
    times = [[] for _ in policies]
    for _ in range(repeats + 1):                                          # the first warms up
        runs = [[] for _ in policies]
        # in turn on every prompt: a slow moment of the machine is everyone's
        for i, prompt in enumerate(prompts):
            for policy, own in zip(policies, runs):
                own.append(generate(decoder, prompt, max_new_tokens, policy, seed=i, **options))
        for policy, own, spent in zip(policies, runs, times):
            spent.append(summarize(policy, own).ms_per_token)
    return [min(spent[1:]) for spent in times]


class Raced(NamedTuple):
    ms: float                     # per token, in the race
    expected: float               # per token, by the costs
    policy: object


def raced_settings(model, heads, prompts, max_new_tokens=96, temperature=0.0, top_p=1.0,
                   decoder=None, twins=None, recorded=None, costs=None, clock=race):
    """The settings that raced, the fastest first: a list of Raced. Arguments as in `automatic`."""
    if decoder is None:
        decoder = model
    if twins is None:
        twins = heads
    if recorded is None:
        recorded = record(model, heads, prompts, max_new_tokens, temperature, top_p, decoder)
    if costs is None:
        costs = measure_costs(decoder, twins)
    settings = tune(heads.layers, model.config.num_hidden_layers, *recorded, costs)
    # the best expected ones, and plain decoding
    plain = [setting for setting in settings if not any_consulted(setting)]
    others = [setting for setting in settings if any_consulted(setting)]
    racing = others[:RACERS] + plain
    policies = [DSSD(twins, setting.thresholds, setting.max_draft) for setting in racing]
    # every second prompt: the race need not know as many tokens as the record
    times = clock(decoder, policies, prompts[::2], max_new_tokens, temperature, top_p)
    results = [Raced(ms, setting.expected, policy)
               for ms, setting, policy in zip(times, racing, policies)]
    return sorted(results, key=raced_ms)


def raced_ms(result):
    return result.ms


def any_consulted(setting):
    return any(threshold is not None for threshold in setting.thresholds)


def automatic(model, heads, prompts, max_new_tokens=96, temperature=0.0, top_p=1.0,
              decoder=None, twins=None, recorded=None, costs=None, clock=race):
    """A DSSD policy with the thresholds and the cap that are fastest on this machine.

    prompts: lists of ids, not those that are measured later. decoder, twins: what will decode, such
    as fast twins; without them the model and its heads. The policy is made from twins. recorded:
    what `record` gave, where it is known, as from a smaller model of the same function. costs:
    Costs, where they are known. clock: takes what `race` takes, and gives the times.
    """
    results = raced_settings(model, heads, prompts, max_new_tokens, temperature, top_p,
                             decoder, twins, recorded, costs, clock)
    fastest = results[0]
    print(f"automatic level: {in_words(fastest.policy)}; expected {fastest.expected:.2f} ms/token, "
          f"raced {fastest.ms:.2f}", flush=True)
    return fastest.policy


def in_words(policy):
    """Which exits a policy asks, with which thresholds, and its cap."""
    unit, parts = unit_of(policy.heads.measure), []
    for layer, threshold in zip(policy.heads.layers, policy.thresholds):
        if threshold == math.inf:
            parts.append(f"exit {layer} always")
        elif threshold is not None:
            parts.append(f"exit {layer} below {threshold:.2f} {unit}".rstrip())
    if not parts:
        return "plain decoding"
    return f"{', '.join(parts)}, at most {policy.max_draft} drafts"


# ---------------------------------------------------------------- the room's demonstration


def main():
    from appendix.fast import fast
    parser = argparse.ArgumentParser(description="DSSD's thresholds and cap, for this machine.")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--heads", help="heads file (default: heads-fast.safetensors of the model)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts to tune on")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="tokens after each prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus, in (0, 1]")
    parser.add_argument("--readable", action="store_true", help="without the fast twin")
    args = parser.parse_args()
    if args.prompts < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts must be at least 1, --max-new-tokens at least 2")
    folder = locate(args.model)
    model, tokenizer = Pythia.from_pretrained(folder), Tokenizer.load(folder)
    heads = ExitHeads.load(args.heads or folder / "heads-fast.safetensors", model)
    decoder, twins = (model, heads) if args.readable else fast(model, heads)
    prompts = held_out_prompts(args.prompts, split="calibration", tokenizer=tokenizer)
    results = raced_settings(model, heads, prompts, args.max_new_tokens, args.temperature,
                             args.top_p, decoder, twins)
    print(f"milliseconds per token, {torch.get_num_threads()} threads")
    print(f"{'expected':>9}{'raced':>9}  setting")
    for ms, expected, policy in results:
        print(f"{expected:>9.2f}{ms:>9.2f}  {in_words(policy)}")
    print(f"fastest in the race: {in_words(results[0].policy)}")


if __name__ == "__main__":
    command_line(main)
