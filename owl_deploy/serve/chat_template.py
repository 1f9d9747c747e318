"""A conversation as the text that the model was trained to answer: the artifact's own chat template."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from owl_deploy.errors import UnsupportedModelError

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled template. It runs in jinja2's sandbox: it comes with the artifact, and is no code of ours."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        # Block handling and names as transformers gives them to templates, which are written for that.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template: Template = environment.from_string(source)
        self._special_tokens = special_tokens

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of an artifact; None where it has none.

        Raises:
            UnsupportedModelError: it cannot be read or is no template.
        """
        try:
            configuration = _configuration(folder / "tokenizer_config.json")
            file = folder / "chat_template.jinja"
            source = file.read_text(encoding="utf-8") if file.is_file() else configuration.get("chat_template")
            if isinstance(source, list):  # several by name
                source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
            return cls(source, _special_tokens(configuration)) if isinstance(source, str) else None
        except (OSError, ValueError, KeyError, TypeError, TemplateError) as error:
            raise UnsupportedModelError(f"the chat template of {folder} cannot be used: {error}") from error

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Return the text of a conversation, ending where the assistant's answer begins.

        Raises:
            ValueError: the template refuses this conversation.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except Exception as error:  # a template may do anything with what a client sent
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _configuration(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _special_tokens(configuration: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = configuration.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        found[name] = content if isinstance(content, str) else ""
    return found


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own would escape for HTML


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
