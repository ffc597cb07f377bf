"""Several processes, one per GPU or CPU, that train the same heads: `torchrun` starts them.

    torchrun --nproc_per_node=2 train.py --model pythia-1b --layers 4,8,12 --device cuda

Every process holds the frozen model and the heads, and draws the same windows of text as all the
others. It trains on its share of them. Gradients are averaged before each step, so all heads stay
equal: two processes with --batch 8 learn what one learns with --batch 16. The windows to calibrate
and to test on are shared as well, and everyone gets the results of all.
"""
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from heads import Evaluation, evaluate


class Team:
    """The processes that torchrun started, or this one alone: .rank of .size."""

    def __init__(self, device="cpu"):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def __enter__(self):
        if self.rank:                     # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(self, *_):
        if self.size > 1:
            dist.destroy_process_group()

    def peak_memory(self):
        """The most that this process held at once, in GB; on a GPU what torch allocated there."""
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated() / 1e9
        try:
            import resource               # Windows has none
        except ImportError:
            return float("nan")
        unit = 1 if sys.platform == "darwin" else 1024    # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def average(self, tensors):
        """Each tensor becomes its mean over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    def evaluate(self, model, heads, ids, measures):
        """heads.evaluate on windows ids (n, T + 1), a part in each process -> one Evaluation."""
        if self.size == 1 or len(ids) < self.size:
            return evaluate(model, heads, ids, measures)
        mine = evaluate(model, heads, ids.tensor_split(self.size)[self.rank], measures)
        parts = [None] * self.size
        dist.all_gather_object(parts, mine)
        uncertainty = {name: np.concatenate([part.uncertainty[name] for part in parts])
                       for name in measures}
        tokens = [len(part.agree) for part in parts]
        return Evaluation(
            uncertainty=uncertainty,
            choice=np.concatenate([part.choice for part in parts]),
            agree=np.concatenate([part.agree for part in parts]),
            right=np.concatenate([part.right for part in parts]),
            kl=np.average([part.kl for part in parts], axis=0, weights=tokens))
