"""Workflows built in Python: functions and steps, put together by `>>` (then), `|` (beside) and what goes around them.

    flow = fetch >> (summarise | classify) >> merge

What is built is a `Workflow` like any other, and `ferrum.submit` takes it as it is. Data flows as in the composition of
functions:

- The first steps are called with the run's inputs of the names of their parameters, which so are the workflow's inputs.
- Every other one is called with the outputs of what is before it, in their order: `merge(summary, kind)`. One without
  parameters is called with nothing and only comes after.
- The outputs of `a >> b` are those of `b`; those of `a | b` are those of `a`, then those of `b`.
- What something is put around (`Retry(a | b)`, `.named`, `.with_`, …) is one step and has one output: of several it is
  a mapping, by the names of the steps.

Python binds `>>` tighter than `|`, as it does arithmetic: `a >> b | c >> d` is `(a >> b) | (c >> d)`. Put parentheses
around what is beside: `a >> (b | c) >> d`. In Celery `|` means "then"; here it never does, and a Celery signature is
not taken.
"""

from __future__ import annotations

from ferrum.primitives.around import (
    Conditional,
    Fallback,
    Retry,
    Router,
    Saga,
    Switch,
    Timeout,
    cached,
    for_each,
    repeat,
)
from ferrum.primitives.flow import Flow, Parallel, Sequential
from ferrum.primitives.steps import approval, llm, step, step_of, task, tool, wait

__all__ = [
    "Conditional",
    "Fallback",
    "Flow",
    "Parallel",
    "Retry",
    "Router",
    "Saga",
    "Sequential",
    "Switch",
    "Timeout",
    "approval",
    "cached",
    "for_each",
    "llm",
    "repeat",
    "step",
    "step_of",
    "task",
    "tool",
    "wait",
]
