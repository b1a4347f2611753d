"""Chat prompts that do not depend on the day."""

import datetime
from typing import Any

import jinja2

from pipeline.errors import InputError

CHAT_DATE = datetime.datetime(2024, 7, 26)
"""Today, for every chat template: the date that Llama 3's templates print by default."""

_RANDOM = {"random", "lipsum"}
"""Jinja's filter and its function that draw at random."""


def _fixed_date(form: str) -> str:
    return CHAT_DATE.strftime(form)


TEMPLATE_ARGUMENTS = {"strftime_now": _fixed_date}
"""Arguments of every `apply_chat_template`. Without them a template may print today's date, which
is in no key."""


def chat_ids(tokenizer: Any, message: str) -> list[int]:
    """Return the token ids of a chat with one message from the user, up to the answer."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        return_dict=True,
        **TEMPLATE_ARGUMENTS,
    )
    return list(chat["input_ids"])


def check_chat_template(tokenizer: Any, field: str, value: object) -> None:
    """Check that a tokenizer has a chat template that always gives the same prompt.

    Args:
        field: the field of the grid that asks for it.
        value: the field's value.

    Raises:
        InputError: if there is no chat template, or it fails or draws at random.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        remedy = "the tokenizer has no chat template: leave it out, or take a chat model"
        raise InputError(field, value, remedy)
    try:
        chat_ids(tokenizer, "a")
        template = tokenizer.get_chat_template()
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = f"the tokenizer's chat template fails on one message of a user: {reason}"
        raise InputError(field, value, remedy) from error
    words = {word for _, kind, word in jinja2.Environment().lex(template) if kind == "name"}
    if words & _RANDOM:
        remedy = f"the chat template uses Jinja's {min(words & _RANDOM)}: no two prompts are alike"
        raise InputError(field, value, remedy)
