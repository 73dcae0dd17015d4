"""Every test runs with the shapes and types of the signatures checked."""

from jaxtyping import install_import_hook

install_import_hook("rediffuse", "beartype.beartype")
