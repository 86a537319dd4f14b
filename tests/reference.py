"""What a run of a workflow comes to, by a small interpreter of the document that shares nothing with the engine.

It knows `user.work` tasks, waits, blocks, switches and workflows inside of others, with all that changes how a step is
run but time and what runs share; and expressions of references, whole numbers, comparisons, `&&`, `||` and one `? :`.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any, Final

from user_tasks import number_of

Document = Mapping[str, Any]
Scope = Mapping[str, Any]

COMPLETED, FAILED, SKIPPED = "completed", "failed", "skipped"


@dataclass(frozen=True)
class End:
    """What became of a step, or of steps that run together."""

    status: str
    output: Any = None
    #: It failed and may.
    tolerated: bool = False
    #: It was skipped because something before it failed.
    caused: bool = False
    #: Whether another try could change it.
    again: bool = True
    #: Of steps that run together: what each left.
    outputs: Mapping[str, Any] = field(default_factory=dict)
    #: The run that it was.
    runs: tuple[Expected, ...] = ()

    @property
    def broken(self) -> bool:
        return self.status == FAILED and not self.tolerated


@dataclass
class Seen:
    """What the record should say of one step."""

    status: str
    output: Any = None
    #: How often its task is run; 0 where it is no task or is not run.
    effects: int = 0
    #: Those of its siblings that are over before it begins.
    after: tuple[str, ...] = ()
    #: What each run inside it came to, by try.
    runs: list[Expected] = field(default_factory=list)
    #: It may be cancelled, or never begin: another item of the fan-out that it is in fails.
    loose: bool = False


@dataclass
class Expected:
    """What the record should say of one run."""

    status: str = COMPLETED
    outputs: Any = None
    steps: dict[str, Seen] = field(default_factory=dict)
    #: By the id of a step: what undoes it, should that be needed.
    undo: dict[str, dict[str, Seen]] = field(default_factory=dict)
    #: What ids begin with, one after the other: rounds, tries, alternatives; with how many may go on at a time.
    in_turn: list[tuple[list[str], int]] = field(default_factory=list)


def expected(document: Document, given: Mapping[str, Any]) -> Expected:
    """What a run with this input should come to."""
    run = _Run()
    end = run.body("", document["steps"], {"input": dict(given)})
    run.said.status = FAILED if end.status == FAILED else COMPLETED
    if end.status != FAILED and document.get("outputs"):
        run.said.outputs = value_of(document["outputs"], {"input": dict(given), **end.outputs})
    return run.said


_CALCULATE: Final[Mapping[type[ast.AST], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.GtE: operator.ge,
}  # fmt: skip


def value_of(value: Any, scope: Scope) -> Any:
    """A value with its expressions evaluated."""
    if isinstance(value, str) and value.startswith("{{"):
        return evaluate(value[2:-2], scope)
    if isinstance(value, list):
        return [value_of(one, scope) for one in value]
    if isinstance(value, dict):
        return {name: value_of(one, scope) for name, one in value.items()}
    return value


def evaluate(text: str, scope: Scope) -> Any:
    """An expression over these values, whose types must fit."""
    condition, asked, rest = text.partition(" ? ")
    if asked:
        yes, _, no = rest.partition(" : ")
        return evaluate(yes if evaluate(condition, scope) else no, scope)
    python = text.replace("&&", " and ").replace("||", " or ").strip()
    return _calculate(ast.parse(python, mode="eval").body, {**scope, "null": None, "true": True, "false": False})


def _calculate(node: ast.expr, scope: Scope) -> Any:  # noqa: PLR0911 - one per kind of node
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return scope[node.id]
        case ast.Attribute():
            return _calculate(node.value, scope)[node.attr]
        case ast.List():
            return [_calculate(one, scope) for one in node.elts]
        case ast.BoolOp(op=ast.And()):
            return all(_calculate(one, scope) for one in node.values)
        case ast.BoolOp(op=ast.Or()):
            return any(_calculate(one, scope) for one in node.values)
        case ast.BinOp():
            left, right = _calculate(node.left, scope), _calculate(node.right, scope)
            return _CALCULATE[type(node.op)](left, right)
        case ast.Compare(ops=[op], comparators=[other]):
            return _CALCULATE[type(op)](_calculate(node.left, scope), _calculate(other, scope))
    raise NotImplementedError(ast.dump(node))


def names_in(value: Any) -> set[str]:
    """Every word of the expressions in there; step names are words like no other."""
    if isinstance(value, str):
        return set(re.findall(r"[A-Za-z_]\w*", value))
    if isinstance(value, dict):
        # A workflow inside sees nothing of what is around it.
        return set[str]().union(*(names_in(one) for name, one in value.items() if name != "workflow"))
    return set[str]().union(*map(names_in, value)) if isinstance(value, list) else set()


def needs_of(steps: Mapping[str, Document]) -> dict[str, list[str]]:
    """For each of these steps, those beside it that come first."""
    return {name: [other for other in steps if other in names_in(step) - {name}] for name, step in steps.items()}


def _forward(needs: Mapping[str, Sequence[str]]) -> Iterator[str]:
    return TopologicalSorter(needs).static_order()


class _Run:
    def __init__(self) -> None:
        self.said = Expected()
        #: What runs alone in a frame, and is called as that is.
        self._alone: set[str] = set()

    def body(self, frame: str, steps: Mapping[str, Document], scope: Scope, output: Any = None) -> End:
        """Steps that run together, each once those before it are over."""
        needs = needs_of(steps)
        ends: dict[str, End] = {}
        prefix = f"{frame}." if frame else ""
        for name in _forward(needs):
            before = [ends[need] for need in needs[name]]
            ends[name] = self._in_its_place(prefix + name, steps[name], scope, ends, before)
            self.said.steps[prefix + name].after = tuple(prefix + need for need in needs[name])
        if any(end.broken for end in ends.values()):
            return End(FAILED)
        outputs = {name: end.output for name, end in ends.items()}
        if output is not None:
            return End(COMPLETED, value_of(output, {**scope, **outputs}), outputs=outputs)
        last = [name for name in steps if not any(name in before for before in needs.values())]
        left = outputs[last[0]] if len(last) == 1 else {name: outputs[name] for name in last}
        return End(COMPLETED, left, outputs=outputs)

    def _in_its_place(
        self, id: str, step: Document, scope: Scope, ends: Mapping[str, End], before: Sequence[End]
    ) -> End:
        if any(end.broken or end.caused for end in before):
            return self._leave(id, End(SKIPPED, caused=True))
        if before and all(end.status == SKIPPED for end in before):
            return self._leave(id, End(SKIPPED))
        return self._whole(id, step, {**scope, **{name: end.output for name, end in ends.items()}})

    def _leave(self, id: str, end: End, **more: Any) -> End:
        self.said.steps[id] = Seen(end.status, end.output, **more)
        return end

    def _whole(self, id: str, step: Document, scope: Scope) -> End:
        """The step with everything that was written for it."""
        if "when" in step and not evaluate(step["when"], scope):
            return self._leave(id, End(SKIPPED))
        end = self._each(id, step, scope) if "for_each" in step else self._recovering(id, step, scope)
        if step.get("on_error") == "continue" and end.status == FAILED:
            return End(FAILED, tolerated=True)
        return end

    def _each(self, id: str, step: Document, scope: Scope) -> End:
        items = value_of(step["for_each"], scope)
        if not isinstance(items, list):
            return self._leave(id, End(FAILED))
        called = step.get("as", "item")
        counted = "index" if called == "item" else f"{called}_index"
        ends = [
            self._inside(f"{id}.{number}", step, {**scope, called: item, counted: number}, self._recovering)
            for number, item in enumerate(items)
        ]
        window = step.get("max_parallel", len(items))
        self.said.in_turn.append(([f"{id}.{number}" for number in range(len(items))], window))
        if step.get("on_error") == "collect":
            collected = [
                {"error": "", "index": number} if end.status == FAILED else end.output
                for number, end in enumerate(ends)
            ]
            return self._leave(id, End(COMPLETED, collected))
        if any(end.status == FAILED for end in ends):
            self._loosen(f"{id}.")
            return self._leave(id, End(FAILED))
        return self._leave(id, End(COMPLETED, [end.output for end in ends]))

    def _loosen(self, prefix: str) -> None:
        for id, seen in self.said.steps.items():
            seen.loose |= id.startswith(prefix)

    def _inside(self, frame: str, step: Document, scope: Scope, rest: Callable[[str, Document, Scope], End]) -> End:
        """In a frame of its own: the steps of a block that is nothing else, or `rest` of the step."""
        if _is_plain(step, rest.__name__):
            return self.body(frame, step["steps"], scope, step.get("output"))
        self._alone.add(frame)
        end = rest(frame, step, scope)
        return End(COMPLETED, end.output) if end.status != FAILED or end.tolerated else end

    def _recovering(self, id: str, step: Document, scope: Scope) -> End:
        """What has a fallback and can be undone: all rounds, or the step."""
        end = self._rounds(id, step, scope) if "repeat" in step else self._tries(id, step, scope)
        left = self.said.steps[id]
        frames = [id]
        for number, other in enumerate(step.get("fallback", ()), 1):
            if end.status == FAILED:
                frames.append(f"{id}.fallback{number}")
                end = self._inside(frames[-1], other, {**scope, "error": "some text"}, self._whole)
        if len(frames) > 1:
            self.said.in_turn.append((frames[1:], 1))
            left.status, left.output = end.status, end.output
        if end.status == COMPLETED and "compensate" in step:
            self._undo(id, step, {**scope, "output": end.output})
        return end

    def _undo(self, id: str, step: Document, scope: Scope) -> None:
        if "repeat" not in step:
            scope = {**scope, "params": {"input": value_of(step.get("input"), scope)}}
        apart = _Run()
        apart._recovering(f"{id}.compensate", step["compensate"], scope)
        self.said.undo[id] = apart.said.steps
        self.said.in_turn += apart.said.in_turn

    def _rounds(self, id: str, step: Document, scope: Scope) -> End:
        repeat, previous = step["repeat"], None
        for number in range(1, repeat["max"] + 1):
            inside = {**scope, "round": number, "previous": previous}
            end = self._inside(f"{id}.{number}", step, inside, self._tries)
            if end.status == FAILED:
                break
            over = evaluate(repeat["until"], {**inside, **end.outputs, _name(id): end.output})
            if over or (number == repeat["max"] and repeat.get("on_max") == "pass"):
                break
            previous, end = end.output, End(FAILED)
        self.said.in_turn.append(([f"{id}.{one}" for one in range(1, number + 1)], 1))
        return self._leave(id, End(end.status, end.output))

    def _tries(self, id: str, step: Document, scope: Scope) -> End:
        most = step.get("retry", {}).get("max_attempts", 1)
        runs: list[Expected] = []
        for number in range(1, most + 1):
            frame = f"{id}.{number}" if most > 1 or id in self._alone else id
            end = self._once(id, step, scope, number, frame)
            runs += end.runs
            if end.status != FAILED or not end.again:
                break
        if most > 1 and _kind(step) == "block":
            self.said.in_turn.append(([f"{id}.{one}" for one in range(1, number + 1)], 1))
        acted = number if _kind(step) == "task" else 0
        return self._leave(id, End(end.status, end.output), effects=acted, runs=runs)

    def _once(self, id: str, step: Document, scope: Scope, number: int, frame: str) -> End:
        match _kind(step):
            case "task":
                return _work(id, value_of(step["input"], scope), number)
            case "wait":
                return End(FAILED, again=False) if "signal" in step else End(COMPLETED)
            case "block":
                return self.body(frame, step["steps"], scope, step.get("output"))
            case "switch":
                return self._switch(id, step, scope)
            case "workflow":
                run = expected(step["workflow"], value_of(step.get("input", {}), scope))
                return End(run.status, run.outputs, runs=(run,))
        raise NotImplementedError(step)

    def _switch(self, id: str, step: Document, scope: Scope) -> End:
        value = value_of(step["value"], scope)
        text = value if isinstance(value, str) else json.dumps(value)
        if text in step["cases"]:
            number = list(step["cases"]).index(text) + 1
            label = text if text.isidentifier() else f"case{number}"
            return self._inside(f"{id}.{label}", step["cases"][text], scope, self._whole)
        if "default" in step:
            return self._inside(f"{id}.default", step["default"], scope, self._whole)
        return End(SKIPPED)


def _kind(step: Document) -> str:
    return str(step.get("type", "block"))


def _name(id: str) -> str:
    """What a step is called by its author: the last part of its id that is no number."""
    return [part for part in id.split(".") if not part.isdigit()][-1]


def _is_plain(step: Document, rest: str) -> bool:
    """Whether what is left of the step is a block and nothing else: then its frame is the block."""
    left = {"retry"}
    if rest in ("_recovering", "_whole"):
        left |= {"repeat", "fallback", "compensate"}
    if rest == "_whole":
        left |= {"for_each", "when", "on_error"}
    return _kind(step) == "block" and not left & step.keys()


def _work(id: str, given: Document, number: int) -> End:
    if given.get("fail") or number <= given.get("fail_tries", 0):
        return End(FAILED)
    if "fail_rounds" in given and int(id.split(".")[-2]) <= given["fail_rounds"]:
        return End(FAILED)
    return End(COMPLETED, number_of(given.get("values")))
