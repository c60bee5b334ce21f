"""The embedded reference model, a real and very small Qwen3-VL, and the synthetic screens it was trained on."""

from pathlib import Path


def model_path() -> Path:
    """Folder of the reference model in Hugging Face format; ``from_pretrained`` of transformers loads it."""
    return Path(__file__).parent / "model"
