"""Shared by all chapters' tests: where things are, one thread, tiny models with random weights."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import TOY, Pythia, PythiaConfig, Tokenizer   # noqa: E402

SHARED = Path(os.environ.get("NANOEXIT_SHARED", ROOT.parent / "shared"))   # optional data; tests skip without it


def tiny(seed=0, **changes):
    """A frozen random Pythia, small but with weights large enough that its predictions are not uniform."""
    torch.manual_seed(seed)
    config = PythiaConfig(**{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4,
                             "num_attention_heads": 4, "max_position_embeddings": 64, **changes})
    model = Pythia(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(1 if p.dim() == 1 else 0, 0.3 if p.dim() == 2 else 0.1)
    return model


def run(*command, **environment):
    """A chapter's command line in a process of its own -> (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout, done.stderr


def assert_refused(result, *words):
    """Bad input: exit status 2, one line, no traceback, and the line says these words."""
    status, _, errors = result
    assert status == 2, result
    assert "Traceback" not in errors
    assert all(w in errors for w in words), errors


@pytest.fixture(scope="session")
def toy():
    return Pythia.from_pretrained(TOY)


@pytest.fixture(scope="session")
def toy_tokenizer():
    return Tokenizer.load(TOY)
