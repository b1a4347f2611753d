import pytest
import torch
import transformers

from pipeline.generation.decoding_attention import GROUPED_SDPA, grouped_queries

CONFIG = transformers.LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="sdpa",
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_step_gives_the_logits_of_one_pass_over_the_whole_text(
    dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    ids = torch.randint(3, 97, (4, 20))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[3, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        oracle = model.double()(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        model.to(dtype)
        asked = {"attention_mask": mask, "position_ids": positions}
        cache = model(
            ids[:, :-1], **{name: value[:, :-1] for name, value in asked.items()}, use_cache=True
        ).past_key_values
        with grouped_queries(model):
            assert model.config._attn_implementation == GROUPED_SDPA
            step = model(
                ids[:, -1:],
                attention_mask=mask,
                position_ids=positions[:, -1:],
                past_key_values=cache,
            ).logits[:, -1]
    assert model.config._attn_implementation == "sdpa"
    assert (step.double() - oracle).abs().max() < tolerance * oracle.abs().max()


def test_other_kinds_of_attention_are_left_as_they_are() -> None:
    config = transformers.LlamaConfig.from_dict(CONFIG.to_dict(), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    with grouped_queries(model):
        assert model.config._attn_implementation == "eager"
