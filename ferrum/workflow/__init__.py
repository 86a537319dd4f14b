"""The spec: what an author may write, in YAML, JSON or Python; text in, value or error with line and column out."""

from ferrum.workflow.parts import COMMON, labels
from ferrum.workflow.schema import workflow_schema
from ferrum.workflow.spec import (
    Budget,
    Cache,
    Concurrency,
    Defaults,
    Duration,
    InputSpec,
    Rate,
    Repeat,
    Retry,
    Route,
    Step,
    Timeout,
    Workflow,
    inner_needs,
    seconds,
)
from ferrum.workflow.text import Format

__all__ = [
    "COMMON",
    "Budget",
    "Cache",
    "Concurrency",
    "Defaults",
    "Duration",
    "Format",
    "InputSpec",
    "Rate",
    "Repeat",
    "Retry",
    "Route",
    "Step",
    "Timeout",
    "Workflow",
    "inner_needs",
    "labels",
    "seconds",
    "workflow_schema",
]
