"""Side room: DSSD auto drafts where a draft pays, and learns while it decodes. Ours.

The paper's thresholds say how sure a head must be. They do not say what a draft costs, and on a
hard text they make decoding slower than plain. This rule weighs, at every draft, what it can bring
against what it costs. It has no number for a user to set.

What a draft brings. S is the chance that all pending drafts are kept, p the chance of the next one
after them, T the time that a token takes in rounds that ask, at most a plain step. A draft brings
S p tokens, worth S p T. This is the expected improvement of Leviathan et al. (2023), draft by
draft, as optimal stopping. (The most tokens per second come when time is priced at what it brings
elsewhere: Dinkelbach's rule for ratios.)

What it costs. Costs are measured once per machine (appendix/tune.py). With n drafts pending, the
next one costs c_n. Of this a_n is spent once the head was asked:

    c_0 = first + deeper + row_1            a_0 = question
    c_n = further + deeper + row_(n+1)      a_n = further

first, further, deeper and question are fields of Costs. row_k is what the k-th further row of the
verification adds: rows[k] - rows[k - 1].

The rule. Rows are cheap in pairs or fours. So the next two drafts count as well, as if they were
as sure:

    gain(p) = the largest of the sums of 1, 2, 3 terms  S p T - c_n,  S p^2 T - c_(n+1),  ..
    ask   <=>  gain(p) > 0                  p: the chance of an answer not yet seen; n > 0
    draft <=>  gain(p) + a_n > 0            p: the chance of this answer

How p is known. Uncertainty falls into a few bins, and a Record keeps for each what became of its
answers. The calibration is the first guess, the prompt the first evidence, then comes every
verification. Older evidence fades.

Which exit. One exit drafts: the one with the most tokens per second by the prompt's evidence. So a
deeper one does where the shallow ones are doubtful too often. (To choose anew for every draft, or
to ask a deeper exit after a doubtful answer, brought nothing: the exits doubt the same tokens.)

When to rest. A round's first question is worth the mean, over all answers, of max(0, gain(p) +
a_0), less a_0. The record knows single answers, not how they follow each other. So recent rounds
count as well: if they and that worth together promise no saving, the rule rests after one more
round, for 8, 16, 32, 64 tokens.

The rule looks at the past, at q and at its uncertainty, never at the token drawn: sampling keeps
the full model's distribution.

    python -m appendix.tune --hard      DSSD auto beside Plain on ten kinds of text
Expect 1.4 to 1.9 x Plain on greedy text after short prompts, 1.0 to 1.2 x on sampled text and after
long prompts, and no loss of more than a few percent where nothing pays.
"""
import math
from bisect import bisect
from dataclasses import dataclass

from dssd import DSSD, Policy, always

MEMORY = 0.97                     # an answer's weight in a Record, beside the next one's
GUESS = 12.0                      # the weight of its first guess, in answers
RECENT = 0.9                      # what ByGain keeps of its recent rounds at every round
PROMISES = 32                     # the weight of the record's promise, in rounds
SHORTEST, LONGEST = 8, 64         # rests, in tokens
AHEAD = 3                         # the draft in question, and the next two

# ------------------------------------------------------------ costs and chances


@dataclass
class Costs:
    """Milliseconds on one machine, with this many positions cached."""
    positions: int
    plain: float                  # a step of plain decoding
    question: float               # to ask an exit, which then does not draft
    first: float                  # the first draft of a round, from the first exit, with the
    further: float                # asking, without its row of the verification; each later one
    deeper: list                  # what a draft from each exit costs more than from the first
    rows: list                    # what a pass of 1, 2, .. rows to full depth costs more than of 1


def costs_between(few, many, positions):
    """Costs at this many cached positions, on the line through two measured ones. No cost falls
    with more positions: measured ones do, by chance."""
    share = (positions - few.positions) / (many.positions - few.positions)

    def blend(a, b):
        if isinstance(a, list):
            return list(map(blend, a, b))
        return max(0.0, a + share * max(0.0, b - a))

    return Costs(*map(blend, vars(few).values(), vars(many).values()))    # positions, too


class Record:
    """What one exit's recent answers were worth, in a few bins of uncertainty.

    The calibrated thresholds bound the bins, and their levels are the first guess of the chances.
    How often an answer falls into a bin is not guessed: a weak head is never certain.
    """

    def __init__(self, calibration, m):
        self.edges, self.right = [], []
        for level in ("0.98", "0.95", "0.90", "0.80", "0.70", "0.60", "0.50"):
            threshold = calibration[level][m] if level in calibration else None
            if threshold is not None and threshold not in self.edges:
                self.edges.append(threshold)
                self.right.append(GUESS * float(level))
        self.right.append(GUESS * 0.3)                    # beyond them all
        # by bin: answers, those of them that were kept, both with the guess; answers without it
        self.seen, self.came = [GUESS] * len(self.right), [1.0] * len(self.right)
        self.weight = 1.0                                 # of the newest: overflows after 23,000

    def learn(self, b, chance):
        """An answer in bin b was kept, or would have been, with this chance."""
        self.weight /= MEMORY                             # so all older ones weigh less beside it
        self.seen[b] += self.weight
        self.came[b] += self.weight
        self.right[b] += self.weight * chance

    def chance(self, b):
        """How likely an answer in bin b is kept."""
        return self.right[b] / self.seen[b]

    def mean(self, value=float):
        """The mean of value(chance) over all answers: by default, of the chance itself."""
        weighted = [n * value(self.chance(b)) for b, n in enumerate(self.came)]
        return sum(weighted) / sum(self.came)


# ------------------------------------------------------------ the rule


@dataclass
class AutoPolicy(Policy):
    costs: tuple = ()             # two Costs, with few and with many positions cached

    def rule(self, positions, choice):
        return ByGain(self, positions, choice)


def AutoDSSD(heads, costs, max_draft=16):
    """The policy "DSSD auto". No round has more drafts than the two Costs know rows for."""
    thresholds = DSSD(heads, always(heads, None), max_draft).thresholds
    return AutoPolicy("DSSD auto", heads, thresholds, max_draft, costs=costs)


class ByGain:
    """A rule for dssd.decode. Its exits and drafts follow from the gain."""

    prompt_rows = 32

    def __init__(self, policy, positions, choice):
        heads = policy.heads
        self.choice, self.measure = choice, heads.measure
        self.costs, self.max_draft = costs_between(*policy.costs, positions), policy.max_draft
        exits = range(len(heads.layers))
        self.records = [Record(heads.calibration, m) for m in exits]
        self.exits_ms = [self.draft_costs(s) for s in exits]
        self.take(0)
        self.wait, self.rest = SHORTEST, 0
        # recent rounds that asked: their tokens, and their ms as the costs say
        self.tokens, self.ms = 8.0, 8 * self.costs.plain
        # this round: T, drafts, S, a_n, ms so far, (bin, answer) of every question
        self.token_ms, self.drafted, self.chance = self.costs.plain, 0, 1.0
        self.ask_ms, self.spent, self.asked = 0.0, 0.0, []

    def take(self, s):
        """Exit s drafts from now on."""
        self.exit, self.record, self.draft_ms = s, self.records[s], self.exits_ms[s]

    def draft_costs(self, s):
        """c_0, c_1, .. of exit s, in ms."""
        rows = self.costs.rows[:self.max_draft + 1]
        ms = [self.costs.further + self.costs.deeper[s] + more - less
              for less, more in zip(rows, rows[1:])]
        ms[0] += self.costs.first - self.costs.further
        return ms

    def read_prompt(self, frontier, full):
        """The first evidence: what every exit would have said at the prompt's last positions."""
        for s, record in enumerate(self.records):
            z = frontier.ask(s, len(full))                                # (n, V)
            chances = self.choice.chance_kept(full, self.choice.of(z))    # (n,)
            uncertainty = self.choice.uncertainty(self.measure, z)        # (n,)
            for u, chance in zip(uncertainty.tolist(), chances.tolist()):
                record.learn(bisect(record.edges, u), chance)
        rates = [self.rate(s) for s in range(len(self.records))]
        self.take(rates.index(max(rates)))

    def rate(self, s):
        """Tokens per ms of the best number of drafts from exit s, all of the usual chance."""
        p = self.records[s].mean()
        tokens, ms, best = 1.0, self.costs.plain, 0.0
        for n, draft in enumerate(self.exits_ms[s], 1):
            tokens += p ** n
            ms += draft
            best = max(best, tokens / ms)
        return best

    def exits_to_ask(self, drafted):
        """The exit, if it is worth asking: a list of one, or of none."""
        self.drafted = drafted
        if drafted:
            self.ask_ms = self.costs.further
            return [self.exit] if self.gain(self.record.mean()) > 0 else []
        # a new round
        self.chance, self.spent = 1.0, self.costs.plain
        if self.rest:
            self.rest -= 1
            return []
        self.token_ms = min(self.costs.plain, self.ms / self.tokens)
        self.ask_ms = self.costs.question
        self.rest_unless_it_pays()                        # asks all the same, once more
        return [self.exit]

    def gain(self, p):
        """What a draft of chance p saves, in ms, with up to two more that are as sure."""
        kept, total, best = self.chance, 0.0, -math.inf
        for draft in self.draft_ms[self.drafted:self.drafted + AHEAD]:
            kept *= p
            total += kept * self.token_ms - draft
            best = max(best, total)
        return best

    def rest_unless_it_pays(self):
        """Rest after this round, longer each time, unless recent rounds and the record pay."""
        value = self.record.mean(lambda p: max(0.0, self.gain(p) + self.ask_ms)) - self.ask_ms
        saved = self.tokens * self.costs.plain - self.ms
        if saved + PROMISES * value > 0:
            self.wait = SHORTEST
        else:
            self.rest, self.wait = self.wait, min(2 * self.wait, LONGEST)

    def drafts(self, s, z, answer):
        """Does this answer pay?"""
        u = self.choice.uncertainty(self.measure, z).item()
        b = bisect(self.record.edges, u)
        p = self.record.chance(b)
        pays = self.gain(p) + self.ask_ms > 0
        self.chance *= p
        self.spent += self.draft_ms[self.drafted] if pays else self.ask_ms
        self.asked.append((b, answer))
        return pays

    def learn(self, full, kept, chances):
        """A verification: how likely was an answer kept, given that all before it were?"""
        if self.asked:
            self.tokens = RECENT * self.tokens + kept + 1
            self.ms = RECENT * self.ms + self.spent
        for (b, _), chance in zip(self.asked[:kept + 1], chances):
            self.record.learn(b, chance)
        # the last answer, if it did not draft: as a first draft, so a little low after others
        if kept == len(chances) < len(self.asked):
            b, answer = self.asked[-1]
            self.record.learn(b, float(self.choice.chance_kept(full[kept], answer)))
        self.asked = []
