"""How a loader of vLLM's is called: its versions differ in `prefix`, and other packages wrap it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_plugin import compat


class Named:
    """From 0.15.1 on."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        return vllm_config, model_config, prefix


class Before:
    """Up to 0.14.1."""

    def load_model(self, vllm_config: Any, model_config: Any) -> Any:
        return vllm_config, model_config, "none"


class Wrapped:
    """Somebody's wrapper, which does not show what it passes on."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.loader.load_model(*args, **kwargs)


@pytest.mark.parametrize(
    ("loader", "prefix", "got"),
    [
        (Named(), "draft", "draft"),
        (Named(), "", ""),
        (Before(), "", "none"),
        (Before(), "draft", "none"),
        (Wrapped(Named()), "draft", "draft"),
        (Wrapped(Named()), "", ""),
        (Wrapped(Before()), "", "none"),
    ],
)
def test_prefix_reaches_who_takes_it(loader: Any, prefix: str, got: str) -> None:
    assert compat.load_model(loader, "configuration", "model", prefix) == ("configuration", "model", got)  # type: ignore[arg-type]
