"""Shared by all tests: where things are, tiny models with random weights, a chapter's command line,
the toy."""
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from heads import ExitHeads, held_out_prompts   # noqa: E402
from model import TOY, Pythia, PythiaConfig, Tokenizer, command_line   # noqa: E402

# optional data; tests skip without it
SHARED = Path(os.environ.get("NANOEXIT_SHARED", ROOT.parent / "shared"))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: left out unless asked for, as .ci/run does with -m 'slow or not slow'")
    config.option.markexpr = config.option.markexpr or "not slow"


def tiny(seed=0, **changes):
    """A frozen random Pythia, small but with weights large enough that its predictions are not
    uniform."""
    torch.manual_seed(seed)
    config = PythiaConfig(**{"vocab_size": 96, "hidden_size": 32,
                             "intermediate_size": 128, "num_hidden_layers": 4,
                             "num_attention_heads": 4, "max_position_embeddings": 64, **changes})
    model = Pythia(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(1 if p.dim() == 1 else 0, 0.3 if p.dim() == 2 else 0.1)
    return model


def shaken(model, layers=(1, 2, 3), kind="linear", seed=0, measure="entropy"):
    """Heads that differ from the logit lens, so that a wrong start would show."""
    torch.manual_seed(seed)
    heads = ExitHeads(model, list(layers), kind, measure=measure)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.1 * torch.randn(p.shape))    # drawn in float32: the same for every type
    return heads


def call(chapter, *arguments):
    """A chapter's command line in this process -> (exit status, stdout, stderr)."""
    out, errors, before, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{chapter.__name__}.py", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            command_line(chapter.main)
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    return status, out.getvalue(), errors.getvalue()


def run(*command, **environment):
    """A chapter's command line in a process of its own -> (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout, done.stderr


def assert_refused(result, *words):
    """Bad input: exit status 2, one line, no traceback, and the line says these words."""
    status, _, errors = result
    assert status == 2, result
    assert "Traceback" not in errors
    assert all(w in errors for w in words), errors


@pytest.fixture(scope="session", autouse=True)
def corpora(tmp_path_factory):
    """No test leaves ids in the user's cache."""
    os.environ["NANOEXIT_CACHE"] = str(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def toy():
    return Pythia.from_pretrained(TOY)


@pytest.fixture(scope="session")
def toy_tokenizer():
    return Tokenizer.load(TOY)


@pytest.fixture(scope="session")
def paper_heads(toy):
    return ExitHeads.load(TOY / "heads.safetensors", toy)


@pytest.fixture(scope="session")
def fast_heads(toy):
    return ExitHeads.load(TOY / "heads-fast.safetensors", toy)


@pytest.fixture(scope="session")
def prompts():
    """50 prompts of 64 tokens of the measuring text."""
    return held_out_prompts(50)
