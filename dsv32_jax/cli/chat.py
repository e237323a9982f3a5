"""`dsv32 chat`: a conversation in a terminal, or over a pipe."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from dsv32_jax.cli.inputs import check_sampling, loaded, name_of, print_json, sampling_of
from dsv32_jax.cli.interruption import Interrupt
from dsv32_jax.cli.options import (
    Attention,
    Backends,
    CheckFlag,
    ComputeDtype,
    IgnoreEos,
    IndexTopk,
    Json,
    MaxNewTokens,
    Model,
    NoActQuant,
    NoMtp,
    PartFlag,
    Seed,
    System,
    Temperature,
    Thinking,
    TopP,
)
from dsv32_jax.common.reading import BYTE_ORDER_MARK
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.cli.conversation import Conversation, Part

COMMANDS = {
    "/help": "shows these lines",
    "/reset": "forgets the conversation; the system message stays",
    "/system TEXT": "sets the system message; without TEXT there is none any more",
    "/exit": "leaves; so does Ctrl-D",
}
LEAVING = ("/exit", "/quit")


def chat(
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    thinking: Thinking = False,
    system: System = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backends = None,
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    part: PartFlag = None,
    check: CheckFlag = False,
    as_json: Json = False,
) -> None:
    """Talk to the model: one line is one message; /help lists commands, /exit or the end of input leaves.

    Ctrl-C ends an answer, and the conversation goes on. With --json all messages are printed at the end.

    Example: dsv32 chat --model DIR --system "Answer in one sentence."
    """
    check_sampling(temperature, top_p, seed)
    m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp, part, check)
    from dsv32_jax.cli.conversation import Conversation

    sampling = sampling_of(m, temperature, top_p, seed, ignore_eos)
    conversation = Conversation(m, system=system, thinking=thinking, max_new_tokens=max_new_tokens, sampling=sampling)
    session = Session(conversation, Terminal(quiet=as_json), name_of(model))
    try:
        session.run()
    finally:
        if as_json and (conversation.turns or conversation.earlier or not isinstance(sys.exception(), UserError)):
            print_json(**result_of(conversation))


def result_of(conversation: "Conversation") -> dict[str, Any]:
    """What --json prints."""
    result: dict[str, Any] = {
        "messages": conversation.messages(),
        "finish_reasons": [turn.finish_reason for turn in conversation.turns],
    }
    more = {"earlier": conversation.earlier, "unanswered": conversation.unanswered}
    return result | {name: value for name, value in more.items() if value}


class Terminal:
    """Reads messages and shows answers. Only answers are on standard output; everything else is on stderr.

    Args:
      quiet: show no answers.
    """

    def __init__(self, quiet: bool = False):
        self.interactive = sys.stdin.isatty()
        self.quiet = quiet
        self._styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._kind = "answer"
        self._lines = 0
        self._history = _history_file() if self.interactive else None

    def read(self) -> str:
        """Reads a line. Raises EOFError, KeyboardInterrupt, and UserError where it is not UTF-8."""
        self._lines += 1
        try:
            line = self._prompted() if self.interactive else self._piped()
            line.encode()  # bytes that are not UTF-8 can come as surrogates
        except UnicodeError as error:
            raise UserError(f"standard input: line {self._lines} is not UTF-8 text") from error
        return line

    def _prompted(self) -> str:
        prompt = "> "
        if not sys.stdout.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        line = input(prompt)
        if self._history is not None and line.strip():
            _remember(self._history)
        return line

    def _piped(self) -> str:
        """Reads a line as bytes: Python would decode many lines at once, and fail for one that is not read yet."""
        stream = getattr(sys.stdin, "buffer", sys.stdin)
        line = stream.readline()
        if not line:
            raise EOFError
        line = line.decode() if isinstance(line, bytes) else line
        return line.removeprefix(BYTE_ORDER_MARK) if self._lines == 1 else line

    def show(self, part: "Part") -> None:
        """Shows a part of an answer; reasoning is dim on a terminal, and goes to stderr elsewhere."""
        if self.quiet:
            return
        if part.kind != self._kind:
            self._change(part.kind)
        if part.kind == "answer" or sys.stdout.isatty():
            typer.echo(part.text, nl=False)
            sys.stdout.flush()
        else:
            print(part.text, end="", file=sys.stderr, flush=True)

    def end_answer(self) -> None:
        if not self.quiet:
            if self._kind != "answer":
                self._change("answer")
            typer.echo()

    def _change(self, kind: str) -> None:
        """Marks the change from an answer to reasoning, or back."""
        self._kind = kind
        reasoning = kind == "reasoning"
        if sys.stdout.isatty():
            style = ("\x1b[2m" if reasoning else "\x1b[0m") if self._styled else ""
            typer.echo(f"{style}(reasoning) " if reasoning else f"{style}\n", nl=False)
        else:
            print("(reasoning) " if reasoning else "\n", end="", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Session:
    """Reads lines, runs commands and answers messages until the user leaves."""

    def __init__(self, conversation: "Conversation", terminal: Terminal, name: str):
        self.conversation = conversation
        self.terminal = terminal
        self.name = name
        self._interrupts = 0
        self._leaves = False

    def run(self) -> None:
        """Runs to the end of input, or to a command that leaves.

        Over a pipe, two interrupts in a row raise KeyboardInterrupt, as does one at the prompt, since no user is there
        to leave in another way.
        """
        if self.terminal.interactive:
            self.terminal.say(f"{self.name}: type a message; /help lists commands, /exit leaves")
        with Interrupts() as interrupts:
            while not self._leaves:
                try:
                    with interrupts.raised():
                        line = self.terminal.read()
                except EOFError:
                    if self.terminal.interactive:
                        self.terminal.say("")
                    return
                except KeyboardInterrupt:
                    self._interrupted("\n(/exit leaves, and so does Ctrl-D)")
                    if not self.terminal.interactive:
                        raise
                except UserError as error:
                    if not self.terminal.interactive:
                        raise
                    self.terminal.say(f"{error}; not sent")
                else:
                    self._handle(line, interrupts)

    def _handle(self, line: str, interrupts: "Interrupts") -> None:
        if line.startswith("/"):
            self._run_command(line.strip())
        elif line.strip():
            self._answer(line.strip(), interrupts)

    def _run_command(self, line: str) -> None:
        command, *arguments = line.split(maxsplit=1)
        text = "".join(arguments)
        say = self.terminal.say
        if command in LEAVING:
            self._leaves = True
        elif command == "/help":
            for name, meaning in COMMANDS.items():
                say(f"{name:<13} {meaning}")
            say("Ctrl-C ends an answer. A line that begins with a space is a message, also if a / follows.")
        elif command == "/reset":
            self.conversation.reset()
            say("a new conversation")
        elif command == "/system":
            self.conversation.system = text or None
            say(f"system message: {text or 'none'}")
        else:
            say(f"{command}: no such command; /help lists them, and a space before the / makes it a message")

    def _answer(self, message: str, interrupts: "Interrupts") -> None:
        from dsv32_jax.cli.conversation import ContextFull

        parts = self.conversation.ask(message)
        stopped = False
        try:
            with interrupts.raised(), contextlib.closing(parts):
                for part in parts:
                    self.terminal.show(part)
                    self._interrupts = 0
                    if interrupts.noted():
                        stopped = True
                        break
        except KeyboardInterrupt:
            stopped = True
        except ContextFull as error:
            self.terminal.say(f"{error}: /reset begins a new conversation")
            return
        self.terminal.end_answer()
        if stopped:
            self._interrupted("(interrupted)")
            if not self.terminal.interactive and self._interrupts > 1:
                raise KeyboardInterrupt

    def _interrupted(self, remark: str) -> None:
        self._interrupts += 1
        if self.terminal.interactive:
            self.terminal.say(remark)


class Interrupts:
    """Ctrl-C in a conversation: raised where that is expected, and ignored elsewhere.

    The first interrupt between two tokens is only noted, so that no call of JAX is broken off.
    """

    def __init__(self) -> None:
        self._raises = False
        self._block: object = None
        self._notes_first = False
        self._noted = False

    def __enter__(self) -> "Interrupts":
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within it, the first interrupt is raised, or the second after a call of `noted`."""
        self._notes_first = self._noted = False
        self._block = object()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
            self._block = None

    def noted(self) -> bool:
        """Whether an interrupt was noted; from now on the first one is noted instead of raised."""
        self._notes_first = True
        return self._noted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raises and self._notes_first and not self._noted:
            self._noted = True
        elif self._raises:
            self._raises = False
            raise Interrupt(functools.partial(self._is_lost_in, self._block))

    def _is_lost_in(self, block: object) -> bool:
        """Whether a block still runs although an interrupt was raised in it; then the next one is raised, too."""
        lost = self._block is block
        self._raises |= lost
        return lost


# ---- history ----


def _history_file() -> Path | None:
    """Reads the lines of earlier conversations; returns their file, None where lines cannot be edited or kept."""
    try:
        import readline
    except ImportError:  # this Python has none: lines are read without editing
        return None
    from dsv32_jax.common.files import home_directory

    # Python turns this off. Lines that are pasted together are one message then.
    readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        file = home_directory() / ".local/state/dsv32-jax/chat_history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError:  # no home directory, or one that cannot be written
        return None
    return file


def _remember(file: Path) -> None:
    import readline

    with contextlib.suppress(OSError):
        readline.append_history_file(1, file)
