"""Chapter 4. EERO: a budget that is met.

After arXiv 2402.03779 (UAI 2025). A network with M heads answers at the first head that dares to; head l has
a risk R_l (held-out error rate) and a cumulative cost B_l (all that is computed up to and including it, the
earlier heads too). The user gives a mean cost per sample, the budget B. Two steps follow.

1.  Which share of the samples should leave at each head? Exponential weights under the budget:

        pi = argmin over the simplex  sum_l pi_l R_l + KL(pi || prior) / beta    subject to  sum_l pi_l B_l <= B
        pi_l  proportional to  prior_l exp(-beta (R_l + lambda B_l))

    with the smallest lambda >= 0 that meets the budget, the root of a monotone function of one variable.
    beta -> 0 is the prior tilted to the budget; beta -> inf the linear programme, on at most two heads.

2.  Which samples? Head l is a classifier with a reject option. It keeps the share
    eps_l = pi_l / (1 - sum_{j<l} pi_j) of what reaches it, the most certain ones, by a quantile over the
    calibration samples that *reach* it. Labels are not needed here. A little uniform noise breaks ties.
    Quantiles over all samples would miss the budget, since the scores of the heads are correlated.

The budget is met whatever the scores are worth. The accuracy is another matter: step 1 knows the mean risks
only, and to pass on the least certain samples pays only where a deeper head does better on just those.

The weights' closed form and the conditional quantiles are our reconstruction from the paper's abstract and
summaries, not a transcription.

    python eero.py                        multi-exit ResNet-18 on generated shapes; half a minute on two cores
    python eero.py --tokens               the same class on the exits of the language model in toy/, and text
                                          written under a budget
    python eero.py --data DIR --width 64  CIFAR-10/100 (binary layout) or a folder of images by class
Expect a table of accuracy against budget, every realised budget beside its target, and a figure.

Letters: n samples, M heads (the last is the full network's), B_l costs, C classes, S image side in pixels.
"""
import argparse
import hashlib
import json
import os
import sys
import tarfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- which share leaves at each head


def tilt(log_weight, slope, cost, budget, low):
    """softmax(log_weight - mu slope), (M,), for the smallest mu >= low whose mean cost is within the budget.

    The mean cost must fall as mu grows. Bisection leaves two neighbouring values of mu; their mixture meets
    the budget exactly, also in the limit of huge weights, where one step of mu moves everything.
    """
    extra = cost - cost[log_weight > -np.inf].min()                       # (M,) above the cheapest usable head
    room = budget - cost[log_weight > -np.inf].min()
    if room < 0:
        raise ValueError(f"a budget of {budget:g} is below the cheapest head ({budget - room:g}); raise the budget")

    def weights(mu):
        w = log_weight - mu * slope
        w = np.exp(w - w.max())
        return w / w.sum()

    if weights(low) @ extra <= room:
        return weights(low)                                               # slack: the budget does not bind
    step = 1 / np.ptp(slope)
    while weights(low + step) @ extra > room:
        step *= 2
    high = low + step
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (low, mid) if weights(mid) @ extra <= room else (mid, high)
    above, below = weights(low), weights(high)
    over, under = above @ extra, below @ extra
    share = (room - under) / (over - under) if over > under else 0.0
    return share * above + (1 - share) * below


LARGEST_BETA = 1e12                                                       # there, the linear programme's optimum


def exit_distribution(risk, cost, budget, beta, prior=None):
    """Exponential weights under a budget, equation 1 above (section B2 of the reconstruction): pi (M,).

    risk (M,) error rates, cost (M,) and budget in one unit, beta >= 0 (inf allowed), prior (M,) uniform by
    default. Raises ValueError for a budget below the cheapest head or inputs that are no numbers.
    """
    risk, cost = np.asarray(risk, float), np.asarray(cost, float)
    prior = np.ones(len(risk)) if prior is None else np.asarray(prior, float)
    if not risk.shape == cost.shape == prior.shape or risk.ndim != 1:
        raise ValueError(f"risk, cost and prior must be of one length; got {risk.shape}, {cost.shape}, {prior.shape}")
    beta = min(beta, LARGEST_BETA)
    if not (np.isfinite([*risk, *cost, budget]).all() and beta >= 0 and (prior >= 0).all() and prior.sum() > 0):
        raise ValueError("risk, cost and budget must be finite, beta >= 0, the prior non-negative and not all zero")
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior)                                         # -inf excludes a head
    return tilt(log_prior - beta * (risk - risk.min()), cost - cost.min(), cost, budget, low=0.0)


# ---------------------------------------------------------------- which samples leave there

EVERYBODY = sys.float_info.max                                            # a threshold no finite uncertainty reaches


def jitter(column, noise, rng):
    """Uncertainty (n,) plus uniform noise in [0, noise): ties are broken, order is kept."""
    return column + noise * rng.random(len(column))


def quantile_thresholds(uncertainty, pi, noise, seed=0, conditional=True):
    """Equation 2: one threshold per head but the last, None where nobody leaves.

    uncertainty (n, M), unlabelled. conditional=False takes each quantile over all samples (to show the drift).
    """
    n, rng = len(uncertainty), np.random.default_rng(seed)
    reach, leave_by, thresholds = np.arange(n), np.cumsum(pi) * n, []
    for l in range(len(pi) - 1):
        u = jitter(uncertainty[reach, l], noise, rng)
        k = len(u) - n + round(leave_by[l])                               # samples that must leave here
        if not conditional:
            left = 1 - sum(pi[:l])
            k = round(n * min(1, pi[l] / left)) if left > 1e-12 else n
        if k <= 0:
            thresholds.append(None)
        elif k >= len(u):
            thresholds.append(EVERYBODY)
        else:
            thresholds.append(float(np.partition(u, [k - 1, k])[k - 1:k + 1].mean()))
        if conditional and k > 0:
            reach = reach[u >= thresholds[-1]]
    return thresholds


@dataclass
class EERO:
    """Fitted exits: head l answers when its uncertainty is below thresholds[l]; the last head always answers."""
    pi: list             # (M,) share of the samples that leaves at each head
    thresholds: list     # (M - 1,) None: the head never answers, and need not be consulted
    cost: list           # (M,) cumulative, in the budget's unit
    budget: float        # mean cost per sample
    beta: float = None   # None when pi was given
    noise: float = 0.0   # width of the tie-breaking noise

    @classmethod
    def fit(cls, uncertainty, wrong, cost, budget, beta=100.0, seed=0, conditional=True):
        """uncertainty (n, M), unlabelled, lower = more certain; wrong (any number of labelled samples, M)."""
        pi = exit_distribution(np.asarray(wrong, float).mean(0), cost, budget, beta)
        return cls.from_distribution(uncertainty, pi, cost, budget, seed, conditional, min(beta, LARGEST_BETA))

    @classmethod
    def from_distribution(cls, uncertainty, pi, cost, budget, seed=0, conditional=True, beta=None):
        """Thresholds that realise the exit distribution pi (M,) on the calibration samples (n, M)."""
        u = np.asarray(uncertainty, float)
        if u.ndim != 2 or u.shape[1] != len(pi) or not len(u) or not np.isfinite(u).all():
            raise ValueError(f"uncertainty must be finite, of shape (n, {len(pi)}) with n > 0; got {u.shape}")
        if len(cost) != len(pi) or (np.diff(cost) < 0).any():
            raise ValueError(f"cost must be cumulative, one per head, cheapest first; got {list(cost)}")
        noise = 1e-9 * max(1.0, float(np.abs(u).max()))                   # far below any real difference
        thresholds = quantile_thresholds(u, pi, noise, seed, conditional)
        return cls([float(p) for p in pi], thresholds, [float(b) for b in cost], float(budget), beta, noise)

    @property
    def binding(self):
        """Whether the budget binds; if not, spending more would not lower the expected risk."""
        return bool(np.dot(self.pi, self.cost) > self.budget - 1e-9 * max(self.cost))

    def route(self, uncertainty, seed=1):
        """uncertainty (n, M) or (n, M - 1) -> the head that answers each sample (n,), int64."""
        u, rng, size = np.asarray(uncertainty), np.random.default_rng(seed), 1 << 14
        head = np.zeros(len(u), np.int64)                                 # the number of heads that passed it on
        for i in range(0, len(u), size):                                  # pieces that fit the processor's cache
            stay = np.ones(len(u[i:i + size]), bool)
            for l, threshold in enumerate(self.thresholds):
                if threshold is not None:
                    stay &= ~(jitter(u[i:i + size, l], self.noise, rng) < threshold)
                head[i:i + size] += stay
        return head

    def save(self, path):
        """Write JSON to a temporary name and rename it."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises ValueError for anything else."""
        try:
            eero = cls(**json.loads(Path(path).read_text("utf-8")))
            assert len(eero.pi) == len(eero.cost) == len(eero.thresholds) + 1
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} is no saved EERO ({error!r}); write it with EERO.save") from None
        return eero


# ---------------------------------------------------------------- what it is compared with


def geometric_distribution(cost, budget):
    """MSDNet's exit law, P(l) proportional to r^l, with the rate r that spends the budget: pi (M,)."""
    cost, l = np.asarray(cost, float), np.arange(len(cost), dtype=float)
    return tilt(np.zeros(len(cost)), l, cost, budget, low=-800.0)         # r = exp(-mu); exp(-800) is 0


def first_below(uncertainty, threshold):
    """The first head whose uncertainty (n, M - 1) is below the threshold, else the last: (n,)."""
    early = uncertainty < threshold
    return np.where(early.any(1), early.argmax(1), uncertainty.shape[1])


def shared_threshold(uncertainty, cost, budget):
    """One threshold for all heads, set so that the mean cost on calibration samples (n, M) is the budget."""
    u, cost = np.asarray(uncertainty, float)[:, :-1], np.asarray(cost, float)
    if budget < cost[0]:
        raise ValueError(f"a budget of {budget:g} is below the first head ({cost[0]:g}); raise the budget")
    low, high = u.min() - 1, u.max() + 1                                  # nobody leaves early, everybody at head 0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (low, t) if cost[first_below(u, t)].mean() <= budget else (t, high)
    pi = np.bincount(first_below(u, high), minlength=len(cost)) / len(u)
    return EERO(pi.tolist(), [float(high)] * (len(cost) - 1), cost.tolist(), float(budget))


def patience(predictions, agree):
    """PABEE: leave at the first head that makes `agree` + 1 equal predictions in a row. (n, M) -> head (n,)."""
    n, M = predictions.shape
    head, run = np.full(n, M - 1), np.zeros(n, int)
    for l in range(1, M):
        run = np.where(predictions[:, l] == predictions[:, l - 1], run + 1, 0)
        head = np.where((run >= agree) & (head == M - 1), l, head)
    return head


def random_exits(pi, n, seed=0):
    """Heads (n,) drawn from pi without a look at the samples: what the distribution is worth by itself."""
    return np.random.default_rng(seed).choice(len(pi), size=n, p=pi)


def oracle(wrong, cost, budget):
    """The best heads (n,) that somebody could choose who knows wrong (n, M) and spends the budget in total."""
    wrong, cost = np.asarray(wrong, bool), np.asarray(cost, float)
    first = np.where(wrong.all(1), 0, (~wrong).argmax(1))                 # the cheapest right head, else the cheapest
    order = np.argsort(cost[first], kind="stable")                        # one right answer each: cheap first
    affordable = np.cumsum(cost[first][order] - cost[0]) <= (budget - cost[0]) * len(first) * (1 + 1e-12)
    head = np.zeros(len(first), int)
    head[order[affordable]] = first[order[affordable]]
    return head


def compare(calibration, test, cost, budgets, beta, seed=0):
    """Every method at every budget: ({method: heads of the test samples (budgets, n)}, targets (budgets,)).

    calibration and test: dicts of uncertainty, wrong and predictions, each (n, M). A target is the mean cost that
    pi asks for: the budget, or less where it does not bind. Thresholds and pi see calibration samples only.
    """
    u, wrong = calibration["uncertainty"], calibration["wrong"]
    heads, targets, M = {}, [], len(cost)
    for budget in budgets:
        eero = EERO.fit(u, wrong, cost, budget, beta, seed)
        law = geometric_distribution(cost, budget)
        targets.append(np.dot(eero.pi, cost))
        for name, method in (("EERO", eero),
                             ("unconditional", EERO.fit(u, wrong, cost, budget, beta, seed, conditional=False)),
                             ("EERO, LP", EERO.fit(u, wrong, cost, budget, np.inf, seed)),
                             ("geometric", EERO.from_distribution(u, law, cost, budget, seed)),
                             ("one threshold", shared_threshold(u, cost, budget))):
            heads.setdefault(name, []).append(method.route(test["uncertainty"]))
        heads.setdefault("random", []).append(random_exits(eero.pi, len(test["wrong"]), seed))
        heads.setdefault("oracle", []).append(oracle(test["wrong"], cost, budget))
    heads["patience"] = [patience(test["predictions"], t) for t in range(1, M)]   # meets no given budget
    return {name: np.stack(h) for name, h in heads.items()}, np.array(targets)


# ---------------------------------------------------------------- images: two networks with exits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: ResNet-18's unit."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class MultiExit(nn.Module):
    """A backbone in stages with a head after each. The backbone's names are torchvision's; `exits` are ours."""

    def forward(self, x):
        """Images (n, 3, S, S) -> list of M logits (n, C), the cheapest head first."""
        return list(self.heads(x))

    def load_backbone(self, state):
        """Load a state dict under torchvision's names; our exits stay as they are. Raises ValueError on others."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith("exits.")]
        if missing or unexpected:
            raise ValueError(f"not this backbone: missing {missing[:3]}, unexpected {unexpected[:3]}")


class ResNet18(MultiExit):
    """ResNet-18 with exits after the first three stages. small: the stem for images of about 32 pixels."""

    def __init__(self, classes=10, width=64, small=True):
        super().__init__()
        widths, before = [width, 2 * width, 4 * width, 8 * width], width
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        for i, w in enumerate(widths, 1):
            stage = nn.Sequential(BasicBlock(before, w, 1 if i == 1 else 2), BasicBlock(w, w, 1))
            self.add_module(f"layer{i}", stage)
            before = w
        self.fc = nn.Linear(before, classes)
        self.exits = nn.ModuleList(nn.Linear(w, classes) for w in widths[:-1])

    def heads(self, x):
        """Yield the logits of each exit as soon as it is reached."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))                 # (n, width, S, S)
        for i, head in enumerate([*self.exits, self.fc], 1):
            x = getattr(self, f"layer{i}")(x)
            yield head(x.mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (n, channels, S, S)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class CNBlock(nn.Module):
    """ConvNeXt's unit: 7x7 depthwise convolution, LayerNorm, a 4x wider MLP, a learnt scale, a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width), Permute(0, 2, 3, 1),
                                   nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(),
                                   nn.Linear(4 * width, width), Permute(0, 3, 1, 2))
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x):
        return x + self.layer_scale * self.block(x)


class ConvNeXt(MultiExit):
    """ConvNeXt with exits after the first three stages; the defaults at small=False are convnext_tiny.

    Stochastic depth is left out: it has no parameters and does nothing at test time.
    """

    def __init__(self, classes=10, width=96, small=True, depths=(3, 3, 9, 3)):
        super().__init__()
        widths, patch = [width, 2 * width, 4 * width, 8 * width], 2 if small else 4
        features = [nn.Sequential(nn.Conv2d(3, width, patch, patch), LayerNorm2d(width, eps=1e-6))]
        for i, (w, depth) in enumerate(zip(widths, depths)):
            if i:
                features.append(nn.Sequential(LayerNorm2d(w // 2, eps=1e-6), nn.Conv2d(w // 2, w, 2, 2)))
            features.append(nn.Sequential(*(CNBlock(w) for _ in range(depth))))
        self.features = nn.Sequential(*features)
        head = [nn.Sequential(LayerNorm2d(w, eps=1e-6), nn.Flatten(1), nn.Linear(w, classes)) for w in widths]
        self.exits, self.classifier = nn.ModuleList(head[:-1]), head[-1]
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def heads(self, x):
        """Yield the logits of each exit as soon as it is reached."""
        for i, head in enumerate([*self.exits, self.classifier]):
            x = self.features[2 * i + 1](self.features[2 * i](x))         # stem or downsampling, then the stage
            yield head(x.mean((2, 3), keepdim=True))


@torch.no_grad()
def exit_costs(net, side):
    """Multiply-adds per image up to and including each head (M,), counted on one image of side pixels."""
    total, costs = [0], []

    def count(module, _, out):                                            # every output is a sum over the fan-in
        total[0] += out[0].numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    p = next(net.parameters())
    for _ in net.eval().heads(torch.zeros(1, 3, side, side, device=p.device)):
        costs.append(total[0])
    for hook in hooks:
        hook.remove()
    return np.array(costs, float)


def augment(x, generator):
    """Random shift by up to an eighth of the side, random mirror image: uint8 (n, 3, S, S) -> the same."""
    n, _, S, _ = x.shape
    pad = S // 8
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=generator) + torch.arange(S)           # (2, n, S)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = shift[0], torch.where(mirror, shift[1].flip(1), shift[1])
    padded = F.pad(x, (pad,) * 4)                                         # (n, 3, S + 2 pad, S + 2 pad)
    place = rows[:, None, :, None], columns[:, None, None, :]             # (n, 1, S, 1), (n, 1, 1, S)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], *place]


def normalized(x, device="cpu"):
    """uint8 (n, 3, S, S) -> float in about [-2, 2]."""
    return x.to(device).float().sub(128).div(64)


def train(net, x, y, epochs, batch=128, lr=0.1, seed=0, device="cpu"):
    """Train all heads jointly: mean of their cross-entropies, one cycle of the learning rate, augmentation.

    x needs x[indices] -> uint8 (n, 3, S, S) only, so that a folder read on demand will do. SGD with Nesterov
    momentum for the ResNet, AdamW for the ConvNeXt, as these networks are usually trained.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(y) // batch)
    if not steps:
        raise ValueError(f"{len(y)} training images are fewer than one batch of {batch}, or epochs is 0")
    matrices = [p for p in net.parameters() if p.dim() > 1]
    groups = [{"params": matrices}, {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    if isinstance(net, ConvNeXt):
        lr = lr / 50
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2, cycle_momentum=False)
    net.train()
    begin = shown = time.perf_counter()
    for step in range(steps):
        if step % (len(y) // batch) == 0:
            order = torch.randperm(len(y), generator=generator)
        i = order[step % (len(y) // batch) * batch:][:batch]
        logits = net(normalized(augment(x[i], generator), device))
        loss = torch.stack([F.cross_entropy(z, y[i].to(device)) for z in logits]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (now := time.perf_counter()) - shown > 10:
            shown, rate = now, (step + 1) * batch / (now - begin)
            print(f"  epoch {1 + step * batch // len(y)}/{epochs}  loss {loss.item():.3f} nats  {rate:,.0f} images/s  "
                  f"{(steps - step - 1) * batch / rate:.0f} s left", flush=True)


@torch.no_grad()
def evaluate(net, x, y, device="cpu", batch=500):
    """What EERO needs of every head: dict of uncertainty (entropy in nats), wrong, predictions, each (n, M)."""
    net.eval()
    uncertainty, predictions = [], []
    for i in range(0, len(y), batch):
        logits = torch.stack(net(normalized(x[torch.arange(i, min(i + batch, len(y)))], device)), 1)  # (n, M, C)
        log_p = logits.log_softmax(-1)
        uncertainty.append(-(log_p.exp() * log_p).sum(-1).cpu())
        predictions.append(logits.argmax(-1).cpu())
    predictions = torch.cat(predictions)                                  # (n, M)
    return {"uncertainty": torch.cat(uncertainty).double().numpy(), "predictions": predictions.numpy(),
            "wrong": (predictions != y[:, None]).numpy()}


# ---------------------------------------------------------------- images: three sources of data

SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "bar", "half disc")


def make_shapes(n, side=16, seed=0):
    """Generated images of eight shapes whose difficulty varies from one to the next.

    Difficulty d, uniform in [0, 1], lowers the contrast and raises noise, clutter and occlusion. Returns
    images uint8 (n, 3, side, side), labels (n,) and d (n,).
    """
    rng = np.random.default_rng(seed)
    f = lambda low, high: rng.uniform(low, high, (n, 1, 1))
    label, d = rng.integers(len(SHAPES), size=n), f(0, 1)
    grid = np.linspace(-1, 1, side)
    x, y, turn, size = grid[None, None, :] - f(-.3, .3), grid[None, :, None] - f(-.3, .3), f(-.4, .4), f(.5, .8)
    u, v = (np.cos(turn) * x + np.sin(turn) * y) / size, (np.cos(turn) * y - np.sin(turn) * x) / size  # (n, side, side)
    radius, square = np.hypot(u, v), np.maximum(abs(u), abs(v))
    masks = [radius < 1, (radius < 1) & (radius > .5), square < .9, (square < .9) & (square > .45),
             (v < .8) & (v > 2 * abs(u) - 1), (np.minimum(abs(u), abs(v)) < .3) & (square < 1),
             (abs(v) < .35) & (abs(u) < 1), (radius < 1) & (v < 0)]
    mask = np.choose(label[:, None, None], masks)                         # (n, side, side)
    background, tint = rng.normal(0, .3, (2, n, 3, 1, 1))
    ink = background + (1.5 - d[..., None]) * (1 + tint)                  # brighter than the background
    image = np.where(mask[:, None], ink, background)                      # (n, 3, side, side)
    for k in range(4):                                                    # rectangles; the more, the harder
        left, top, w, h = f(-1, 1), f(-1, 1), f(.1, .5), f(.1, .5)
        patch = (abs(grid[None, None, :] - left) < w) & (abs(grid[None, :, None] - top) < h) & (d > (k + 1) / 5)
        image = np.where(patch[:, None] & (~mask | (k == 0))[:, None], rng.normal(0, .5, (n, 3, 1, 1)), image)
    image += rng.normal(0, 1, image.shape) * (.05 + .5 * d[..., None])
    pixels = np.clip(128 + 48 * image, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(label), d.ravel()


CIFAR = {"cifar-10": ("cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530"),
         "cifar-100": ("cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8")}   # the MD5 sums of the official page


def download_cifar(name, folder):
    """Fetch the official binary archive of cifar-10 or cifar-100, check its hash, unpack its .bin files."""
    inner, md5 = CIFAR[name]
    archive = Path(folder) / f"{name}-binary.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial, digest = Path(f"{archive}.part"), hashlib.md5()
    with urllib.request.urlopen(f"https://www.cs.toronto.edu/~kriz/{archive.name}", timeout=60) as r, \
            open(partial, "wb") as out:
        while chunk := r.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != md5:
        partial.unlink()
        raise ValueError(f"{archive.name}: the hash is {digest.hexdigest()}, not {md5}; try again")
    os.replace(partial, archive)
    (Path(folder) / inner).mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".bin"):          # base name only: nothing lands elsewhere
                (Path(folder) / inner / Path(member.name).name).write_bytes(tar.extractfile(member).read())


def read_cifar(folder):
    """CIFAR-10 or -100 in the official binary layout, in folder or in its usual subfolder.

    Returns (train images uint8 (n, 3, 32, 32), train labels (n,), test images, test labels, number of classes).
    """
    where = next((p for p in (Path(folder), *(Path(folder) / d for d, _ in CIFAR.values()))
                  if (p / "test_batch.bin").exists() or (p / "test.bin").exists()), None)
    if where is None:
        raise ValueError(f"{folder} has no CIFAR binaries (test_batch.bin, test.bin); --download cifar-10 fetches them")
    folder, ten = where, (where / "test_batch.bin").exists()
    files = [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]] if ten else [["train.bin"], ["test.bin"]]
    first, out = 1 if ten else 2, []                                      # CIFAR-100: coarse label, then fine label
    for names in files:
        raw = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names])
        if len(raw) % (first + 3072):
            raise ValueError(f"{folder / names[0]} is no CIFAR file: its size is no multiple of {first + 3072} bytes")
        records = raw.reshape(-1, first + 3072)
        pixels = records[:, first:].reshape(-1, 3, 32, 32).copy()
        out += [torch.from_numpy(pixels), torch.from_numpy(records[:, first - 1].astype(np.int64))]
    return *out, 10 if ten else 100


class ImageFolder:
    """DIR/train/CLASS/*.jpeg (ImageNet's layout), read on demand: images[indices] -> uint8 (n, 3, side, side)."""

    def __init__(self, folder, side):
        self.classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir())
        files = [(f, c) for c, name in enumerate(self.classes) for f in sorted((Path(folder) / name).iterdir())
                 if f.suffix.lower() in (".jpeg", ".jpg", ".png")]
        if not files:
            raise ValueError(f"{folder} has no CLASS/*.jpeg images")
        self.files, self.side = [f for f, _ in files], side
        self.labels = torch.tensor([c for _, c in files])

    def __getitem__(self, indices):
        return torch.stack([self.read(self.files[i]) for i in indices])

    def read(self, path):
        """Shorter edge to 8/7 of side, middle square: ImageNet's usual 256 and 224."""
        from PIL import Image                                             # comes with matplotlib
        image = Image.open(path).convert("RGB")
        scale = self.side * 8 / 7 / min(image.size)
        w, h = (max(self.side, round(length * scale)) for length in image.size)
        left, top = (w - self.side) // 2, (h - self.side) // 2
        image = image.resize((w, h), Image.BILINEAR).crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------- tokens: the same class on a language model


def token_costs(depths, outputs):
    """Cumulative cost of a token per head (M,), in block-equivalents: the blocks run and all the heads consulted.

    depths (M,): blocks run, the last is the model's depth; outputs (M,): the cost of each head, the last is the
    unembedding's. A linear head costs V D / 12 D^2, since a block is 12 D^2 multiply-adds.
    """
    return np.asarray(depths) + np.cumsum(outputs)


@torch.no_grad()
def evaluate_tokens(model, heads, ids, batch=8):
    """What EERO needs of every exit, for windows ids (n, T): like evaluate(), over n (T - 1) tokens.

    wrong is disagreement with the full model's choice, wrong_next error on the true next token, each (n, M).
    """
    parts = []
    for x in ids.split(batch):
        last, hidden = model(x, exits=heads.layers)
        logits = torch.stack([*heads.logits(hidden), last], 2)[:, :-1].float()                      # (B, T - 1, M, V)
        log_p = logits.log_softmax(-1)
        uncertainty, choice = -(log_p.exp() * log_p).sum(-1), logits.argmax(-1)                     # (B, T - 1, M)
        parts.append([t.flatten(0, 1) for t in (uncertainty, choice, choice != choice[..., -1:],
                                                choice != x[:, 1:, None])])
    names = ("uncertainty", "predictions", "wrong", "wrong_next")
    return {name: torch.cat(t).numpy() for name, t in zip(names, zip(*parts))}


# ---------------------------------------------------------------- the report

METHODS = {"EERO": "o-", "EERO, LP": "^:", "geometric": "s--", "one threshold": "d--", "random": "x:", "oracle": "k:"}


def score(heads, wrong, cost):
    """heads (budgets, n) -> accuracy and realised mean cost, (2, budgets)."""
    return np.stack([1 - wrong[np.arange(len(wrong)), heads].mean(1), np.asarray(cost)[heads].mean(1)])


def report(runs, error, cost, budgets, unit, title):
    """Print accuracy against budget, mean over runs; return {method: (2, budgets) accuracy and realised cost}.

    runs: one (heads, targets, test) per seed, as compare() gives them; error: "wrong" or another key of test.
    """
    wrong = [test[error] for _, _, test in runs]                          # (n, M) per seed
    scores = {name: np.mean([score(heads[name], w, cost) for (heads, _, _), w in zip(runs, wrong)], 0)
              for name in runs[0][0]}
    targets = np.mean([t for _, t, _ in runs], 0)
    print(f"\n{title}; {len(wrong[0]):,} test samples, {len(runs)} seed(s)")
    print(f"mean cost, {unit:19} | {title}, %\n budget  target realised |" + "".join(f"{m:>14}" for m in METHODS))
    for i, budget in enumerate(budgets):
        print(f"{budget:7.2f} {targets[i]:7.2f}  {scores['EERO'][1][i]:7.2f} |"
              + "".join(f"{100 * scores[m][0][i]:14.2f}" for m in METHODS))
    alone = 1 - np.mean([w.mean(0) for w in wrong], 0)
    lost = np.mean([(w[:, -1] & ~w.all(1)).mean() for w in wrong])
    best = scores["EERO"][0].argmax()
    points = lambda pairs: ", ".join(f"{a:.2%} at {b:.2f}" for a, b in pairs)
    print(f"patience 1, 2, ..: {points(scores['patience'].T)}")
    print(f"each head alone: {points(zip(alone, cost))}")
    print(f"best of EERO: {points([scores['EERO'][:, best]])}; the final head: {alone[-1]:.2%}; "
          f"it is wrong where an earlier one is right: {lost:.2%}")
    return scores


def draw(path, runs, scores, cost, budgets, unit, title):
    """Left: accuracy against the cost really spent. Right: is the budget met? Written, then renamed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, style in {**METHODS, "patience": "v"}.items():
        left.plot(scores[name][1], 100 * scores[name][0], style, label=name, markersize=4)
    left.set(xlabel=f"realised cost, {unit}", ylabel=f"{title}, %")
    left.legend()
    print("realised - target cost, in % of the full cost, worst budget and seed:")
    for name in ("EERO", "unconditional", "one threshold"):
        gap = [cost[heads[name]].mean(1) - (budgets if name == "one threshold" else t) for heads, t, _ in runs]
        gap = 100 * np.array(gap) / cost[-1]                              # (seeds, budgets)
        print(f"  {name:13} {gap.ravel()[np.abs(gap).argmax()]:+.2f}")
        right.plot(budgets, gap.T, "o-", label=name, markersize=4, color=f"C{len(right.lines)//len(runs)}")
    right.axhline(0, color="gray", linewidth=0.5)
    right.set(xlabel=f"budget, {unit}", ylabel="realised - target, % of the full cost")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::len(runs)], labels[::len(runs)])
    figure.tight_layout()
    temporary = Path(path).with_name(f"tmp-{Path(path).name}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    print(f"figure: {path}")


def load_images(folder, seed):
    """(name, training images, labels, test images, labels, classes, side) of --data DIR, or generated shapes."""
    if folder is None:
        (x, y, _), (xt, yt, _) = make_shapes(6000, seed=2 * seed), make_shapes(20000, seed=2 * seed + 1)
        return "shapes", x, y, xt, yt, len(SHAPES), 16
    if (Path(folder) / "train").is_dir() and (Path(folder) / "val").is_dir():
        x, xt = ImageFolder(Path(folder) / "train", 224), ImageFolder(Path(folder) / "val", 224)
        if x.classes != xt.classes:
            raise ValueError(f"{folder}: train/ and val/ must hold folders of the same names, one per class")
        return Path(folder).resolve().name, x, x.labels, xt, xt.labels, len(x.classes), 224
    x, y, xt, yt, classes = read_cifar(folder)
    return f"CIFAR-{classes}", x, y, xt, yt, classes, 32


def images(args):
    """One network per seed; half of its test images calibrate, the other half is reported."""
    runs, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for seed in range(args.seed, args.seed + args.seeds):
        name, x, y, xt, yt, classes, side = load_images(args.data, seed)
        epochs, width = args.epochs or (30 if args.data else 5), args.width or (64 if args.data else 8)
        torch.manual_seed(seed)
        net = {"resnet18": ResNet18, "convnext": ConvNeXt}[args.net](classes, width, small=side < 64).to(device)
        cost = exit_costs(net, side)
        print(f"{name}, {args.net} of width {width}: {cost[-1] / 1e6:.1f} M multiply-adds per image; {epochs} epochs "
              f"of {len(y):,} images, seed {seed}", flush=True)
        train(net, x, y, epochs, 128 if args.data else 64, seed=seed, device=device)
        sample, cost = evaluate(net, xt, yt, device), 100 * cost / cost[-1]
        order = np.random.default_rng(seed).permutation(len(yt))
        calibration, test = ({k: v[i] for k, v in sample.items()} for i in np.array_split(order, 2))
        budgets = np.linspace(cost[0], cost[-1], 9)
        runs.append((*compare(calibration, test, cost, budgets, args.beta, seed), test))
    unit = "% of full network"
    scores = report(runs, "wrong", cost, budgets, unit, f"accuracy on {name}")
    draw(args.figure, runs, scores, cost, budgets, unit, f"accuracy on {name}")


def tokens(args):
    """The toy language model's exits; the risk is disagreement with the full model's choice of token."""
    from heads import ExitHeads, full_cost, toy_windows
    from model import TOY, Pythia
    model = Pythia.from_pretrained(TOY).eval()
    heads = ExitHeads.load(TOY / "heads.safetensors", model)
    L = model.config.num_hidden_layers
    cost = token_costs([*heads.layers, L], [*(h.cost() for h in heads.heads), full_cost(model) - L])
    print(f"exits at layers {', '.join(map(str, heads.layers))} of {L}, {', '.join(f'{c:.2f}' for c in cost)} "
          f"block-equivalents with all heads consulted; the model without exits: {full_cost(model):.2f}")
    calibration, test = (evaluate_tokens(model, heads, toy_windows(split, 30_000)) for split in ("calibration", "test"))
    budgets, unit = np.linspace(cost[0], cost[-1], 9), "block-equivalents"
    runs = [(*compare(calibration, test, cost, budgets, args.beta, args.seed), test)]
    scores = report(runs, "wrong", cost, budgets, unit, "agreement with the full model")
    report(runs, "wrong_next", cost, budgets, unit, "accuracy on the true next token, same exits")
    draw(args.figure, runs, scores, cost, budgets, unit, "agreement with the full model")
    generate_under_budget(model, heads, cost, args.beta, args.seed)


def generate_under_budget(model, heads, cost, beta, seed, prompts=24, new=64, prefix=32):
    """Text written by dssd.EarlyExit with EERO's thresholds: the cost asked for beside the cost of what was written.

    Calibrated on the full model's own greedy continuations, since a decoder meets its own text and not a corpus. Text
    written with exits is yet another and leaves later, so the budget given to EERO is corrected three times by the gap
    found on calibration prompts, never on the test prompts.
    """
    from dssd import EarlyExit, Plain, fast, generate, held_out_prompts
    from heads import self_text, toy_windows
    from model import TOY
    texts = self_text(model, toy_windows("calibration", 64 * 512, 512)[:, :prefix], prefix + 128, (0.0,), seed)
    sample = {k: v.reshape(len(texts), -1, v.shape[-1])[:, prefix - 1:].reshape(-1, v.shape[-1])     # not the prefixes
              for k, v in evaluate_tokens(model, heads, texts).items()}
    practice, starts = (held_out_prompts(TOY, prompts, prefix, split) for split in ("calibration", "test"))
    decoder = fast(model)
    plain = [generate(decoder, ids, new, Plain()).tokens for ids in starts]

    def write(asked, prompts):
        """Texts, the depths of their tokens, and the mean cost, under the budget `asked` of EERO."""
        thresholds = EERO.fit(sample["uncertainty"], sample["wrong"], cost, asked, beta, seed).thresholds
        written = [generate(decoder, ids, new, EarlyExit(heads, thresholds, fill="copy")) for ids in prompts]
        depths = np.concatenate([w.depths[1:] for w in written])          # the prefill gives the first token
        return written, depths, np.asarray(cost)[np.searchsorted(heads.layers, depths)].mean()

    print(f"\nwriting under a budget, calibrated on {len(sample['wrong']):,} greedy tokens of the full model; {len(starts)} "
          f"test prompts x {new} new tokens, mean cost in block-equivalents; the last column adds the copied keys and values")
    print(" budget  realised, uncorrected  realised, corrected  same token as the full model's text  with copies")
    for budget in np.linspace(cost[0], cost[-1], 5)[1:4]:
        asked = budget
        for _ in range(3):
            asked = np.clip(asked + budget - write(asked, practice)[2], cost[0], cost[-1])
        written, depths, realised = write(asked, starts)
        same = np.mean([a == b for w, p in zip(written, plain) for a, b in zip(w.tokens[1:], p[1:])])
        print(f"{budget:7.2f} {write(budget, starts)[2]:22.2f} {realised:20.2f} {same:36.1%} "
              f"{realised + (model.config.num_hidden_layers - depths).mean() / 6:12.2f}")


def main():
    parser = argparse.ArgumentParser(description="Early exit under a budget: accuracy against mean cost per sample.")
    parser.add_argument("--tokens", action="store_true", help="the exits of the language model in toy/, no images")
    parser.add_argument("--data", metavar="DIR", help="CIFAR binaries, or train/ and val/ with a folder per class")
    parser.add_argument("--download", choices=CIFAR, help="first fetch the official binaries into --data DIR")
    parser.add_argument("--net", choices=("resnet18", "convnext"), default="resnet18")
    parser.add_argument("--width", type=int, help="channels of the first stage (default 64; shapes: 8)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default 30; shapes: 5)")
    parser.add_argument("--seeds", type=int, default=1, help="networks to train, results averaged (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--beta", type=float, default=100.0, help="weight per unit of error rate (default 100)")
    parser.add_argument("--figure", default="eero.png", metavar="FILE", help="where the figure goes (default eero.png)")
    args = parser.parse_args()
    if args.download and not args.data:
        raise ValueError("--download needs --data DIR, the folder to write to")
    if any(value is not None and value < 1 for value in (args.width, args.epochs, args.seeds)) or not args.beta >= 0:
        raise ValueError("--width, --epochs and --seeds must be at least 1, --beta at least 0")
    if not Path(args.figure).parent.is_dir() or Path(args.figure).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure {args.figure}: give a .png, .svg or .pdf in a folder that exists")
    if args.download:
        download_cifar(args.download, args.data)
    tokens(args) if args.tokens else images(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
