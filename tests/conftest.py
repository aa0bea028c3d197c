"""What every test shares: no network, no display, a fixed number of threads, fixed seeds, and where the real data is."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # sums depend on the number in their last bits, and on shared cores threads wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random numbers, alone or in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (``ptb``, ``mnist``, ...)."""
    folder = os.environ.get("MMVAE_TEST_DATA")
    if not folder:
        pytest.skip("MMVAE_TEST_DATA is unset: it names the folder that holds ptb, mnist, eurosat, ...")
    if not Path(folder).is_dir():
        pytest.fail(f"MMVAE_TEST_DATA={folder} is not a folder")
    return Path(folder)
