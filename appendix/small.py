"""Side room: the fast twin of a small model, multiplied by NumPy.

In a small model a matrix is read in a few microseconds, about what a call of PyTorch costs. So the
calls count. NumPy's cost less, and views of its arrays cost next to nothing. Its library multiplies
one row by a small matrix in half the time of PyTorch's, and two to four rows in nearly the same,
if three things are as it likes them:

    the matrix     cut into panels of 32 or 64 columns, each in one piece, read in order
    the keys       transposed, K x N, so that q k is a sum over long rows, as p v is
    the sizes      below ONE_THREAD multiplications: from there on it starts threads of its own,
                   and those of the two libraries collide; longer products are PyTorch's

Normalisation, softmax and GELU stay PyTorch's, on the same memory.

`appendix.fast.fast` takes this twin where a model in float32 is narrower than 256. Wider models
read their weights for longer than a call takes: there oneDNN is as fast.
Letters: T rows, N cached positions, D hidden size, H heads, K head size.
"""
from typing import NamedTuple

import numpy as np
import torch

from appendix.fast import MOST_ROWS, Fused, Product, prompt_attention, rotate_pairs

ONE_THREAD = 2 ** 19    # multiplications of one product from which on NumPy starts threads
LARGEST = 2 ** 18       # entries of a matrix that is cut into panels


def is_small(model, heads=None):
    """Whether this is the fastest twin of a model, with its heads."""
    config, parameters = model.config, [*model.parameters(), *(heads.parameters() if heads else ())]
    D = config.hidden_size
    largest = D * (3 * D + config.intermediate_size)                      # entries of w1: see fold
    fits = D < 256 and largest <= LARGEST
    return fits and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)


class PanelProduct(Product):
    """x -> x w + b by NumPy, with w (n, m) cut into panels of columns.

    One or two rows are fastest with narrow panels, more with wide ones.
    """

    def __init__(self, w, b):
        super().__init__(w, b)
        self.offset = None if b is None else b.numpy()
        self.narrow, self.most_rows = self.cut(32)
        self.wide, self.wide_rows = self.cut(64)                          # of as many rows at most

    def cut(self, width):
        """w as panels (m / width, n, width), or as one where m is no multiple of the width, and how
        many rows they take at most."""
        n, m = self.w.shape
        width = width if m % width == 0 else m
        panels = self.w.numpy().reshape(n, -1, width).swapaxes(0, 1)
        return np.ascontiguousarray(panels), min(MOST_ROWS, (ONE_THREAD - 1) // (n * width))

    def __call__(self, x):
        out = np.empty((len(x), self.w.shape[1]), np.float32)             # (T, m)
        self.fill(out, x.numpy())
        return torch.from_numpy(out)

    def fill(self, out, x):
        """out (T, m) = x w + b, for arrays."""
        T = len(x)
        if T > self.most_rows:
            out[:] = super().__call__(torch.from_numpy(x)).numpy()
            return
        panels = self.wide if 2 < T <= self.wide_rows else self.narrow
        count, _, width = panels.shape
        parts = out.reshape(T, count, width).swapaxes(0, 1)               # (m / width, T, width)
        np.matmul(x, panels, out=parts)
        if self.offset is not None:
            out += self.offset


def multiply(a, b, out):
    """out = a b for arrays of H small matrices each."""
    if a[0].size * b.shape[2] < ONE_THREAD:
        np.matmul(a, b, out=out)
    else:
        torch.from_numpy(out).copy_(torch.bmm(torch.from_numpy(a), torch.from_numpy(b)))


class SmallStep(NamedTuple):
    """As fast.Step. All but `pairs` and `hidden` are arrays."""
    z: np.ndarray             # (T, 3D + I): q, k, v, the MLP's hidden layer
    pairs: torch.Tensor       # rotated pairs of q and k: complex (T, 2H, R/2), or real (.., 2)
    q: np.ndarray             # (H, T, K)
    new: np.ndarray           # (2, H, T, K): keys and values
    y: np.ndarray             # (H, T, K): attention's output, over v, which is in the cache by then
    hidden: torch.Tensor      # (T, I): the MLP's hidden layer
    both: np.ndarray          # (T, D + I): attention's output and the hidden layer, what w2 reads
    later: np.ndarray         # (T, T): -inf where a row would see a later one


class Small(Fused):
    """Fused with NumPy's products. A cache is two arrays: keys (blocks, H, K, room) and values
    (blocks, H, room, K)."""

    def product(self, w, b, dtype):
        if dtype == torch.float32 and w.numel() <= LARGEST:
            return PanelProduct(w.detach().float(), None if b is None else b.detach().float())
        return super().product(w, b, dtype)

    def placed(self, cache, owner):
        blocks, _, _, H, room, K = cache.kv.shape
        cache.kv = (np.empty((blocks, H, K, room), np.float32),
                    np.empty((blocks, H, room, K), np.float32))
        return cache

    def new_step(self, T, dtype, device):
        step = super().new_step(T, dtype, device)
        arrays = {name: getattr(step, name).numpy() for name in ("z", "q", "new", "y", "both")}
        later = np.triu(np.full((T, T), -np.inf, np.float32), 1)
        return SmallStep(**{**step._asdict(), **arrays}, later=later)

    def store(self, new, cache, block):
        """Keep new keys and values (2, H, T, K) -> the block's (H, K, n + T) and (H, n + T, K)."""
        n = cache.length[block]
        end = n + new.shape[2]
        k, v = cache.kv[0][block, :, :, :end], cache.kv[1][block, :, :end]
        k[:, :, n:], v[:, n:] = new[0].swapaxes(1, 2), new[1]
        cache.length[block] = end
        return k, v

    # NumPy need not warn of numbers that are none: they are found in the logits, and said once
    @np.errstate(all="ignore")
    def keys_values(self, x, block, cache):
        x, n = x[0], cache.length[block]
        step = self.step(len(x), x)
        up, _ = self.blocks[block]
        up.fill(step.z, self.normalised(x).numpy())
        rotate_pairs(step.pairs, self.turn[n:n + len(x)])
        self.store(step.new, cache, block)

    @np.errstate(all="ignore")
    def run_folded(self, x, blocks, cache, start, between=None):
        T, n = len(x), cache.length[start]
        end = n + T
        self.check_room(end, cache)
        z, pairs, q, new, y, hidden, both, later = self.step(T, x)
        turn = self.turn[n:end]                                           # (T, 1, R / 2)
        prompt = n == 0 and T > 1
        if not prompt:
            scores = np.empty((len(q), T, end), np.float32)               # (H, T, n + T)
        x = x.clone()                                                     # rows, as they go deeper
        rows, added = x.numpy(), np.empty(x.shape, np.float32)
        for depth, (up, down) in enumerate(blocks, start):
            up.fill(z, self.normalised(x).numpy())
            rotate_pairs(pairs, turn)
            k, v = self.store(new, cache, depth)
            if prompt:
                y[:] = prompt_attention(*map(torch.from_numpy, (q, *new))).numpy()
            else:
                multiply(q, k, scores)
                if T > 1:
                    scores[:, :, n:] += later
                multiply(torch.from_numpy(scores).softmax(-1).numpy(), v, y)
            hidden.addcmul_(hidden, torch.erf(hidden))
            down.fill(added, both)
            rows += added
            if between and depth + 1 in between:
                between[depth + 1].copy_(x)
        return x
