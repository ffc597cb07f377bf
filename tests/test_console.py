"""Consoles: letters that an encoding lacks are replaced, and a reader that leaves early is no
error."""
import io
import os
import subprocess
import sys

import pytest

import dssd
import model
from conftest import ROOT
from model import command_line

# a byte of a file name that is no UTF-8, and letters
PROMPT = "caf\udce9 = \"\u4e2d\U0001f600\"  # \u03b8"


def shown_on(encoding, main, monkeypatch, *arguments):
    """What a console of this encoding shows of a main(), as bytes."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding, "strict"))
    command_line(main)
    return content.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_without_a_letter_shows_a_question_mark(encoding, monkeypatch):
    seen = shown_on(encoding, model.main, monkeypatch, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert seen.startswith(b"caf") and b"2 tokens in" in seen
    assert "\u4e2d".encode(encoding, "replace") in seen and b"\\u" not in seen
    options = "--prompt", PROMPT, "--max-new-tokens", "2", "--prompts", "1"
    seen = shown_on(encoding, dssd.main, monkeypatch, *options)
    assert seen.startswith(PROMPT.encode(encoding, "replace")) and b"LayerSkip 4x8" in seen


def test_a_reader_that_leaves_early_is_no_error():
    """A pipe that nobody reads, met by the last lines when the process ends."""
    read, write = os.pipe()
    os.close(read)
    code = "import model; model.command_line(lambda: print('a line'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                          stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
