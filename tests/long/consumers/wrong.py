"""Mistakes that a type checker finds before the program runs: one on each line marked so, and no other."""

from adaptive_fusion import AdaptiveRunner, Budget, OperatingPoint

OperatingPoint(fusion="nope")  # wrong
OperatingPoint("native", 5)  # wrong
OperatingPoint(adapter_rank=3)  # wrong
OperatingPoint(downsample="half")  # wrong
OperatingPoint(levels=3)  # wrong


def ask(runner: AdaptiveRunner) -> str:
    runner.chatt(None, "?")  # wrong
    runner.eval().decidee(None, "?")  # wrong
    runner.chat(None, "?", point="native")  # wrong
    runner.chat(None, "?", budget=Budget(latency=3))  # wrong
    runner.budgett = Budget()  # wrong
    return runner.chat(None, "?")  # wrong
