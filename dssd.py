"""Chapter 5. Dynamic Self-Speculative Decoding (DSSD): depth is skipped, the text stays.

After arXiv 2407.21082. Greedy decoding asks the full model for every token. DSSD first asks shallow
exits. The first head whose uncertainty is below its threshold *drafts* the token. At a token where
no head is certain, the full model runs, and the same pass verifies all drafts on the way:

    draft    x_{t+1} = argmax z_n(t)    at the first exit n with uncertainty(z_n(t)) < threshold_n
    verify   keep x_{t+1}, x_{t+2}, ..  up to the first that is not argmax z_L
             put the full model's token there, and drop the rest
             if all are kept, the same pass gives the next token as well

So the text is the full model's, whatever the heads say. `by_definition` is these lines without a
cache. Everything below it computes the same, each (position, block) once.

One level, through the thresholds, stands where LayerSkip has two numbers to tune by hand: the exit
and the number of drafts. A cap on the drafts remains, as in the authors' code (5 or 10 there, 8
here). The rows "cap 2, 4, 16" of the table show how little it matters. The cost of
a draft plays no part. In appendix/gain.py, ours, it decides.

The frontier. A decoder is a grid of (position, block). The frontier says, for every consulted
depth, how many positions have reached it. Drafting lets shallow depths run ahead. Verification
brings the deep ones up, many positions in one pass. Rejecting drafts lowers integers.

Sampling keeps the full model's distribution p (our addition). A draft x, drawn from q, is kept with
probability min(1, p(x) / q(x)), else replaced by a draw from max(0, p - q) (Leviathan et al., Chen
et al. 2023). Several are verified as one block (Sun et al. 2025), which keeps more: `verify_block`.
Whether to draft may depend on q, never on the x drawn from it.

    python dssd.py                  one prompt, coloured by depth, then a table of policies
    python dssd.py --level 0.9 --temperature 0.8 --prompt "class "
Expect, when greedy, the same text from every lossless policy, and fewer full passes from DSSD.
The table runs on the readable model. bench.py measures speed, with the fast twin.

Limits: batch 1. A prompt of P tokens can be followed by at most context - P + 1 new ones.
Letters: n positions, N positions cached, D hidden size, V vocabulary, L blocks.
"""
import argparse
import codecs
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from confidence import MEASURES, is_certain
from model import InputError, check_numbers, command_line, new_token_limit, seed_number

# ---------------------------------------------------------------- policies


@dataclass
class Policy:
    """What the decoding loop does. Made by Plain, EarlyExit, LayerSkip and DSSD."""
    name: str
    heads: object = None          # ExitHeads, or their fast twins
    thresholds: tuple = ()        # one per head; None: never consulted
    max_draft: int = 0            # drafts per round at most
    final: bool = False           # True: an exit's token is final and never verified
    fill: str = "exact"           # with final: how the skipped depth gets its keys and values

    def rule(self, positions, choice):
        """What decides when to draft, in a generation of about this many cached positions."""
        return ByThresholds(self, choice)


def Plain():
    """The full model, token by token."""
    return Policy("Plain")


def EarlyExit(heads, thresholds, fill="exact"):
    """The first certain head's token is final. Fewer blocks, but another text: not lossless.

    fill="exact" takes a position deeper when a later token needs its keys and values there.
    fill="copy" computes the deeper ones from its exit state (CALM, Schuster et al. 2022).
    """
    if fill not in ("exact", "copy"):
        raise InputError(f"fill {fill!r} must be 'exact' or 'copy'")
    return Policy("EarlyExit", heads, tuple(thresholds), final=True, fill=fill)


def LayerSkip(heads, exit, draft_length):
    """A fixed exit drafts a fixed number of tokens: the baseline (Elhoushi et al. 2024)."""
    if exit not in heads.layers or draft_length < 1:
        raise InputError(f"LayerSkip: exit {exit} must be one of {heads.layers}, "
                         f"and the draft length at least 1")
    return Policy(f"LayerSkip {exit}x{draft_length}", heads, always(heads, exit), draft_length)


def DSSD(heads, thresholds, max_draft=8):
    """The paper's method: exit and number of drafts follow from the thresholds of one level."""
    if max_draft < 1:
        raise InputError("max_draft must be at least 1")
    return Policy("DSSD", heads, tuple(thresholds), max_draft)


def always(heads, exit):
    """Thresholds with which the head at depth `exit` is always certain, and no other is asked.

    exit None: every head is consulted.
    """
    return tuple(math.inf if exit in (n, None) else None for n in heads.layers)


# ---------------------------------------------------------------- the definition


def by_definition(model, ids, max_new_tokens, policy, stop=None):
    """Greedy DSSD without a cache -> (new tokens, the depth of each, [(drafted, kept)] by round).

    Everything is recomputed at every step. `decode` below equals this draft for draft.
    """
    L = model.config.num_hidden_layers
    limit = new_token_limit(model, ids, max_new_tokens)
    text, depths, rounds = list(ids), [L], []
    text.append(full_choices(model, text)[-1])
    while len(depths) < limit and stop not in text[len(ids):]:
        # draft, while some exit is certain
        drafts, exits = [], []
        cap = min(policy.max_draft, limit - len(depths) - 1)
        while len(drafts) < cap and stop not in drafts:
            exit, token = first_certain(model, policy, text + drafts)
            if exit is None:
                break
            drafts.append(token)
            exits.append(exit)
        # verify all drafts in one pass of the full model
        full = full_choices(model, text + drafts)[len(text) - 1:]
        kept = 0
        while kept < len(drafts) and drafts[kept] == full[kept]:
            kept += 1
        text += drafts[:kept] + [full[kept]]
        depths += exits[:kept] + [L]
        rounds.append((len(drafts), kept))
    new = text[len(ids):]
    if stop in new:
        new = new[:new.index(stop) + 1]
    return new, depths[:len(new)], rounds


@torch.inference_mode()
def full_choices(model, text):
    """The full model's most likely next token at every position of a text: list of ids."""
    logits, _ = model(torch.tensor([text]))
    return logits[0].argmax(-1).tolist()


@torch.inference_mode()
def first_certain(model, policy, text):
    """(exit, token) of the first certain head at the last position of a text, else (None, None)."""
    heads = policy.heads
    _, hidden = model(torch.tensor([text]), exits=heads.layers)
    for exit, threshold, z in zip(heads.layers, policy.thresholds, heads.logits(hidden)):
        z = z[0, -1]                                                      # (V,)
        if is_certain(MEASURES[heads.measure](z), threshold):
            return exit, z.argmax().item()
    return None, None


# ---------------------------------------------------------------- the frontier


@dataclass
class Log:
    """What a generation did, in order. Everything that is counted is derived from it."""
    prompt: int = 0                              # positions of the prompt
    passes: list = field(default_factory=list)   # (first, end, start, stop): positions, blocks
    asked: list = field(default_factory=list)    # (exit, first, end): positions that a head read
    copied: list = field(default_factory=list)   # (first, end, start, stop): by CALM's shortcut
    rounds: list = field(default_factory=list)   # (drafted, kept): one pass to full depth each


class Frontier:
    """How many positions have reached which depth, and the residual streams that arrived there.

    `bounds` are the depths 0, the consulted exits, L. `states[s]` (1, N, D) holds the streams at
    bounds[s], of which `reached[s]` have arrived. Positions reached[s + 1] .. reached[s] - 1 wait
    there to go deeper.
    """

    def __init__(self, model, policy, capacity, log):
        self.model, self.log = model, log
        consulted = [m for m, threshold in enumerate(policy.thresholds) if threshold is not None]
        self.heads = [policy.heads.heads[m] for m in consulted]
        exits = [policy.heads.layers[m] for m in consulted]
        self.bounds = [0, *exits, model.config.num_hidden_layers]
        self.states = model.new_states(len(self.bounds), capacity)
        self.reached = [0] * len(self.bounds)
        self.cache = model.new_cache(1, capacity)
        self.head_caches = [head.new_cache(1, capacity) for head in self.heads]

    def enter(self, tokens):
        """New tokens arrive at depth 0."""
        self.arrive(0, self.model.embed([tokens]))

    def arrive(self, s, x):
        """Put x (1, n, D) behind the states that have reached bounds[s]."""
        first = self.reached[s]
        self.reached[s] = end = first + x.shape[1]
        self.states[s, :, first:end] = x

    def advance(self, goal):
        """All positions that wait before bounds[goal] go there, in as few passes as possible."""
        s = 0
        while s < goal:
            # one pass goes on to the next bound at which others wait
            first, end, to = self.reached[s + 1], self.reached[s], s + 1
            while to < goal and self.reached[to + 1] == first:
                to += 1
            if first < end:
                start, stop = self.bounds[s], self.bounds[to]
                between = {self.bounds[b]: self.states[b, :, first:end] for b in range(s + 1, to)}
                waiting = self.states[s, :, first:end]                    # (1, n, D)
                x = self.model.run(waiting, start, stop, self.cache, between)
                self.reached[s + 1:to] = [end] * len(between)
                self.arrive(to, x)
                self.log.passes.append((first, end, start, stop))
            s = to

    def ask(self, s, rows=1):
        """All that waits goes to bounds[s + 1] -> logits (rows, V) of the head there."""
        self.advance(s + 1)
        return self.heads[s].output(self.read(s, rows)[:, -rows:])[0]

    def read(self, s, rows=1):
        """The head at bounds[s + 1] reads on -> (1, n, D).

        With a memory it reads all that is new, without one the newest `rows` states alone.
        """
        cache, end = self.head_caches[s], self.reached[s + 1]
        first = end - rows if cache is None else cache.length[0]
        self.log.asked.append((self.bounds[s + 1], first, end))
        return self.heads[s].body(self.states[s + 1, :, first:end], cache)

    def full_depth(self, rows):
        """All that waits goes to depth L -> the full model's logits of the newest (rows, V)."""
        self.advance(len(self.bounds) - 1)
        end = self.reached[-1]
        return self.model.unembed(self.states[-1, :, end - rows:end])[0]

    def cut(self, n):
        """Forget every position from n on, at every depth."""
        self.reached = [min(n, end) for end in self.reached]
        for cache in (self.cache, *self.head_caches):
            if cache is not None:
                cache.truncate(n)

    def copy(self, s):
        """CALM's shortcut: the newest position's deeper keys and values from its exit state."""
        end, start, stop = self.reached[s], self.bounds[s], self.bounds[-1]
        x = self.states[s, :, end - 1:end]                                # (1, 1, D)
        for block in range(start, stop):
            self.model.keys_values(x, block, self.cache)
        for deeper in range(s + 1, len(self.bounds)):
            self.arrive(deeper, x)
        self.log.copied.append((end - 1, end, start, stop))


# ---------------------------------------------------------------- draft and verify


class Draft(NamedTuple):
    token: int
    depth: int                    # of the exit that drafted it
    answer: object                # of Choice.of: when sampling the head's distribution q (V,)


def distribution(logits, temperature, top_p):
    """Probabilities (..., V): softmax at the temperature, cut to the top-p nucleus."""
    p = (logits.float() / max(temperature, 1e-20)).softmax(-1)            # overflows nowhere
    if top_p < 1:
        ordered, at = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p] = 0                     # keep the fewest that reach top_p
        p = torch.zeros_like(p).scatter(-1, at, ordered)
        p /= p.sum(-1, keepdim=True)
    return p


class Choice:
    """How tokens are read off logits: greedy at temperature 0, else drawn from the top-p nucleus.

    A decoder may bring a quicker twin, as its attribute `Choice`: see appendix/small.py.
    """

    def __init__(self, temperature, top_p, seed=None):
        self.temperature, self.top_p = temperature, top_p
        self.generator, self.uniform = torch.Generator(), []
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def of(self, logits):
        """What logits (..., V) say: the likeliest ids (...), or probabilities (..., V)."""
        if self.temperature > 0:
            check_numbers(logits.amax(-1))
            return distribution(logits, self.temperature, self.top_p)
        largest, likeliest = logits.max(-1)
        check_numbers(largest)
        return likeliest

    def each(self, answers):
        """What `of` said of several positions -> one entry each: ids, or probabilities (V,)."""
        return answers.tolist() if self.temperature == 0 else list(answers)

    def token(self, answer):
        """One answer of `of` -> a token id."""
        return answer.item() if self.temperature == 0 else self.draw(answer)

    def random(self):
        """A number in [0, 1). Many are drawn at once: a call takes longer than a number."""
        if not self.uniform:
            numbers = torch.rand(256, dtype=torch.double, generator=self.generator)
            self.uniform = numbers.tolist()
        return self.uniform.pop()

    def draw(self, p):
        """A token id drawn from p (V,), which need not sum to 1. Faster than torch.multinomial."""
        upto = p.cumsum(-1, dtype=torch.double)                           # (V,)
        # the first id with upto > r, so never one of probability 0
        return torch.searchsorted(upto, self.random() * upto[-1], right=True).item()

    def uncertainty(self, measure, logits):
        """A measure of confidence.MEASURES of logits (..., V) -> (...)."""
        return MEASURES[measure](logits)

    def residual(self, weight, p, q):
        """max(0, weight p - q) of probabilities (V,), and its sum."""
        residual = (weight * p - q).clip(0)
        return residual, residual.sum().item()

    def chance_kept(self, full, head):
        """How likely a first draft is kept; answers of `of` -> (...). Greedy: bools."""
        if self.temperature == 0:
            return full == head
        return torch.minimum(full, head).sum(-1)


def propose(frontier, rule, drafted, choice):
    """The newest position goes from exit to exit until one drafts -> its Draft, or None."""
    for s in rule.exits_to_ask(drafted):
        z = frontier.ask(s)[0]                                            # (V,)
        answer = choice.of(z)
        if rule.drafts(s, z, answer):
            return Draft(choice.token(answer), frontier.bounds[s + 1], answer)
    return None


def verify(full, drafts, choice):
    """The accept rule. The full model's n + 1 answers at n drafts -> (kept, next token, chances).

    chances: how likely each draft was to be kept, given that those before it were. Greedy: bools.
    Only the first kept + 1 mean anything.
    """
    if choice.temperature > 0:
        return verify_block(full, drafts, choice)
    # keep x_i while x_i = argmax z_L
    chances = [draft.token == token for draft, token in zip(drafts, full)]
    kept = [*chances, False].index(False)
    return kept, full[kept], chances


def verify_block(full, drafts, choice):
    """Sampled drafts, verified as one block (Sun et al. 2025, arXiv 2403.10444) -> as verify.

    x_{i+1} was drawn from the head's q_i, and the full model says p_i there. w_i is the chance that
    at least the first i drafts are kept, given what they are:

        w_0 = 1        w_{i+1} = min(1, w_i p_i(x_{i+1}) / q_i(x_{i+1}))

    After them the text must go on with x in w_i p_i(x) of all cases. A draft can supply
    min(w_i p_i(x), q_i(x)) of these. The residual, max(0, w_i p_i - q_i), has to be drawn. So its
    sum S_i is the chance that exactly i drafts are kept. All i are tried in turn, and the last to
    win counts:

        i < n wins with chance S_i / (1 - w_i + S_i)      the denominator: no later one wins
        n     wins with chance w_n

    One by one (Leviathan et al. 2023) is w_{i+1} = w_i min(1, p_i / q_i). There a draft that the
    full model likes better than the head does cannot make up for one that it likes less.
    """
    weight, kept, source, chances = 1.0, 0, full[0], []
    for i, (x, _, q) in enumerate(drafts):
        # do exactly i drafts stay?
        residual, total = choice.residual(weight, full[i], q)             # (V,), S_i
        if choice.random() * (1 - weight + total) < total:
            kept, source = i, residual
        # w_{i+1}
        chances.append(max(0.0, 1 - total / weight))
        weight = min(1.0, float(weight * full[i][x] / q[x]))
        if not weight:
            break
    if choice.random() < weight:
        kept, source = len(drafts), full[-1]
    return kept, choice.draw(source), chances


# ---------------------------------------------------------------- when to draft


class ByThresholds:
    """The paper's rule. Every consulted exit is asked, and the first certain one drafts.

    A rule has this attribute and these methods. Another one: appendix/gain.py.
    """

    prompt_rows = 1               # positions of the prompt for which the full model answers

    def __init__(self, policy, choice):
        self.thresholds = [t for t in policy.thresholds if t is not None]
        self.measure = policy.heads.measure if policy.heads is not None else None
        self.choice = choice

    def read_prompt(self, frontier, full):
        """Heads with a memory read the prompt."""
        for s, cache in enumerate(frontier.head_caches):
            if cache is not None:
                frontier.read(s)

    def exits_to_ask(self, drafted):
        """The exits to ask in turn, with so many drafts pending."""
        return range(len(self.thresholds))

    def drafts(self, s, z, answer):
        """Does exit s draft? It has the logits z (V,), and Choice.of says `answer` of them."""
        # LayerSkip's head is certain whatever it says: then nothing needs to be measured
        threshold = self.thresholds[s]
        if threshold == math.inf:
            return True
        return is_certain(self.choice.uncertainty(self.measure, z), threshold)

    def learn(self, full, kept, chances):
        """Nothing is learned from the full model's answers and what `verify` says."""


# ---------------------------------------------------------------- the loop


@torch.inference_mode()
def decode(model, ids, limit, policy, choice, stop, log):
    """One generation of `limit` tokens at most. Yields (token, depth that produced it)."""
    L = model.config.num_hidden_layers
    frontier = Frontier(model, policy, len(ids) + limit, log)
    rule = policy.rule(len(ids) + limit // 2, choice)
    # the prompt goes to full depth and gives the first token; heads with a memory read it
    log.prompt = len(ids)
    frontier.enter(ids)
    full = choice.of(frontier.full_depth(min(rule.prompt_rows, len(ids))))
    token = choice.token(full[-1])
    rule.read_prompt(frontier, full)
    drafts, settled, emitted = [], [(token, L)], 0
    while True:
        # emit what is settled
        for token, depth in settled:
            emitted += 1
            yield token, depth
            if token == stop or emitted == limit:
                return
        # the newest token arrives at depth 0
        if drafts:
            token = drafts[-1].token
        frontier.enter([token])
        # a draft, if there is room for one
        fits = len(drafts) < policy.max_draft and emitted + len(drafts) + 1 < limit
        ended = bool(drafts) and token == stop
        proposal = None
        if policy.final or (fits and not ended):
            proposal = propose(frontier, rule, len(drafts), choice)
        settled = []
        if proposal is None:
            # nobody is certain: the full model verifies all drafts in one pass
            full = choice.each(choice.of(frontier.full_depth(len(drafts) + 1)))
            kept, token, chances = verify(full, drafts, choice)
            rule.learn(full, kept, chances)
            rejected = len(drafts) - kept
            if rejected:
                frontier.cut(frontier.reached[-1] - rejected)
            log.rounds.append((len(drafts), kept))
            settled = [(draft.token, draft.depth) for draft in drafts[:kept]]
            settled.append((token, L))
            drafts = []
        elif policy.final:
            settled = [(proposal.token, proposal.depth)]
            if policy.fill == "copy":
                frontier.copy(frontier.bounds.index(proposal.depth))
        else:
            drafts.append(proposal)


def stream(model, ids, max_new_tokens, policy, *, temperature=0.0, top_p=1.0, stop=None, seed=None,
           log=None):
    """As generate(), but yields (token, depth that produced it) as they are settled."""
    limit, heads = new_token_limit(model, ids, max_new_tokens), policy.heads
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError("max_new_tokens must be at least 1, temperature at least 0, "
                         "and top_p in (0, 1]")
    if heads is not None and len(policy.thresholds) != len(heads.layers):
        raise InputError(f"{len(policy.thresholds)} thresholds were given for "
                         f"{len(heads.layers)} heads")
    if heads is not None and heads.measure not in MEASURES:
        raise InputError(f"the heads' measure {heads.measure!r} is not one of "
                         f"{', '.join(MEASURES)}")
    log = Log() if log is None else log
    choice = getattr(model, "Choice", Choice)(temperature, top_p, seed)
    return decode(model, list(ids), limit, policy, choice, stop, log)


@dataclass
class Generation:
    tokens: list                  # new ids
    depths: list                  # the depth that produced each
    log: Log
    prefill_seconds: float        # until the first token
    decode_seconds: float         # all further tokens


def generate(model, ids, max_new_tokens, policy, *, temperature=0.0, top_p=1.0, stop=None,
             seed=None):
    """Continue the prompt `ids` by at most max_new_tokens tokens under a policy -> Generation.

    Greedy at temperature 0, else sampled from the top_p nucleus. Ends with the token `stop` (kept),
    or when the context is full: context - len(ids) + 1 new tokens. Raises InputError.
    """
    log, device = Log(), model.embed_in.weight.device
    options = {"temperature": temperature, "top_p": top_p, "stop": stop, "seed": seed}
    pairs = stream(model, ids, max_new_tokens, policy, log=log, **options)
    begin = seconds(device)
    first = next(pairs)
    middle = seconds(device)
    pairs = [first, *pairs]
    end = seconds(device)
    tokens = [token for token, _ in pairs]
    depths = [depth for _, depth in pairs]
    return Generation(tokens, depths, log, middle - begin, end - middle)


def seconds(device):
    """A clock that waits for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------- the accounts, from the log


@dataclass
class Summary:
    """What generations under one policy did. NaN: undefined.

    Per-token numbers leave out each prompt's first token.
    """
    emitted: int                  # new tokens, the prefill's first ones included
    drafted: int
    accepted: int                 # drafts kept (greedy: before the first mismatch)
    wasted: int                   # drafted - accepted
    rounds: int                   # verifications
    acceptance: float             # accepted / drafted
    tau: float                    # emitted tokens per round
    draft_length: float           # drafts per round
    layers_per_token: float       # blocks run
    ms_per_token: float
    tokens_per_second: float
    prefill_seconds: float        # of all prompts
    draft_lengths: Counter        # rounds by their number of drafts
    exits: Counter                # emitted tokens by the depth that produced them


def summarize(policy, generations):
    """Generations under one policy -> Summary. A prompt's own passes count in seconds only."""
    emitted = sum(len(g.tokens) for g in generations)
    decoded = max(1, emitted - len(generations))
    rounds, blocks = [], 0
    for g in generations:
        if not policy.final:
            rounds += g.log.rounds
        for first, end, start, stop in g.log.passes:
            if first >= g.log.prompt:
                blocks += (end - first) * (stop - start)
    drafted = sum(drafts for drafts, _ in rounds)
    accepted = sum(kept for _, kept in rounds)
    time_spent = sum(g.decode_seconds for g in generations)
    return Summary(
        emitted, drafted, accepted, drafted - accepted, len(rounds),
        acceptance=ratio(accepted, drafted),
        tau=ratio(decoded, len(rounds)),
        draft_length=ratio(drafted, len(rounds)),
        layers_per_token=blocks / decoded,
        ms_per_token=1000 * time_spent / decoded,
        tokens_per_second=ratio(decoded, time_spent),
        prefill_seconds=sum(g.prefill_seconds for g in generations),
        draft_lengths=Counter(drafts for drafts, _ in rounds),
        exits=Counter(depth for g in generations for depth in g.depths))


def ratio(a, b):
    return a / b if b else math.nan


# ---------------------------------------------------------------- the chapter's demonstration


def show_stream(tokenizer, pairs, L):
    """Print (token, depth) pairs as they come, coloured by depth, then a legend -> the pairs."""
    colourful = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def paint(depth, text):
        return f"\033[38;5;{terminal_colour(depth, L)}m{text}\033[0m" if colourful else text

    decoder, seen = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token, depth in pairs:
        seen.append((token, depth))
        if token != tokenizer.end:
            print(paint(depth, decoder.decode(tokenizer.bytes.get(token, b""))), end="", flush=True)
    by_depth = sorted(Counter(depth for _, depth in seen).items())
    legend = [paint(d, f"{d} of {L} blocks {n / len(seen):.0%}") for d, n in by_depth]
    print("\ndepth that produced the tokens: " + ", ".join(legend))
    return seen


# two violets, two purples, red, orange, amber, gold: each lighter than the one before
DEPTH_COLOURS = 55, 92, 127, 162, 197, 208, 214, 220


def terminal_colour(depth, L):
    """Violet (shallow) to gold (the full model): a code of the 256 terminal colours."""
    return DEPTH_COLOURS[round((len(DEPTH_COLOURS) - 1) * depth / L)]


def table(model, policies, prompts, max_new_tokens, **options):
    """Run every policy {name: Policy} on every prompt and print a line for each."""
    print(f"{'policy':<15}{'tokens/s':>8}{'x Plain':>9}{'acceptance':>12}{'wasted':>8}"
          f"{'tokens/round':>14}{'drafts/round':>14}{'blocks/token':>14}{'same text':>11}")
    speed_of_plain, plain_texts = None, None
    for name, policy in policies.items():
        runs = [generate(model, ids, max_new_tokens, policy, **options) for ids in prompts]
        s, texts = summarize(policy, runs), [g.tokens for g in runs]
        if speed_of_plain is None:
            speed_of_plain, plain_texts = s.tokens_per_second, texts
        same = sum(a == b for a, b in zip(texts, plain_texts)) / len(prompts)
        row = (f"{name:<15}{s.tokens_per_second:>8.0f}{s.tokens_per_second / speed_of_plain:>9.2f}"
               f"{s.acceptance:>12.2f}{s.wasted:>8}{s.tau:>14.2f}{s.draft_length:>14.2f}"
               f"{s.layers_per_token:>14.1f}{same:>11.0%}")
        print(row.replace("nan", "  -"), flush=True)


def arguments(model_options, file):
    parser = argparse.ArgumentParser(description="DSSD beside other ways of decoding.")
    add = parser.add_argument
    add("--prompt", default="import os\n\ndef find_files(path, pattern):\n    ", help="to continue")
    model_options(parser, file)
    add("--level", type=float, default=0.8, help="agreement that calibration aims at (default 0.8)")
    add("--max-new-tokens", type=int, default=96, help="tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus, in (0, 1]")
    add("--prompts", type=int, default=3, help="held-out prompts behind the table")
    add("--figure", help="draw the grid of positions and blocks to this file; .gif: an animation")
    add("--seed", type=seed_number, default=0)
    args = parser.parse_args()
    if args.prompts < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts must be at least 1, --max-new-tokens at least 2")
    return args


def main():
    from heads import FAST, held_out_prompts, load_model, model_options
    args = arguments(model_options, FAST)
    if args.figure:
        from appendix import figures, grid
        figures.check(args.figure, (".png", ".svg", ".pdf", ".gif"))
    model, heads, tokenizer, text = load_model(args, FAST)
    thresholds, L = heads.thresholds(args.level), model.config.num_hidden_layers
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}

    # one prompt, as it is written
    ids, dssd = tokenizer.encode(args.prompt), DSSD(heads, thresholds)
    pairs = stream(model, ids, args.max_new_tokens, dssd, stop=tokenizer.end, **options)
    print(args.prompt, end="", flush=True)
    show_stream(tokenizer, pairs, L)

    # every policy on the same prompts
    policies = {"Plain": Plain(), "EarlyExit": EarlyExit(heads, thresholds), "DSSD": dssd}
    for cap in (2, 4, 16):
        policies[f"DSSD, cap {cap}"] = DSSD(heads, thresholds, cap)
    for exit in heads.layers:
        for length in (2, 4, 8):
            policies[f"LayerSkip {exit}x{length}"] = LayerSkip(heads, exit, length)
    if args.figure:
        # the prompt's grid under the first three
        n, runs = min(grid.LONGEST, args.max_new_tokens), []
        for name in ("Plain", "EarlyExit", "DSSD"):
            generation = generate(model, ids, n, policies[name], stop=tokenizer.end, **options)
            runs.append((policies[name], generation))
        grid.grid(args.figure, tokenizer, heads, runs)
        print(f"wrote {args.figure}")
    length, new = text.fit(64, args.max_new_tokens)
    prompts = held_out_prompts(args.prompts, length, text=text)
    print(f"\n{args.prompts} held-out prompts x {new} tokens; level {args.level}, "
          f"thresholds on the {heads.measure}")
    table(model, policies, prompts, new, **options)


if __name__ == "__main__":
    command_line(main)
