# SPDX-License-Identifier: Apache-2.0
"""Chat messages to one prompt, by the Jinja template inside the model file.

The variables are those that Hugging Face's transformers gives to chat
templates.  How the template is run (sandbox.py) and tokens do not live here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spanker.errors import TemplateError
from spanker.ggml.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 1 << 18
MAX_MESSAGES = 1 << 14


class ChatTemplate:
    """A compiled chat template.

    Raises `TemplateError` (one line) for a template that does not compile, and
    from `render` for one that fails, refuses the messages or exceeds a limit.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} "
                "are allowed"
            )
        self.source = source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        from spanker.ggml.sandbox import SandboxedTemplate  # see there why only now

        self._template = SandboxedTemplate(source)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], tokenizer: Tokenizer) -> ChatTemplate:
        """The template under `tokenizer.chat_template`; `TemplateError` if there is none."""
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            raise TemplateError(
                "the model has no chat template (tokenizer.chat_template); "
                "give it a plain prompt instead of messages"
            )
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
        return cls(
            source,
            bos_token="" if bos_id is None else tokenizer.token_text(bos_id),
            eos_token="" if eos_id is None else tokenizer.token_text(eos_id),
        )

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text for `messages`, each with the strings "role" and "content".

        Other string items of a message are passed on to the template.
        """
        return self._template.render(
            {
                **self._variables,
                "messages": _check(messages),
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            }
        )


def _check(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"messages is a {type(messages).__name__}, expected a list of messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise TemplateError(f"{len(messages)} messages, expected 1..{MAX_MESSAGES}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"message {index} is a {type(message).__name__}, expected an object with "
                "'role' and 'content'"
            )
        for key in ("role", "content", *message):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                raise TemplateError(
                    f"message {index}: {str(key)[:40]!r} is {found}, expected a string"
                )
    return [dict(message) for message in messages]
