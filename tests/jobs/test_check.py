from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from jobs.check import check_plan
from jobs.grid import Grid
from jobs.plan import make_plan
from pipeline.errors import InputError
from tests.pipeline.models.families import model_of
from tests.pipeline.tiny_models import UNEVEN

Content = dict[str, Any]
Load = Callable[[Content], Grid]


@pytest.fixture
def uneven(tmp_path: Path) -> dict[str, str]:
    """A model of four layers with 9,728, 12,800, 9,728 and 12,800 weights."""
    folder = tmp_path / "uneven"
    transformers.AutoModelForCausalLM.from_config(UNEVEN).save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="b")
    tokenizer.save_pretrained(folder)
    return {"kind": "local-model", "path": str(folder)}


def checked(content: Content, load: Load, allocation: object, sparsity: object = 0.5) -> list[str]:
    cells = {"calibration": "true", "pruner": "wanda", "seed": 0}
    content["cells"] |= {**cells, "allocation": allocation, "sparsity": sparsity}
    return check_plan(make_plan(load(content)))


def hand(*sparsities: float) -> dict[str, object]:
    return {"name": "by-hand", "sparsities": list(sparsities)}


def test_allocations_that_fit_the_model_pass(content: Content, load: Load) -> None:
    progression = {"name": "arithmetic-progression", "difference": 0.1}
    assert checked(content, load, ["owl", progression, hand(0.4, 0.6)]) == []


@pytest.mark.parametrize(
    ("allocation", "sparsity", "message"),
    [
        (hand(0.4, 0.5, 0.6), 0.5, r"sparsities.*model testbed: has 3 entries.*2 decoder layers"),
        (hand(0.4, 0.5), 0.5, r"sparsities.*model testbed: their mean is 0\.450000"),
        (
            {"name": "arithmetic-progression", "difference": 0.9},
            0.7,
            r"difference: 0\.9: model testbed: .*take less than 0\.6",
        ),
        ("owl", "4:4", r"pattern: '4:4': model testbed: .*take uniform"),
    ],
)
def test_an_allocation_that_does_not_fit_the_model_is_found_before_anything_runs(
    content: Content, load: Load, allocation: object, sparsity: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        checked(content, load, allocation, sparsity)


def test_layers_are_weighted_by_their_sizes_in_the_configuration(
    content: Content, load: Load, uneven: dict[str, str]
) -> None:
    content["models"]["testbed"] = uneven
    weighted = (0.4 * 2 * 9728 + 0.6 * 2 * 12800) / (2 * 9728 + 2 * 12800)
    with pytest.raises(InputError, match=f"model testbed: their mean is {weighted:.6f}"):
        checked(content, load, hand(0.4, 0.6, 0.4, 0.6))
    with pytest.raises(InputError, match="has 3 entries, but the model has 4 decoder layers"):
        checked(content, load, hand(0.4, 0.5, 0.6))


def test_a_model_whose_layers_share_weights_is_refused_before_anything_runs(
    content: Content, load: Load, uneven: dict[str, str]
) -> None:
    model = model_of("zamba2")
    model.save_pretrained(uneven["path"])
    content["models"]["testbed"] = uneven
    with pytest.raises(InputError, match=r"belongs to decoder layers 1 and 2"):
        checked(content, load, "uniform")


def test_a_task_that_generates_needs_a_model_in_memory(
    content: Content, load: Load, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "writes.yaml").write_text("task: writes\noutput_type: generate_until\n")
    (tmp_path / "tasks" / "chooses.yaml").write_text("task: chooses\noutput_type: loglikelihood\n")
    own = {"kind": "local-tasks", "path": str(tmp_path / "tasks")}
    content["evaluate"] |= {"task_folder": own, "tasks": ["chooses", "writes"]}
    check_plan(make_plan(load(content)))
    content["resources"] = {"evaluate": {"memory_bytes": 700_000}}  # of 656,640 at most 80 %
    with pytest.raises(InputError, match=r"evaluate\.tasks: 'writes': generates, .* vllm, raise"):
        check_plan(make_plan(load(content)))
    content["evaluate"]["tasks"] = ["chooses"]
    check_plan(make_plan(load(content)))


def test_a_chat_needs_a_model_with_a_template(
    content: Content, load: Load, uneven: dict[str, str]
) -> None:
    own = content["calibrations"]["own"] | {"prompt": "chat"}
    content["calibrations"]["own"] = own
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    with pytest.raises(InputError, match="prompt: 'chat': model testbed is no chat model"):
        check_plan(make_plan(load(content)))
    content["models"]["writer"] = uneven
    own["generator"] = "writer"
    with pytest.raises(InputError, match="prompt: 'chat': model writer: the tokenizer has no chat"):
        check_plan(make_plan(load(content)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(uneven["path"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(uneven["path"])
    assert check_plan(make_plan(load(content))) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A small Llama in a folder, with a vocabulary of words and rows for it."""

    def save(name: str, words: str, rows: int = 8) -> dict[str, str]:
        folder = tmp_path / name
        config = transformers.LlamaConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, eos_token_id=1, bos_token_id=1,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        ids = {word: number for number, word in enumerate(words)}
        vocabulary = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, eos_token=words[1]
        )
        tokenizer.save_pretrained(folder)
        return {"kind": "local-model", "path": str(folder)}

    return save


@pytest.mark.parametrize("field", ["generator", "scorer"])
def test_models_that_exchange_token_ids_must_share_a_vocabulary(
    content: Content, load: Load, checkpoint: Callable[..., dict[str, str]], field: str
) -> None:
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    content["models"] = {"testbed": checkpoint("pruned", "abcdef")}
    content["calibrations"]["own"] |= {field: "other", "prefixes": "notes"}
    content["models"]["other"] = checkpoint("same", "abcdef")
    check_plan(make_plan(load(content)))
    content["models"]["other"] = checkpoint("unlike", "abcxyz")
    with pytest.raises(InputError, match=rf"{field}: 'other': .* another \('d' is"):
        check_plan(make_plan(load(content)))


def test_a_reader_must_have_an_embedding_for_every_id_that_the_writer_may_draw(
    content: Content, load: Load, checkpoint: Callable[..., dict[str, str]]
) -> None:
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    content["models"] = {"testbed": checkpoint("pruned", "abcdef")}
    content["models"]["wide"] = checkpoint("wide", "abcdef", rows=64)
    content["calibrations"]["own"] |= {"generator": "wide", "prefixes": "notes"}
    check_plan(make_plan(load(content)))  # the rows beyond the vocabulary are never drawn
    content["models"]["testbed"] = checkpoint("narrow", "abcdef", rows=5)
    message = r"models\.testbed: .*5 rows of embeddings, and its tokenizer ids up to 5 \('f' is 5\)"
    with pytest.raises(InputError, match=message):
        check_plan(make_plan(load(content)))


def test_testbed_models_with_equal_tokenizer_fields_may_exchange_token_ids(
    content: Content, load: Load
) -> None:
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    content["calibrations"]["own"]["generator"] = "writer"
    content["models"]["writer"] = {"preset": "testbed-tiny", "steps": 3}
    check_plan(make_plan(load(content)))
    content["models"]["writer"] = {"preset": "testbed-tiny", "vocab_size": 600}
    with pytest.raises(InputError, match=r"generator: 'writer': .*give both the same"):
        check_plan(make_plan(load(content)))


def test_unused_tensors_are_a_note(
    content: Content, load: Load, checkpoint: Callable[..., dict[str, str]]
) -> None:
    content["models"]["testbed"] = checkpoint("pruned", "abcdef")
    content["calibrations"] = {"true": {"corpus": "notes"}}
    content["cells"] |= {"calibration": "true", "pruner": "wanda", "sparsity": 0.5}
    assert check_plan(make_plan(load(content))) == []
    file = Path(content["models"]["testbed"]["path"], "model.safetensors")
    tensors = {**load_file(file), "vision.patch": torch.ones(2)}
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    (note,) = check_plan(make_plan(load(content)))
    assert note == "models.testbed: the model has no use for some tensors: vision.patch"


def test_every_part_of_a_mixture_must_have_enough_texts_for_its_share(
    content: Content, load: Load
) -> None:
    """The file has 90 texts."""
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    own = content["calibrations"]["own"]
    own |= {"num_samples": 120, "prefixes": {"notes": 3, "other": 1}}
    assert check_plan(make_plan(load(content))) == []
    own["num_samples"] = 124
    with pytest.raises(InputError, match=r"corpora\.notes: .*93 texts of at least 2 tokens"):
        check_plan(make_plan(load(content)))
    own["prefix_tokens"] = 0  # nothing is read
    assert check_plan(make_plan(load(content))) == []


def test_an_empty_word_list_is_refused_before_anything_runs(
    content: Content, load: Load, tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n")
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "sparsity": 0.5}
    content["calibrations"]["own"]["banned_words"] = str(path)
    with pytest.raises(InputError, match=r"banned_words: .*holds no word"):
        check_plan(make_plan(load(content)))
