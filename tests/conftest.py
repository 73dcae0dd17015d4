"""Every test runs with the shapes and types of the signatures checked, and on one thread."""

import torch
from jaxtyping import install_import_hook

install_import_hook("rediffuse", "beartype.beartype")
torch.set_num_threads(1)  # what is this small only waits for a second thread
