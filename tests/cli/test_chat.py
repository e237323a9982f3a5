"""Conversations: their messages, their commands, and Ctrl-C at each moment."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dsv32_jax.cli.chat import Interrupts, Session, Terminal
from dsv32_jax.cli.conversation import ContextFull, Conversation, Part
from dsv32_jax.cli.interruption import PAUSE
from dsv32_jax.generate.language_model import LanguageModel, Piece
from dsv32_jax.generate.loading import load
from tests.harness import read_until

EXACT = ("--compute-dtype", "float32", "--no-act-quant")


@pytest.fixture(scope="module")
def lm(tiny):
    return load(tiny)


@pytest.fixture
def answers(monkeypatch):
    """The pieces that the model generates, a list for each answer; an exception in it is raised."""
    prompts: list[list[int]] = []
    waiting: list[list] = []

    def stream(self, rows, max_new_tokens=None, **_):
        prompts.append(rows[0])
        for item in waiting.pop(0):
            if isinstance(item, str):
                yield Piece(0, 9, item)
            else:
                raise item

    monkeypatch.setattr(LanguageModel, "warmup", lambda *_: 0)
    monkeypatch.setattr(LanguageModel, "stream", stream)
    waiting.append(prompts)  # type: ignore[arg-type]
    return waiting


@pytest.fixture
def chat(dsv32, tiny, monkeypatch, answers):
    """Runs `dsv32 chat --json` with lines of input and answers: (exit code, JSON or None, standard error)."""
    answers.clear()

    def run(lines, *texts, options=()):
        answers.extend(texts)
        stdin = io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes) else lines.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = dsv32("chat", "--model", tiny, "--json", *options)
        return code, json.loads(out) if out else None, err

    return run


def test_commands(chat):
    lines = "/help\n/system Be short.\nhello\n/reset\n/nonsense\n /etc\n/system\n/exit\nnot read\n"
    code, result, err = chat(lines, ["first"], ["second"])
    assert code == 0
    assert result["messages"] == [{"role": "user", "content": "/etc"}, {"role": "assistant", "content": "second"}]
    assert result["earlier"] == [
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "first"},
        ]
    ]
    assert result["finish_reasons"] == ["length"]
    assert all(command in err for command in ("/help", "/exit", "/reset", "/system TEXT"))
    assert "/nonsense: no such command; /help lists them" in err


def test_an_interrupt_ends_the_answer_and_not_the_conversation(chat):
    code, result, _ = chat("one\ntwo\n", ["to", "day", KeyboardInterrupt], ["second"])
    assert code == 0
    assert [message["content"] for message in result["messages"]] == ["one", "today", "two", "second"]
    assert result["finish_reasons"] == ["interrupted", "length"]


def test_two_interrupts_in_a_row_end_a_pipe_with_what_was_given(chat):
    code, result, err = chat("one\ntwo\nthree\n", ["first"], [KeyboardInterrupt], [KeyboardInterrupt])
    assert code == 130 and err.endswith("interrupted\n")
    assert [message["content"] for message in result["messages"]] == ["one", "first"]


def test_answers_are_kept_where_the_context_is_full(chat):
    code, result, err = chat("one\n" + "ship " * 300 + "\n/reset\ntwo\n", ["first"], ["second"])
    assert code == 0
    assert "256: /reset begins a new conversation" in err
    assert [message["content"] for message in result["messages"]] == ["two", "second"]
    assert [message["content"] for message in result["earlier"][0]] == ["one", "first"]
    assert result["unanswered"] == [("ship " * 300).strip()]


def test_answers_are_kept_before_a_line_that_is_no_text(chat):
    code, result, err = chat(b"one\n\xff\ntwo\n", ["first"])
    assert (code, err) == (2, "error: standard input: line 2 is not UTF-8 text\n")
    assert [message["content"] for message in result["messages"]] == ["one", "first"]
    assert chat(b"caf\xe9\n") == (2, None, "error: standard input: line 1 is not UTF-8 text\n")


def test_a_byte_order_mark_is_no_part_of_a_message(chat):
    _, result, _ = chat(b"\xef\xbb\xbfone\n", ["first"])
    assert result["messages"][0]["content"] == "one"


def test_surrogates_from_a_terminal_are_no_text(chat, monkeypatch):
    monkeypatch.setattr(Terminal, "_piped", lambda _: "caf\udce9")
    assert chat("")[0] == 2


def test_reasoning_stands_apart(chat):
    code, result, _ = chat("one\n", ["because", "</think>", "yes"], options=("--thinking",))
    assert code == 0
    assert result["messages"][-1] == {"role": "assistant", "content": "yes", "reasoning_content": "because"}


def test_on_a_pipe_only_answers_are_on_standard_output(dsv32, tiny, monkeypatch, answers):
    answers[:] = [["<think>", "because", "</think>", "yes"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/help\n"))
    code, out, err = dsv32("chat", "--model", tiny, "--thinking")
    assert (code, out) == (0, "yes\n")
    assert "because" in err


# ---- the conversation ----


def ask(conversation, message):
    return [part for part in conversation.ask(message)]


def test_later_turns_do_not_see_reasoning(lm, answers):
    prompts = answers.pop()
    conversation = Conversation(lm, system="Short.", thinking=True)
    answers.extend([["because", "</think>", "yes"], ["x"]])
    assert ask(conversation, "one") == [Part("answer", "because"), Part("answer", "yes")]
    ask(conversation, "two")
    expected = [("system", "Short."), ("user", "one"), ("assistant", "yes"), ("user", "two")]
    messages = [{"role": role, "content": content} for role, content in expected]
    assert prompts[1] == lm.tokenizer.encode_chat(messages, thinking=True)


def test_a_turn_without_an_answer_is_kept_but_not_given_to_the_model(lm, answers):
    prompts = answers.pop()
    conversation = Conversation(lm, thinking=True)
    answers.extend([["<think>", "hm", KeyboardInterrupt], [KeyboardInterrupt], ["x"]])
    for message in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            ask(conversation, message)
    ask(conversation, "three")
    assert prompts[2] == lm.tokenizer.encode_chat([{"role": "user", "content": "three"}], thinking=True)
    assert [(turn.message, turn.reasoning) for turn in conversation.turns] == [("one", "hm"), ("three", "")]


def test_an_answer_ends_where_the_context_does(lm, monkeypatch, answers):
    room = []
    monkeypatch.setattr(LanguageModel, "stream", lambda _, rows, limit, **__: room.append((len(rows[0]), limit)) or ())
    conversation = Conversation(lm, max_new_tokens=200)
    ask(conversation, "ship " * 25)
    ((tokens, limit),) = room
    assert tokens + limit == lm.config.max_position_embeddings and limit < 200
    with pytest.raises(ContextFull):
        ask(conversation, "ship " * 300)


# ---- Ctrl-C ----


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_are_raised_only_where_they_are_expected():
    with Interrupts() as interrupts:
        interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            interrupt()
            pytest.fail("was not raised")
        interrupt()
        with interrupts.raised():
            assert not interrupts.noted()
            interrupt()
            assert interrupts.noted()
        interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            interrupts.noted()
            interrupt()
            interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_lost_interrupt_is_raised_again_where_it_is_expected():
    def lose():
        with contextlib.suppress(KeyboardInterrupt):
            interrupt()
            pytest.fail("was not raised")

    with Interrupts() as interrupts:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt), interrupts.raised():
                lose()
                time.sleep(10)
                pytest.fail("was not raised again")
            time.sleep(2 * PAUSE)  # no further one comes
        with interrupts.raised():
            lose()
        with interrupts.raised():
            time.sleep(2 * PAUSE)  # nor one for a block that has ended


class Script:
    """A terminal whose user types the inputs in order; those that are functions are called."""

    interactive = True

    def __init__(self, *inputs):
        self.inputs = list(inputs)
        self.lines = []
        self.shown = ""

    def read(self):
        if not self.inputs:
            raise EOFError
        item = self.inputs.pop(0)
        return item if isinstance(item, str) else item() or ""

    def show(self, part):
        self.shown += part.text
        if part.text == "^C":
            interrupt()

    def end_answer(self):
        self.shown += "\n"

    def say(self, line):
        self.lines.append(line)


def test_interrupts_at_each_moment_of_a_terminal(lm, answers):
    def while_it_compiles(*_):
        interrupt()

    answers.clear()
    answers.extend([["a", "^C", "never"], ["b"]])
    terminal = Script(interrupt, "one", interrupt, interrupt, "two")
    conversation = Conversation(lm)
    session = Session(conversation, terminal, "tiny")
    session.run()
    assert terminal.shown == "a^C\nb\n"
    assert [turn.finish_reason for turn in conversation.turns] == ["interrupted", "length"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "warmup", while_it_compiles)
        terminal.inputs = ["three"]
        session.run()
    assert len(conversation.turns) == 2 and terminal.lines[-2] == "(interrupted)"


TALK = """
    import fcntl, termios, time

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C in this terminal is for this process
    from dsv32_jax.cli.chat import Session, Terminal
    from dsv32_jax.cli.conversation import Part

    class Echo:
        turns = []
        def ask(self, message):
            yield Part("answer", f"<{message}>")
            for _ in range(1000 if message == "slow" else 0):
                time.sleep(0.05)
                yield Part("answer", ".")

    Session(Echo(), Terminal(), "echo").run()
    print("the end")
"""


def test_a_conversation_in_a_terminal(tmp_path):
    leader, follower = pty.openpty()
    environment = os.environ | {"HOME": str(tmp_path), "TERM": "xterm"}
    arguments = [sys.executable, "-c", textwrap.dedent(TALK)]
    streams = {"stdin": follower, "stdout": follower, "stderr": follower}
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, **streams)
    os.close(follower)

    def types(text, expected):
        os.write(leader, text.encode())
        return read_until(leader, expected.encode())

    def interrupts(expected):
        os.write(leader, b"\x03")
        while not select.select([leader], [], [], 1)[0]:
            # Python overlooks a signal that comes just before it waits for a key; one would press again.
            os.write(leader, b"\x03")
        read_until(leader, expected)
        read_until(leader, b"> ")

    assert b"echo: type a message; /help lists commands, /exit leaves" in read_until(leader, b"> ")
    types("half a line", "half a line")
    interrupts(b"(/exit leaves, and so does Ctrl-D)\r\n")
    interrupts(b"(/exit leaves, and so does Ctrl-D)\r\n")
    types("slow\r", "<slow>..")
    interrupts(b"(interrupted)\r\n")
    types("Frage 海X\x7f?\r", "<Frage 海?>")
    read_until(leader, b"> ")
    types("\x1b[A\x1b[D\x1b[D!\r", "<Frage !海?>")  # up, and two to the left
    read_until(leader, b"> ")
    types("\x1b[200~two\nlines\x1b[201~\r", "<two\r\nlines>")  # pasted
    read_until(leader, b"> ")
    types("\x04", "the end\r\n")
    assert process.wait(60) == 0
    os.close(leader)
    history = tmp_path / ".local/state/dsv32-jax/chat_history"
    assert "Frage !海?" in history.read_text() and history.stat().st_mode & 0o777 == 0o600
