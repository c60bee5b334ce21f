"""A policy's ladders where only pixels and frames can be chosen, as in front of somebody else's engine.

What pools the tokens of all pixels becomes the share of the pixels that has as many tokens. What pools those of an
image that is smaller already keeps the pixels of that: with fewer than a policy has ever seen judged, nobody knows what
is lost. How levels are fused, and whether blank parts are encoded once, is left to the model; where a lane begins with
weights that were trained for few pixels, it begins with a share of them that does without.
Knows policies and rungs. Must not know of models or engines.
"""

from dataclasses import replace

from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.rungs import Rung

UNTRAINED = 0.4
"""Share of the pixels with which a lane begins whose first step has at most `FEW` of them and fuses levels by trained
weights. On 589 simple screens of seeds that were looked at the reference model's own fusion keeps 1.01 (1.00-1.03) of
its quality with a quarter of the pixels, and 1.03 (1.01-1.04) with half; what is taken lies between."""
FEW = 0.5


def projected(policy: Policy) -> tuple[Policy, str]:
    """The policy with ladders of pixels and frames, and in words what of it cannot be had; empty where all can."""
    names: dict[str, str] = {}
    lanes, lost = {}, set[str]()
    for lane, ladder in policy.lanes.items():
        steps: dict[str, Rung] = {}
        for rung in ladder:  # the best first: of two that become one it gives the quality
            step = on_pixels(rung)
            trained = policy.fusion_weights and rung.point.fusion != NATIVE.fusion
            if rung is ladder[0] and trained and step.pixel_share <= FEW:
                step = replace(step, pixel_share=UNTRAINED)
            steps.setdefault(step.name, step)
            names.setdefault(rung.name, step.name)
            lost |= {
                knob
                for knob in ("fusion", "layers", "adapter_rank", "downsample", "blanks")
                if getattr(rung.point, knob) != getattr(NATIVE, knob)
            }
        lanes[lane] = tuple(steps.values())
    if not lost:
        return policy, ""
    escalation = policy.escalation
    if escalation is not None:
        thresholds = {names.get(rung, rung): kinds for rung, kinds in escalation.thresholds.items()}
        first = {
            lane: {kind: names.get(rung, rung) for kind, rung in kinds.items()}
            for lane, kinds in escalation.first.items()
        }
        # For what steps without their weights need not be asked is not known.
        escalation = replace(escalation, thresholds=thresholds, sure={}, first={} if policy.fusion_weights else first)
    said = f"{policy.name}'s {', '.join(sorted(lost))} cannot be had upstream: its ladder is one of pixels and frames"
    cheap = names.get(policy.cheap, on_pixels(policy.cheap_rung).name) if policy.cheap else ""
    return replace(policy, lanes=lanes, cheap=cheap, escalation=escalation, fusion_weights=()), said


def on_pixels(rung: Rung) -> Rung:
    """The same step with the model's own fusion and without pooling, which fewer pixels stand for if it is all there
    is."""
    pixels = rung.point.max_pixels
    point = replace(NATIVE, max_pixels=pixels, max_fps=rung.point.max_fps)
    whole = rung.pixel_share == 1.0 and pixels is None
    return Rung(point, rung.quality, rung.point.downsample**2 if whole else rung.pixel_share)
