"""Tests rely neither on the machine's speed nor on files that others own."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
LEAST_GUARD_SECONDS = 60  # what ends a hanging test may be longer, never shorter
CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "time", "time_ns"}
# calls that wait, and where among their positional arguments the bound stands
GUARDS = {"wait_for": 1, "wait": 0, "join": 0, "eventually": 1, "until": 1, "idle": 0, "end": 0}
GUARDS |= {"communicate": 1, "run": 9, "urlopen": 2, "wait_procs": 1, "until_health": 9}
# An absolute path; names of RPCs have a dot in their first part.
PATH = re.compile(r"/[a-z][\w-]*(/[\w.\[\]-]*)*$")

TIME = re.compile(r"(_ns|seconds|latency|duration|elapsed)(_total|_sum)?$")

# "file:function" -> why what is found there relies on nothing of the machine
ALLOWED = {
    "engine/control/test_signs_of_life.py:test_watch_load_sends_at_once_and_on_change": (
        "waits for nothing to come: a slow machine makes that no less true"
    ),
    "e2e/test_trace.py:test_the_engines_phases_fill_its_span": (
        "the same moments told twice, in a span and in a message"
    ),
    "engine/control/test_service.py:test_a_full_queue_is_an_immediate_answer": (
        "the range of an advice, not a time that was measured"
    ),
    "tokenizer/test_chat.py:template": "seconds for a rendering: a setting, not a guard",
    "deploy/test_rendering.py:test_the_job_that_loads_a_model_fits": "a path in a container",
    "deploy/test_workloads.py:test_every_mount_has_a_volume_and_engines_have_a_cache": (
        "paths in a container"
    ),
    "deploy/test_workloads.py:test_models_are_mounted_where_they_are_looked_for": (
        "a path in a container"
    ),
    "engine/control/test_service.py:test_a_row_failure_is_internal_and_opaque": (
        "text of an error that must not get out"
    ),
    "client/test_stack.py:no_process_left": "the kernel's list of processes, where there is one",
    "common/test_network.py:"
    "test_a_stream_on_a_half_open_connection_ends_and_the_next_call_finds_another": (
        "sooner than gRPC would by its own default of 60 s, of which it needs 6"
    ),
    "common/test_lifecycle.py:"
    "test_standard_streams_that_are_closed_give_their_numbers_to_no_socket": (
        "the kernel's list of a process's descriptors"
    ),
    "common/test_logs.py:test_a_log_that_cannot_be_written_is_counted_and_does_not_raise": (
        "the kernel's device that is always full"
    ),
    "gateway/test_memory.py:module": "where the kernel has its control groups, if it has any",
    "gateway/test_memory.py:peak_bytes": "the kernel's record of a process's memory",
    "client/test_chat_sampling.py:test_a_conversation_begins_with_how_it_samples": (
        "a command of the chat, not a path"
    ),
    "client/test_cli.py:test_a_conversation_on_a_terminal": "a command of the chat, not a path",
}
Finding = tuple[str, int]


class Module:
    """A test file's tree, with the names that it binds to numbers."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.numbers: dict[str, float] = {}
        for node in self.tree.body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and is_number(value):
                names = [each.id for each in node.targets if isinstance(each, ast.Name)]
                self.numbers |= dict.fromkeys(names, value.value)

    def functions(self) -> Iterator[tuple[str, ast.AST]]:
        """Outermost functions and methods by name; what stands outside them is `module`."""
        for node in self.tree.body:
            parts = node.body if isinstance(node, ast.ClassDef) else [node]
            for part in parts:
                is_function = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
                yield (part.name if is_function else "module"), part

    def nodes(self) -> Iterator[tuple[str, ast.AST]]:
        for name, function in self.functions():
            yield from ((name, node) for node in ast.walk(function))

    def number(self, node: ast.AST | None) -> float | None:
        """The value of a number or of a name bound to one."""
        if is_number(node):
            return float(node.value)
        return self.numbers.get(node.id) if isinstance(node, ast.Name) else None


def is_number(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def is_clock(node: ast.AST) -> bool:
    """Whether a call reads a wall clock: of `time` or of an event loop."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in CLOCKS - {"time"}
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in CLOCKS:
        return False
    owner = node.func.value
    return isinstance(owner, ast.Call) or getattr(owner, "id", "") in ("time", "loop")


def reads_clock(node: ast.AST, instants: set[str]) -> bool:
    """Whether an expression depends on a wall clock or on a name that holds a reading."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "len":
        return False  # a count
    if is_clock(node) or getattr(node, "id", None) in instants:
        return True
    return any(reads_clock(part, instants) for part in ast.iter_child_nodes(node))


def instants_of(function: ast.AST) -> set[str]:
    """Names that are assigned from a wall clock, directly or by way of others."""
    kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)
    assigned = [node for node in ast.walk(function) if isinstance(node, kinds) and node.value]
    names: set[str] = set()
    while True:
        found = {
            part.id
            for node in assigned
            if reads_clock(node.value, names)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            for part in ast.walk(target)
            if isinstance(part, ast.Name)
        }
        if found <= names:
            return names
        names |= found


def is_constant(node: ast.AST, module: Module) -> bool:
    """Whether an expression holds numbers alone, but 0; `pytest.approx` may stand around them."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    is_known = names <= {*module.numbers, "pytest", "approx"}
    return is_known and all(is_number(ast.Constant(value)) for value in values) and values != [0]


def timed_comparisons(module: Module) -> Iterator[Finding]:
    """Comparisons of a wall clock's reading, or of what was made of one, with a number."""
    for name, function in module.functions():
        instants = instants_of(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                is_timed = any(reads_clock(side, instants) for side in sides)
                if is_timed and any(is_constant(side, module) for side in sides):
                    yield name, node.lineno


def reported_times(module: Module) -> Iterator[Finding]:
    """Comparisons of a time that a service reports with a number that it must not be above."""
    for name, node in module.nodes():
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for (less, more), sign in zip(pairwise(sides), node.ops, strict=True):
            if isinstance(sign, ast.Gt | ast.GtE):
                less, more = more, less
            is_time = any(TIME.search(text) for text in reported(less))
            is_bound = is_constant(more, module) and not isinstance(sign, ast.Eq | ast.In | ast.Is)
            if is_time and is_bound:
                yield name, node.lineno


def reported(node: ast.AST) -> list[str]:
    """Names of attributes, keys and functions in an expression."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            found.append(part.attr)
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
            found.append(part.func.id)
        elif isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant):
            found.append(str(part.slice.value))
    return found


def bounds(node: ast.AST) -> list[ast.AST]:
    """The bounds in seconds of something that waits."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = [*node.args.posonlyargs, *node.args.args]
        pairs = zip(reversed(given), reversed(node.args.defaults), strict=False)
        return [default for argument, default in pairs if argument.arg == "seconds"]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and is_clock(node.left):
        return [node.right]
    if not isinstance(node, ast.Call):
        return []
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if called == "timeout" and getattr(getattr(node.func, "value", None), "id", "") == "asyncio":
        return node.args[:1]
    if called not in GUARDS:
        return []
    named = [word.value for word in node.keywords if word.arg in ("timeout", "seconds")]
    return named or node.args[GUARDS[called] : GUARDS[called] + 1]


def short_guards(module: Module) -> Iterator[Finding]:
    """Waits that give up soon. A clock plus a number is one: the end of a loop that looks again."""
    for name, node in module.nodes():
        seconds = [module.number(bound) for bound in bounds(node)]
        if any(each is not None and 0 < each < LEAST_GUARD_SECONDS for each in seconds):
            yield name, node.lineno


def counted_waits(module: Module) -> Iterator[Finding]:
    """Loops that look a number of times with a pause between, and so give up soon."""
    for name, node in module.nodes():
        if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
            continue
        if getattr(node.iter.func, "id", "") != "range" or not ends_early(node):
            continue
        pauses = [
            module.number(part.args[0])
            for part in ast.walk(node)
            if isinstance(part, ast.Call) and part.args
            if getattr(part.func, "attr", "") == "sleep"
        ]
        times = module.number(node.iter.args[-1])
        if times and any(pause and pause * times < LEAST_GUARD_SECONDS for pause in pauses):
            yield name, node.lineno


def ends_early(loop: ast.For) -> bool:
    return any(isinstance(part, ast.Break | ast.Return) for part in ast.walk(loop))


def foreign_paths(module: Module) -> Iterator[Finding]:
    """Absolute paths in the text of a test: those that a test owns come from `tmp_path`."""
    formatted = [part for _, node in module.nodes() for part in rest_of_text(node)]
    for name, node in module.nodes():
        value = None
        if isinstance(node, ast.Constant) and node not in formatted:
            value = node.value
        if isinstance(value, str) and len(value) > 2 and PATH.match(value):
            yield name, node.lineno


def rest_of_text(node: ast.AST) -> list[ast.AST]:
    """What an f-string holds after its beginning: no path begins there."""
    return list(node.values[1:]) if isinstance(node, ast.JoinedStr) else []


IN = "def test(): "
RULES = [timed_comparisons, reported_times, short_guards, counted_waits, foreign_paths]
Rule = Callable[[Module], Iterator[Finding]]


@functools.cache
def findings(rule: Rule) -> list[tuple[str, str]]:
    """`file:function` and `file:line` of all that a rule finds in the tests."""
    found = [(file, *each) for file, module in modules().items() for each in rule(module)]
    return [(f"{file}:{name}", f"{file}:{line}") for file, name, line in found]


@functools.cache
def modules() -> dict[str, Module]:
    files = sorted(TESTS.rglob("*.py"))
    return {path.relative_to(TESTS).as_posix(): Module(path.read_text()) for path in files}


@pytest.mark.parametrize("rule", RULES)
def test_no_test_relies_on_the_machine(rule: Rule) -> None:
    assert [line for place, line in findings(rule) if place not in ALLOWED] == []


def test_every_exception_is_still_needed() -> None:
    found = {place for rule in RULES for place, _ in findings(rule)}
    assert set(ALLOWED) - found == set()


@pytest.mark.parametrize(
    ("rule", "source", "num_found"),
    [
        (timed_comparisons, "assert time.monotonic() - began < 2", 1),
        (timed_comparisons, f"{IN}a = perf_counter(); assert perf_counter() - a < 0.5", 1),
        (timed_comparisons, f"{IN}a = monotonic(); b = f(a); assert b == pytest.approx(2)", 1),
        (timed_comparisons, f"LIMIT = 2\n{IN}a = loop.time(); assert 1 < g() - a < LIMIT", 1),
        (timed_comparisons, f"{IN}a = time.monotonic(); assert 0 < a - b < other", 0),
        (
            timed_comparisons,
            f"{IN}a = time.monotonic(); assert len([x for x in y if x < a]) < 2",
            0,
        ),
        (timed_comparisons, "assert time.process_time() - began < 2", 0),
        (reported_times, "assert timings.total_ns - phases < 50_000_000", 1),
        (reported_times, "assert 0 < seconds(server) - total < 0.05", 1),
        (reported_times, "assert values['age_seconds'] > 0.05", 0),
        (reported_times, "assert timings.total_ns < spent", 0),
        (short_guards, "async def f(): await asyncio.wait_for(event.wait(), 2)", 1),
        (short_guards, "async def f():\n  async with asyncio.timeout(5): pass", 1),
        (short_guards, "SECONDS = 5.0\nend = time.monotonic() + SECONDS", 1),
        (short_guards, "def until(holds, seconds=3.0): pass", 1),
        (short_guards, "process.wait(10); process.wait(timeout=60)", 1),
        (counted_waits, "for _ in range(100):\n  if done: break\n  time.sleep(0.01)", 1),
        (counted_waits, "for _ in range(100):\n  time.sleep(0.01)", 0),
        (foreign_paths, 'open("/nonexistent"); call("/nanoinfer.v1.Engine/Do")', 1),
        (foreign_paths, 'Path("/proc") / "self"', 1),
    ],
)
def test_the_rules_find_what_they_are_for(rule: Rule, source: str, num_found: int) -> None:
    assert len(list(rule(Module(source)))) == num_found
