"""The terminal chat: lines in, what it shows, what it keeps between turns, and that wrong input ends nothing."""

import contextlib
import io
import os
import subprocess
import sys
import threading

import pytest
from parrot import SIZES, load_parrot, script
from PIL import Image

from clips import write_clip
from conftest import HANG_S, ROOT
from scripts.chat import Chat
from scripts.tiny_checkpoint import write_tiny_checkpoint
from serve.engine import Engine, Sampling


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = Engine(*load_parrot(tmp_path_factory.mktemp("chat")), max_caches=1)
    yield engine
    engine.close()


def talk(engine, *lines):
    out = io.StringIO()
    chat = Chat(engine, Sampling(), out)
    chat.run(io.StringIO("".join(f"{line}\n" for line in lines)))
    return chat, out.getvalue()


def test_thoughts_answers_and_a_note(engine):
    chat, shown = talk(
        engine, script("I compare.", "9.9 is bigger."), script("Again?", "Still 9.9."), "/quit", "never"
    )
    assert "I compare.\n9.9 is bigger.\n[" in shown and "tokens/s" in shown and "\x1b" not in shown
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert (
        chat.messages[1]["reasoning_content"] == "I compare." and chat.messages[3]["content"] == "Still 9.9."
    )
    second = shown.rsplit("[", 1)[1]
    read, cached = [int(word) for word in second.split() if word.isdigit()][:2]
    assert cached > read // 3, "the second turn takes the cache of the first"


def test_commands(engine, tmp_path):
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    clip = write_clip(tmp_path / "b.mp4", num_frames=10)
    chat, shown = talk(
        engine,
        f"/image {tmp_path / 'a.png'}",
        f"/video {clip}",
        script("", "seen"),
        "/unknown",
        f"/image {tmp_path / 'none.png'}",
        f"/video {tmp_path / 'a.png'}",
    )
    assert "image of 56 x 28 pixels" in shown and "video of 64 x 48 pixels" in shown
    assert [part["type"] for part in chat.messages[0]["content"]] == ["image", "video", "text"]
    assert "/unknown is no command" in shown and "there is no file" in shown and "is not a video" in shown
    assert chat.media == [] and "seen" in shown
    chat.take("/new")
    assert chat.messages == []


def test_a_message_that_cannot_be_is_forgotten(engine):
    chat, shown = talk(engine, "word " * 300_000, script("", "fine"))
    assert "tokens, and the context" in shown and chat.messages[1]["content"] == "fine"


def test_calls_that_nobody_declared_are_shown(engine):
    _, shown = talk(engine, script("", "", [["functions.f:0", {"a": 1}]]))
    assert '[tool call functions.f:0] {"a": 1}' in shown


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("random") / "tiny", text=SIZES, num_merges=50)
    cache = tmp_path_factory.mktemp("cache")
    env = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    line = [sys.executable, "-m", "scripts.chat", "--model", str(folder), "--max-tokens", "8", "--seed", "1"]
    return line, {"env": env, "cwd": ROOT}


def test_the_command_in_a_pipe_and_in_a_terminal(command):
    line, options = command
    done = subprocess.run(line, input="Hello\n", capture_output=True, text=True, timeout=HANG_S, **options)
    assert done.returncode == 0, done.stderr
    assert "8 written" in done.stdout and "\x1b" not in done.stdout and "> " not in done.stdout
    ours, theirs = pytest.importorskip("pty").openpty()
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, **options)
    os.close(theirs)
    shown = []

    def read():
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed, others read nothing
            while piece := os.read(ours, 4096):
                shown.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    os.write(ours, b"Hello\n/quit\n")
    try:
        assert process.wait(timeout=HANG_S) == 0
        reader.join(timeout=HANG_S)
        assert not reader.is_alive()
    finally:
        process.kill()
        os.close(ours)
    text = b"".join(shown).decode(errors="replace")
    assert "> " in text and "\x1b[2m" in text and "8 written" in text


def test_a_missing_folder_is_named():
    line = [sys.executable, "-m", "scripts.chat", "--model", "/no/such/folder"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=HANG_S)
    assert done.returncode != 0 and "/no/such/folder" in done.stderr
