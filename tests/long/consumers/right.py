"""What a typed program does with the library: no complaint."""

import torch
from PIL import Image

from adaptive_fusion import AdaptiveRunner, Budget, OperatingPoint, Policy, measure_complexity
from adaptive_fusion.errors import AdaptiveFusionError

runner: AdaptiveRunner = AdaptiveRunner.from_pretrained(
    "reference", policy=Policy.load("reference-balanced"), revision="main"
)
runner = runner.eval().to("cpu", torch.float32).requires_grad_(False)
device: torch.device = runner.device
runner.generation_config = None
point = OperatingPoint("weighted", layers=6, downsample=0.5, adapter_rank=4)
picture = Image.new("RGB", (64, 64))
try:
    reply = runner.chat(picture, "Describe.", budget=Budget(latency_ms=400), point=point, do_sample=False)
    text: str = reply.text
except AdaptiveFusionError as error:
    text = str(error)
for piece in runner.stream(picture, "Describe."):
    text += piece
with runner.native() as same:
    text += same.decide(picture).explain()
score: float = measure_complexity(picture).score
