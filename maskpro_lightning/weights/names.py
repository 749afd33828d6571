"""Names of weights, the same under every wrapper and strategy."""

from __future__ import annotations

# What PyTorch's wrappers insert into names.
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def clean_name(name: str) -> str:
    """A parameter's or module's name without what PyTorch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def joined(module_name: str, parameter_name: str) -> str:
    """A parameter's name from its module's and its own, as :func:`clean_name`."""
    return clean_name(f"{module_name}.{parameter_name}".removeprefix("."))
