"""The choke point: nothing acts without a decision, and without a rule that allows it the decision is no."""

from ferrum.governance.acts import Act, ModelCall, ModelReply, Reply, TaskCall, ToolCall, ToolReply
from ferrum.governance.budget import Limits
from ferrum.governance.door import decide
from ferrum.governance.policy import Decision, Effect, Policy, load_policy

__all__ = [
    "Act",
    "Decision",
    "Effect",
    "Limits",
    "ModelCall",
    "ModelReply",
    "Policy",
    "Reply",
    "TaskCall",
    "ToolCall",
    "ToolReply",
    "decide",
    "load_policy",
]
