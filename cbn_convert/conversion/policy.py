"""What becomes of a norm layer, as a function of what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..norm import OutputChannels, Window
from ..norm.producers import applies_stored_weight, groups_of, is_transposed, out_channels, plain_class
from .report import NOT_REACHED, Status
from .trace import OWN_FORWARD, NormCall


@dataclass(frozen=True)
class LayerFacts:
    """What the decision about a layer depends on.

    Args:
        call: how the trace reached it.
        outputs: the channels that feed it, where they are outputs of modules.
        in_part_of_group: whether it synchronises over some processes only.
        watched: whether hooks of others look at it or at what feeds it.
        is_new: whether it has no statistics worth keeping.
        has_statistics: whether it has running statistics at all.
        shared: whether another norm layer sees the same outputs.
    """

    call: NormCall
    outputs: tuple[OutputChannels, ...]
    in_part_of_group: bool
    watched: bool
    is_new: bool
    has_statistics: bool
    shared: bool


class Decision(NamedTuple):
    """status and reason as in `ReportRow`; window: what the layer is to normalise by.

    folded: whether what feeds the layer is to apply it in training, as soon as there are statistics to carry.
    """

    status: Status
    reason: str
    window: Window
    folded: bool = False


# Layers without a weight of their own need statistics of at least so many images to normalise by them alone.
LEAST_CARRIED_IMAGES = 64


def decide(facts: LayerFacts, window: Window) -> Decision:
    """What becomes of a layer for which `window` is asked."""
    status, reason = _status(facts, window)
    if status == "kept":
        return Decision(status, reason, window)
    if status == "window" and window.is_carried and not window.is_fixed and window.size < LEAST_CARRIED_IMAGES:
        window = replace(window, history="ring", size=2)
    if status == "window":
        return Decision(status, reason, window.without_weight())
    against = _against_folding(facts, window)
    if against is not None:
        return Decision(status, f"{reason}, not folded: {against}", window)
    new = facts.is_new and not window.is_fixed
    when = "new: averages its batches, folded once it has statistics" if new else "trains folded"
    return Decision(status, f"{reason}, {when}", window, True)


def _status(facts: LayerFacts, window: Window) -> tuple[Status, str]:
    call, outputs = facts.call, facts.outputs
    if call.calls == 0:
        return "kept", NOT_REACHED
    if call.calls > 1:
        why = ", one history cannot serve all"
        if call.split:
            why = f" for {call.samples} samples, a part of them each time; a smaller example_input shows it called once"
        return "kept", f"called {call.calls} times per forward pass{why}"
    if facts.in_part_of_group:
        return "kept", "synchronises over a part of the processes only"
    if window.is_fixed and not facts.has_statistics:
        return "kept", "it has no running statistics that could be fixed"
    if not outputs:
        known = "" if call.origin.endswith(OWN_FORWARD) else ", not directly from a conv or linear layer"
        return "window", f"input comes from {call.origin}{known}"
    kinds = " and ".join(dict.fromkeys(plain_class(output.module).__name__ for output in outputs))
    if call.producer_calls > 1:
        fed_by = ", ".join(dict.fromkeys(part.module for part in call.parts))
        return "window", f"{kinds} {fed_by} runs {call.producer_calls} times per forward pass"
    if any(not o.whole and (groups_of(o.module) > 1 or is_transposed(o.module)) for o in outputs):
        return "window", f"fed by some channels of a {kinds} with groups or transposed"
    if window.compensation == "none" and not window.is_fixed:
        return "window", "compensation is off"
    if len(outputs) > 1:
        return "compensated", f"fed by a concatenation of {len(outputs)} {kinds}"
    if not outputs[0].whole:
        return "compensated", f"fed by {outputs[0].channels} of {out_channels(outputs[0].module)} channels of {kinds}"
    return "compensated", f"fed by {kinds}"


def _against_folding(facts: LayerFacts, window: Window) -> str | None:
    """Why the module in front cannot apply a compensated layer in training; None if it can."""
    if not window.is_carried:
        return "a ring of iterations"
    if len(facts.outputs) > 1 or not facts.outputs[0].whole:
        return "not one whole module"
    if not applies_stored_weight(facts.outputs[0].module):
        return "its weight is not applied as it is stored"
    if facts.shared or facts.call.consumers > 1:
        return "its output goes elsewhere, too"
    if facts.watched:
        return "a hook looks at it"
    return None
