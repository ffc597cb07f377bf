"""Side room: the fast twin of a small model, multiplied by NumPy.

In a small model a matrix is read in a few microseconds, about what a call of PyTorch costs. So the
calls count. NumPy's cost less, and views of its arrays cost next to nothing. Its library multiplies
one row by a small matrix in half the time of PyTorch's, and two to four rows take little longer
than one, if three things are as it likes them:

    the matrix     cut into panels of 32 or 64 columns, each in one piece, read in order
    the keys       transposed, K x N, so that q k is a sum of K rows of length N
    the sizes      below ONE_THREAD multiplications: from there on it starts threads of its own,
                   and those of the two libraries collide; longer products are PyTorch's

Normalisation, softmax and GELU stay PyTorch's, on the same memory.

`appendix.fast.fast` takes this twin for a model in float32 on a CPU whose folded matrices have at
most LARGEST entries. Wider models read their weights for longer than a call takes: there oneDNN is
as fast, and its threads share the work.
Letters: B batch, T rows, N cached positions, D hidden size, I the MLP's width, H heads, K head
size, V vocabulary.
"""
import numpy as np
import torch

from appendix.fast import (MOST_ROWS, Fused, FusedBlockHead, FusedHead, Product, prompt_attention,
                           rotate_pairs)
from heads import BlockHead, ExitHead, TiedHead

ONE_THREAD = 2 ** 19    # multiplications of one product from which on NumPy starts threads
LARGEST = 2 ** 19       # entries of a matrix that is cut into panels: up to D = 256 and I = 4 D


def is_small(model, heads=None):
    """Whether Small is the twin to take for a model and its heads."""
    D, I = model.config.hidden_size, model.config.intermediate_size
    parameters = [*model.parameters(), *(heads.parameters() if heads is not None else ())]
    here = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
    return here and D * (3 * D + I) <= LARGEST                            # entries of w1: see fold


class PanelProduct(Product):
    """x -> x w + b by NumPy, with w (n, m) cut into panels of columns. For tensors; `fill` is for
    arrays.

    One or two rows are fastest with narrow panels, more with wide ones. Longer x are PyTorch's.
    """

    def __init__(self, w, b):
        super().__init__(w, b)
        # the panels of either width, and how many rows NumPy multiplies by them on one thread
        self.narrow, self.narrow_rows = self.cut(32)
        self.wide, self.wide_rows = self.cut(64)

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
        if T > self.narrow_rows:
            out[:] = super().__call__(torch.from_numpy(x)).numpy()
            return
        panels = self.wide if 2 < T <= self.wide_rows else self.narrow
        count, _, width = panels.shape
        parts = out.reshape(T, count, width).swapaxes(0, 1)               # (m / width, T, width)
        np.matmul(x, panels, out=parts)
        if self.b is not None:
            out += self.b.numpy()


def multiply(a, b, out):
    """out = a b for arrays of H small matrices each."""
    if a[0].size * b.shape[2] < ONE_THREAD:
        np.matmul(a, b, out=out)
    else:
        torch.from_numpy(out).copy_(torch.bmm(torch.from_numpy(a), torch.from_numpy(b)))


class Small(Fused):
    """Fused in arrays: residual streams are arrays, and products of few rows NumPy's. Logits are
    tensors. A cache is two arrays, keys (blocks, H, K, room) and values (blocks, H, room, K).
    """

    def __init__(self, model):
        super().__init__(model)
        self.table = model.embed_in.weight.detach().numpy()               # (V, D)

    def product(self, w, b, dtype):
        if w.numel() > LARGEST:
            return super().product(w, b, dtype)
        return PanelProduct(w.detach().to(dtype), None if b is None else b.detach().to(dtype))

    def twin(self, head):
        return TWINS.get(type(head), OtherHead)(self, head)

    def new_states(self, depths, room):
        return self.model.new_states(depths, room).numpy()

    def placed(self, cache, owner):
        blocks, _, _, H, room, K = cache.kv.shape
        cache.kv = (np.empty((blocks, H, K, room), np.float32),
                    np.empty((blocks, H, room, K), np.float32))
        if owner is not None:                 # a block head's
            cache.seen = cache.seen.numpy()
        return cache

    def new_step(self, T, dtype, device):
        """A Step whose `pairs` and `hidden` are tensors, and all else arrays."""
        step = super().new_step(T, dtype, device)
        arrays = {name: getattr(step, name).numpy() for name in ("z", "q", "new", "y", "both")}
        return step._replace(**arrays)

    def embed(self, ids):
        ids = np.asarray(ids)
        try:
            if ids.min(initial=0) >= 0:
                return self.table[ids]
        except IndexError:
            pass
        return self.model.embed(ids).numpy()                              # it refuses wrong ones

    # NaN and infinity need no warning here: check_numbers finds them in the logits
    @np.errstate(all="ignore")
    def output(self, x, matrix):
        return matrix(self.normalised(torch.from_numpy(np.asarray(x)[0])))[None]

    @np.errstate(all="ignore")
    def run(self, x, start, stop, cache, between=None):
        return self.run_folded(np.asarray(x), self.blocks[start:stop], cache, start, between)

    def run_folded(self, x, blocks, cache, start, between=None):
        """Streams x (1, T, D) through folded blocks -> a new array (1, T, D)."""
        T, n = x.shape[1], cache.length[start]
        end = n + T
        self.check_room(end, cache)
        z, pairs, q, new, y, hidden, both = self.step(T, self.embed_in.weight)
        turn = self.turn[n:end]                                           # (T, 1, R / 2)
        prompt = n == 0 and T > 1
        if not prompt:
            scores = np.empty((len(q), T, end), np.float32)               # (H, T, n + T)
        x, added = x.copy(), np.empty(x.shape[1:], np.float32)
        stream = torch.from_numpy(x)                                      # the same memory
        for depth, (up, down) in enumerate(blocks, start):
            up.fill(z, self.normalised(stream).numpy()[0])
            rotate_pairs(pairs, turn)
            k, v = self.store(new, cache, depth)
            if prompt:
                y[:] = prompt_attention(*map(torch.from_numpy, (q, *new))).numpy()
            else:
                multiply(q, k, scores)
                for i in range(1, T):
                    scores[:, :i, n + i] = -np.inf                        # no row sees a later one
                multiply(torch.from_numpy(scores).softmax(-1).numpy(), v, y)
            hidden.addcmul_(hidden, torch.erf(hidden))                    # sqrt(2) GELU: see fold
            down.fill(added, both)
            x += added
            if between and depth + 1 in between:
                between[depth + 1][:] = x
        return x

    def store(self, new, cache, block):
        """Keep new keys and values (2, H, T, K) -> the block's (H, K, n + T) and (H, n + T, K)."""
        n = cache.length[block]
        end = n + new.shape[2]
        k, v = cache.kv[0][block, :, :, :end], cache.kv[1][block, :, :end]
        k[:, :, n:], v[:, n:] = new[0].swapaxes(1, 2), new[1]
        cache.length[block] = end
        return k, v

    @np.errstate(all="ignore")
    def keys_values(self, x, block, cache):
        x, n = torch.from_numpy(np.asarray(x)[0]), cache.length[block]
        step = self.step(len(x), x)
        up, _ = self.blocks[block]
        up.fill(step.z, self.normalised(x).numpy())
        rotate_pairs(step.pairs, self.turn[n:n + len(x)])
        self.store(step.new, cache, block)


class SmallHead(FusedHead):
    """A linear or tied head of a Small."""

    def body(self, h, cache=None):
        return h                              # the norm is in `output`


class SmallBlockHead(FusedBlockHead):
    """A block head of a Small."""

    @np.errstate(all="ignore")
    def body(self, h, cache):
        h = np.asarray(h)
        before, x = cache.push(h), np.empty(h.shape, np.float32)          # (1, T, D)
        self.shift.fill(x[0], before[0])
        x += h
        return self.decoder.run_folded(x, self.blocks, cache, 0)


class OtherHead(FusedHead):
    """Any other head, as it is: it reads tensors."""

    def __init__(self, decoder, head):
        self.head = head

    def body(self, h, cache=None):
        return self.head.body(torch.from_numpy(np.asarray(h)), cache)

    def output(self, x):
        return self.head.output(x)


TWINS = {ExitHead: SmallHead, TiedHead: SmallHead, BlockHead: SmallBlockHead}
