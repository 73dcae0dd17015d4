"""Every test runs with the shapes and types of the signatures checked, and on one thread."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("rediffuse", "beartype.beartype")
torch.set_num_threads(1)  # what is this small only waits for a second thread


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without these checks, for thousands of equal calls that other tests have checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
