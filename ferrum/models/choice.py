"""Which model is called where a step names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ferrum.errors import SettingsError
from ferrum.settings import Settings

#: The first variable that is set decides.
DEFAULTS: Final = {
    "ANTHROPIC_API_KEY": "anthropic/claude-sonnet-5-5",
    "OPENAI_API_KEY": "openai/gpt-5.6-terra",
    "OLLAMA_HOST": "ollama/llama3.2",
    "OLLAMA_API_BASE": "ollama/llama3.2",
}

#: Where Ollama listens when nothing says otherwise.
_OLLAMA_PORT: Final = 11434


def default_model(settings: Settings, environ: Mapping[str, str]) -> str:
    """The model of the settings, else the one that goes with the provider's key or address in the environment.

    Raises `SettingsError` where nothing says which.
    """
    if settings.model:
        return settings.model
    for variable, model in DEFAULTS.items():
        if environ.get(variable):
            return model
    raise SettingsError(
        "no model to call: name one in the step, such as 'openai/gpt-5.6-terra', or set FERRUM_MODEL, or one of "
        "ANTHROPIC_API_KEY, OPENAI_API_KEY and OLLAMA_HOST"
    )


def ollama_base(environ: Mapping[str, str]) -> str | None:
    """The address that Ollama's own clients would take from `OLLAMA_HOST`, as a URL; `None` where it is not set.

    It may be a host, a host and port, or a URL. litellm looks only at `OLLAMA_API_BASE`, which is a URL.
    """
    host = environ.get("OLLAMA_HOST", "").strip().rstrip("/")
    if not host:
        return None
    if "://" in host:
        return host
    has_port = host.rpartition(":")[2].isdigit() and not host.endswith("]")
    return f"http://{host}" if has_port else f"http://{host}:{_OLLAMA_PORT}"
