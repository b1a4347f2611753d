"""Chat prompts of templates that would print today's date, or draw at random."""

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import InputError
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.sharing_lm import SharingLM
from pipeline.models.chat import chat_ids, check_chat_template
from pipeline.testbed.tokenizer import train_tokenizer

LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "1 Jan 1900" %}{%- endif %}{%- endif %}'
    '{{- "Today Date: " + date_string + "\n" }}'
    '{%- for message in messages %}{{- message.role + ": " + message.content + "\n" }}{%- endfor %}'
    '{%- if add_generation_prompt %}{{- "assistant: " }}{%- endif %}'
)
"""How Llama 3.2's template gets its date."""


@pytest.fixture
def dated() -> Any:
    tokenizer = train_tokenizer(["a text about numbers and dates 0123456789"], 300)
    tokenizer.chat_template = LLAMA_3_2
    return tokenizer


def test_a_template_that_prints_the_date_prints_the_same_one_in_generation_and_in_tasks(
    dated: Any, tmp_path: Any
) -> None:
    today = dated.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "26 Jul 2024" not in today  # the template does print the date
    expected = "Today Date: 26 Jul 2024\nuser: hi\nassistant: "
    assert dated.decode(chat_ids(dated, "hi")) == expected
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(dated), num_attention_heads=1, **sizes)
    answers = FinishedAnswers(b"", tmp_path, None)
    model = SharingLM(LlamaForCausalLM(config).eval(), dated, 64, answers)
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('a system message first') }}", "fails on .*: a system message first"),
        ("{% for message in", "fails on one message of a user"),
        ("{{ ['hi', 'hello'] | random }}{{ messages[0].content }}", "uses Jinja's random"),
        ({"tool_use": "{{ messages }}"}, "multiple chat templates with no default"),
    ],
)
def test_an_unusable_template_is_an_error_with_the_reason(
    dated: Any, template: Any, message: str
) -> None:
    check_chat_template(dated, "prompt", "chat")
    dated.chat_template = template
    with pytest.raises(InputError, match=f"prompt: 'chat'.*{message}"):
        check_chat_template(dated, "prompt", "chat")
