"""A context that is no language model: a small vision transformer with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

SIDE = 32


def load_vit(width: int = 64, n_layers: int = 2) -> Any:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=SIDE,
        patch_size=8,
        num_labels=10,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()


def images(n: int) -> pd.DataFrame:
    """Images as flat lists of numbers."""
    rng = np.random.default_rng(0)
    pixels = rng.random((n, 3 * SIDE * SIDE), dtype=np.float32)
    return pd.DataFrame({"id": range(n), "pixels": list(pixels)})


def labels(frame: pd.DataFrame, model: Any) -> pd.DataFrame:
    """The label of each image."""
    pixels = torch.tensor(np.stack(frame["pixels"].tolist())).view(-1, 3, SIDE, SIDE)
    with torch.inference_mode():
        found = model(pixel_values=pixels).logits.argmax(-1)
    return frame[["id"]].assign(label=found.numpy())
