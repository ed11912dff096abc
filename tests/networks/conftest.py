"""One thread for tiny networks: two that wait for each other on a busy machine take longer than one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
