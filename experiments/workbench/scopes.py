"""The scope of each operation of a compiled program, and the part of a step that a scope is."""

import re
from collections import defaultdict
from collections.abc import Mapping

from dsv32_jax.experiments.workbench.profile import Event

__all__ = ["OTHER", "PARTS", "UNKNOWN", "Scopes", "part_of", "part_of_event"]

OTHER, TRANSFERS, UNKNOWN = "norms and other", "transfers", "unattributed"
PARTS = (
    "embedding",
    "projections",
    "indexer queries",
    "cache write",
    "indexer scores",
    "top-k",
    "index selection",
    "sparse MLA",
    "dense MLA",
    "routing",
    "dispatch",
    "experts",
    "shared expert",
    "dense feed-forward",
    "head",
    "sampling",
    OTHER,
    TRANSFERS,
    UNKNOWN,
)
"""The parts of a step, in its order. "index selection" is a replaced `index_select`, which may do anything; the model's
own is "indexer scores" and "top-k". "transfers" are copies between the host and the device."""

STEP = {"embedding": "embedding", "head": "head", "sampling": "sampling"}
"""Parts by a scope outside the layers."""
SELECTION = {"indexer_logits": "indexer scores", "top_k": "top-k"}
ATTENTION = {
    "cache_write": "cache write",
    "sparse_mla": "sparse MLA",
    "sparse_mla_combine": "sparse MLA",
    "dense_mla": "dense MLA",
    **SELECTION,
    "indexer": "indexer queries",
    **dict.fromkeys(("q_a", "q_b", "kv_a", "kv_b", "o", "q_a+indexer.k+kv_a", "indexer.k"), "projections"),
    **dict.fromkeys(("thn,hnc->thc", "thc,hvc->thv"), "projections"),
}
"""Parts by a scope in a layer's attention, the outermost first. The two formulas are the products with `kv_b`."""
EXPERTS = {
    "shared": "shared expert",
    **dict.fromkeys(("router", "route", "moe_route", "make_plan"), "routing"),
    **dict.fromkeys(("gather_rows", "combine", "moe_combine"), "dispatch"),
    "experts": "experts",
    **dict.fromkeys(("gate", "up", "gate+up", "swiglu", "down"), "dense feed-forward"),
}
"""Parts by a scope in a layer's feed-forward block, the first of this order that is there."""
KERNELS = {
    **SELECTION,
    **{name: ATTENTION[name] for name in ("cache_write", "sparse_mla", "sparse_mla_combine", "dense_mla")},
    **{name: EXPERTS[name] for name in ("moe_route", "make_plan", "gather_rows", "moe_combine")},
}
"""Parts by the name of a kernel, for one whose scope is lost."""
WORD = re.compile(r"[^/()]+")
LAYER = re.compile(r"layers\.\d+")


def part_of(scope: str, replaced: Mapping[str, object] | None = None) -> str:
    """The part of `PARTS` that a scope belongs to.

    Args:
      scope: "jit(f)/layers.3/attn/q_a/dot_general".
      replaced: the step's replaced parts, by name.
    """
    words = WORD.findall(scope)
    inside = next((words[at + 1 :] for at, word in enumerate(words) if LAYER.fullmatch(word)), None)
    if inside is None:
        table = KERNELS if not any(word in STEP for word in words) else STEP
        return next((table[word] for word in words if word in table), OTHER if "rms_norm" in words else UNKNOWN)
    if "attn" in inside:
        if "index_select" in inside and "index_select" in (replaced or {}):
            return "index selection"
        default = "indexer scores" if "index_select" in inside else OTHER  # the fused op prepares the scores' arguments
        return next((ATTENTION[word] for word in inside if word in ATTENTION), default)
    if "ffn" in inside:
        return next((part for word, part in EXPERTS.items() if word in inside), OTHER)
    return OTHER


def part_of_event(event: Event, scopes: "Scopes", replaced: Mapping[str, object] | None = None) -> str:
    """The part of `PARTS` that an operation belongs to; see `part_of`."""
    part = part_of(scopes.of(event), replaced)
    return TRANSFERS if part == UNKNOWN and event.kernel.startswith(("MemcpyH2D", "MemcpyD2H")) else part


# ---- scopes of operations --------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
OP_NAME = re.compile(r'op_name="([^"]*)"')
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OPCODE = re.compile(r"(?:^|\s)([a-z][\w-]*)\(")
WAITING = ("while", "call", "conditional", "async-start", "async-done")
"""Operations that run others."""


class Scopes:
    """The scope of each operation of a compiled program.

    An operation that the compiler added has none of its own. It takes that of the operation that uses its result: a
    weight is converted for the product that reads it. One inside a loop that nothing uses there takes the loop's.

    Args:
      text: of the compiled program, `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._own: dict[str, str] = {}
        self._resolved: dict[str, str] = {}
        self._waiting: set[str] = set()
        self._users: defaultdict[str, list[str]] = defaultdict(list)
        self._computation: dict[str, str] = {}
        self._caller: dict[str, str] = {}
        computation = ""
        for line in text.splitlines():
            if begins := COMPUTATION.match(line):
                computation = begins[1]
            elif instruction := INSTRUCTION.match(line):
                self._add(instruction[1], instruction[2], computation)
        # A GPU's kernel has the name of its operation, with other punctuation.
        self._kernels = {re.sub(r"\W", "_", name): name for name in self._own}

    def _add(self, name: str, rest: str, computation: str) -> None:
        rest = rest.partition(", backend_config=")[0]  # of a Mosaic kernel its whole code
        op_name = OP_NAME.search(rest)
        self._own[name] = op_name[1] if op_name else ""
        self._computation[name] = computation
        opcode = OPCODE.search(rest)
        if opcode is None:
            return
        if opcode[1] in WAITING:
            self._waiting.add(name)
        for operand in re.findall(r"%([\w.-]+)", rest[opcode.end() :].partition(")")[0]):
            self._users[operand].append(name)
        called = CALLED.findall(rest)
        if branches := BRANCHES.search(rest):
            called += re.findall(r"[\w.-]+", branches[1])
        for target in called:
            self._caller.setdefault(target, name)

    def of(self, event: Event) -> str:
        """The scope of an event, "jit(f)/layers.3/attn/q_a/dot_general"; "" where nothing says it."""
        name = event.name if event.name in self._own else self._kernels.get(event.name, "")
        return (self._resolve(name) if name else "") or event.scope

    def waits(self, event: Event) -> bool:
        """Whether the operation only waits for others that it runs."""
        return event.name in self._waiting

    def _resolve(self, name: str) -> str:
        """The operation's own scope, or that of the nearest user, or that of the loop around it."""
        if name not in self._resolved:
            self._resolved[name] = ""  # ends a circle of callers
            scope = self._nearest(name)
            if not LAYER.search(scope):  # a called function's operations may be named from its own beginning
                caller = self._caller.get(self._computation[name], "")
                around = self._resolve(caller) if caller else ""
                scope = f"{around}/{scope}" if around and scope else around or scope
            self._resolved[name] = scope
        return self._resolved[name]

    def _nearest(self, name: str) -> str:
        """The first scope among the operation and those that use its result, directly or by way of others."""
        seen, pending = {name}, [name]
        while pending:
            users: list[str] = []
            for one in pending:
                own = self._own.get(one, "")
                if part_of(own) != UNKNOWN:
                    return own
                fresh = [user for user in self._users[one] if user not in seen]
                users += fresh
                seen.update(fresh)
            pending = users
        return ""
