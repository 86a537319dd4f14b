"""The spec: what an author may write, in YAML, JSON or Python; text in, value or error with line and column out."""

from ferrum.workflow.check import COMMON
from ferrum.workflow.schema import workflow_schema
from ferrum.workflow.spec import Budget, Defaults, Duration, InputSpec, Retry, Step, Timeout, Workflow, seconds
from ferrum.workflow.text import Format

__all__ = [
    "COMMON",
    "Budget",
    "Defaults",
    "Duration",
    "Format",
    "InputSpec",
    "Retry",
    "Step",
    "Timeout",
    "Workflow",
    "seconds",
    "workflow_schema",
]
