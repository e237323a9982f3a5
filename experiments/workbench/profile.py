"""Reads profiles: which operation ran when, in which scope of the model, and when none ran.

JAX's profiler records a GPU's kernels by stream and a CPU's operations by thread, with the name that each operation has
in the compiled program. The program's text has the scopes in which it was traced.
"""

import dataclasses
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

__all__ = ["Event", "Profile", "by_name", "kernels_of", "overlap", "profiled", "record", "times_by"]

WINDOW = "profiled calls"
"""The annotation around the recorded calls."""


class Event(NamedTuple):
    """One operation while it ran.

    Attributes:
      name: of the operation in its program (`hlo_op`), or of the kernel where the profile does not say which.
      program: the name of the program, "jit_f"; "" where the profile does not say.
      line: the GPU's stream or the CPU's thread.
      start, end: nanoseconds.
      kernel: the name of a GPU's kernel.
      scope: the traced name, where the profile has it ("jit(f)/layers.3/attn/dot_general"), else "".
    """

    name: str
    program: str
    line: str
    start: float
    end: float
    kernel: str = ""
    scope: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """The recorded calls.

    Attributes:
      events: all that ran on the device.
      start, end: of the calls, from the first launch to the last result, nanoseconds on the events' clock.
      seconds: the same by the host's clock.
      calls: their number.
    """

    events: list[Event]
    start: float
    end: float
    seconds: float
    calls: int


def record(run: Callable[[], Any], calls: int = 1) -> Profile:
    """Profiles calls that follow one another without waiting; `run` has been called before and returns arrays."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            begin = time.perf_counter()
            with jax.profiler.TraceAnnotation(WINDOW):
                out = None
                for _ in range(calls):
                    out = run()
                jax.block_until_ready(out)
            seconds = time.perf_counter() - begin
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a type of jaxlib's own
        events = list(events_of(data))
    return Profile(events, *window_of(data, events), seconds, calls)


# ---- what a profile says ---------------------------------------------------------------------------------------


def events_of(data: Any) -> Iterator[Event]:
    """What ran on the first GPU, or on the CPU where there is no GPU, of a `ProfileData`."""
    planes = list(data.planes)
    gpu = [plane for plane in planes if plane.name.startswith("/device:GPU:0")]
    if gpu:
        for plane in gpu:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from (gpu_event(event, line.name) for event in line.events)
        return
    for plane in planes:
        if plane.name == "/host:CPU":
            yield from cpu_events(plane)


def gpu_event(event: Any, line: str) -> Event:
    """A kernel or a copy."""
    stats = {str(name): value for name, value in event.stats}
    name, program = str(stats.get("hlo_op") or event.name), str(stats.get("hlo_module", ""))
    scope = str(stats.get("tf_op") or stats.get("name") or "")
    return Event(name, program, line, event.start_ns, event.start_ns + event.duration_ns, event.name, scope)


def cpu_events(plane: Any) -> Iterator[Event]:
    """The operations of programs on the threads of a CPU.

    An operation that goes on in other threads has a second event at its end, which bears the number that the first says
    it will have.
    """
    begun, ends = [], {}
    for number, line in enumerate(plane.lines):
        for event in line.events:
            if event.name.startswith("end: "):
                ends[dict(event.stats).get("_c")] = event.start_ns + event.duration_ns, number
            elif not event.name[:1].isupper():  # as the runtime's own events are, which are many
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    begun.append((event, number, stats))
    for event, number, stats in begun:
        name, program, end = stats["hlo_op"], stats["hlo_module"], event.start_ns + event.duration_ns
        yield Event(name, program, f"thread {number}", event.start_ns, end, name)
        later, _ = ends.get(stats.get("_p"), (end, number))
        if later > end + 1000:  # nanoseconds: the event of the end itself takes some
            yield Event(name, program, f"rest {stats['_p']}", end, later, name)


def window_of(data: Any, events: list[Event]) -> tuple[float, float]:
    """Start and end of the calls: of the annotation around them and of all events.

    A GPU's clock can be off the host's by some microseconds. Where the two have nothing in common, the events count.
    """
    first = min((event.start for event in events), default=0.0)
    last = max((event.end for event in events), default=0.0)
    annotations = (
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == WINDOW
    )
    start, end = next(annotations, (first, last))
    return (min(start, first), max(end, last)) if start < last and first < end else (first, last)


# ---- sums ------------------------------------------------------------------------------------------------------


def times_by[Key: Hashable](
    events: Iterable[Event],
    key: Callable[[Event], Key],
    waits: Callable[[Event], bool] = lambda event: False,
    window: tuple[float, float] | None = None,
) -> tuple[dict[Key, float], float]:
    """Nanoseconds by key, and those in which nothing ran; together they are the window's.

    At each moment the innermost operation of each line counts. Operations that run at once on several lines share
    the moment equally, and one that only waits for others counts where none of those runs.

    Args:
      events: of any lines.
      key: what an event counts for.
      waits: whether an event runs others.
      window: start and end; default: of the first and the last event.
    """
    lines: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        lines[event.line].append(event)
    pieces = [piece for line in lines.values() for piece in innermost(line)]
    if window is None:
        window = min((piece[0] for piece in pieces), default=0.0), max((piece[1] for piece in pieces), default=0.0)
    first, last = window
    changes = []
    for start, end, event in pieces:
        start, end = max(start, first), min(end, last)
        if start < end:
            of = key(event), waits(event)
            changes += [(start, 1, of), (end, -1, of)]
    changes.sort(key=lambda change: change[0])
    took: defaultdict[Key, float] = defaultdict(float)
    idle, now = 0.0, first
    active: tuple[Counter[Key], Counter[Key]] = Counter(), Counter()  # what works, what waits
    for at, step, (name, waiting) in changes:
        running = active[0] or active[1]
        if at > now:
            if not running:
                idle += at - now
            for each, count in running.items():
                took[each] += (at - now) * count / running.total()
            now = at
        counts = active[waiting]
        counts[name] += step
        if not counts[name]:
            del counts[name]
    return dict(took), idle + max(0.0, last - now)


def innermost(events: list[Event]) -> Iterator[tuple[float, float, Event]]:
    """Pieces of one line's time, (start, end, event), each with the innermost event; pieces do not overlap."""
    open_: list[Event] = []
    now = 0.0
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while open_ and open_[-1].end <= event.start:
            ended = open_.pop()
            if ended.end > now:
                yield now, ended.end, ended
                now = ended.end
        if open_ and event.start > now:
            yield now, event.start, open_[-1]
        now = max(now, event.start)
        open_.append(event)
    while open_:
        ended = open_.pop()
        if ended.end > now:
            yield now, ended.end, ended
            now = ended.end


# ---- kernels of a GPU, as results list them --------------------------------------------------------------------


def profiled(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a second call, in order, see `kernels_of`."""
    jax.block_until_ready(run())
    return kernels_of(record(run).events)


def kernels_of(events: list[Event]) -> list[dict[str, Any]]:
    """Kernels in the order of their start: name, stream, start after the first and duration in microseconds."""
    first = min((event.start for event in events), default=0.0)
    return [
        {
            "name": event.kernel,
            "stream": event.line,
            "start_us": (event.start - first) / 1e3,
            "us": (event.end - event.start) / 1e3,
        }
        for event in sorted(events, key=lambda event: (event.start, event.end))
    ]


def by_name(kernels: list[dict[str, Any]], calls: int = 1) -> list[dict[str, Any]]:
    """What each name took of one of so many equal calls, most of the time first."""
    took: dict[str, list[float]] = {}
    for kernel in kernels:
        took.setdefault(kernel["name"], []).append(kernel["us"])
    return [
        {"name": name, "times": len(us) / calls, "us": sum(us) / calls, "longest_us": max(us)}
        for name, us in sorted(took.items(), key=lambda item: -sum(item[1]))
    ]


def overlap(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds from the first start to the last end, with any kernel at work, and with more than one."""
    events = sorted((at, step) for k in kernels for at, step in ((k["start_us"], 1), (k["start_us"] + k["us"], -1)))
    busy = several = 0.0
    for (at, step), (following, _), running in zip(events, events[1:], running_after(events), strict=False):
        del step
        busy += following - at if running >= 1 else 0
        several += following - at if running >= 2 else 0
    whole = events[-1][0] - events[0][0] if events else 0.0
    return {"whole_us": whole, "busy_us": busy, "overlapping_us": several}


def running_after(events: list[tuple[float, int]]) -> list[int]:
    """How many kernels run after each start (+1) or end (-1)."""
    counts = [0]
    for _, step in events:
        counts.append(counts[-1] + step)
    return counts[1:]
