"""The choke point: the one function that decides whether an act may be done."""

from __future__ import annotations

from typing import Any

from ferrum.governance.acts import Act
from ferrum.governance.policy import Decision, Effect, Policy


def decide(act: Act[Any], policy: Policy, grants: frozenset[str]) -> Decision:
    """Decide on an act before it is done.

    `grants` are the digests of the acts that people have said yes to. A grant answers an `ask` and is bound to all
    that the act would send; it never opens what the policy denies.
    """
    decision = policy.decide(act)
    if decision.effect is not Effect.ASK or decision.digest not in grants:
        return decision
    return Decision.on(
        act,
        Effect.ALLOW,
        f"approved {decision.digest[:12]}",
        f"a person approved exactly this {act.kind} call of {act.target!r}, which {decision.rule} asks for",
    )
