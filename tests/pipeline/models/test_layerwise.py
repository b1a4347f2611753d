"""Forward passes through decoder layers that are read from files one after another."""

import functools
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.evaluation.perplexity import ScoredWindow, batches, losses
from pipeline.models import loading, streaming
from pipeline.models.hidden_states import TensorStore
from pipeline.models.loading import load_model, open_model, weight_bytes
from pipeline.models.matrices import decoder_layers
from pipeline.models.memory import ModelMemory
from pipeline.models.nonfinite import first_nonfinite
from pipeline.models.output_layer import OutputLayer, check_causal, head_is_linear
from pipeline.models.streaming import is_streamed, load_streamed, set_memory
from pipeline.specs import Magnitude
from tests.pipeline.models import test_positions
from tests.pipeline.models.test_layer_files import Dense, save_tokenizer
from tests.pipeline.models.test_streaming import CONFIGS, SMALL, absent, in_memory
from tests.pipeline.pruning.test_walk import CONFIGS as OF_THE_WALK

KINDS: dict[str, Any] = {
    **CONFIGS,
    "gemma4": OF_THE_WALK["gemma4"],  # layers hand keys and values to later ones
    "falcon": OF_THE_WALK["falcon"],  # its layers return tuples
}
BATCHES = ([40, 40, 40], [24], [17, 9, 3], [40, 40, 40])
"""Tokens of the texts of each batch."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(KINDS[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(CONFIGS["llama"], tmp_path_factory.mktemp("llama"))


def saved(config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in decoder_layers(model)[1].parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # so that each layer changes the logits
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def in_files(folder: Path) -> Any:
    cpu, scratch = torch.device("cpu"), folder / "scratch"
    return load_streamed(str(folder), torch.float32, cpu, scratch).eval()


def texts(lengths: list[int]) -> dict[str, Tensor]:
    """Token ids `[texts, tokens]`, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 96, (len(lengths), max(lengths)), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def ids_alone(lengths: list[int]) -> dict[str, Tensor]:
    return {"input_ids": texts(lengths)["input_ids"]}


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("inputs", [texts, ids_alone])
@pytest.mark.parametrize("chunked", [False, True])
def test_texts_get_the_states_that_the_whole_model_gives(
    folder: Path, chunked: bool, inputs: Any
) -> None:
    whole = in_memory(folder)
    body = whole.base_model if chunked else whole
    asked = [inputs(lengths) for lengths in BATCHES]
    found = list(OutputLayer(in_files(folder), chunked).states(asked))
    assert len(found) == len(BATCHES)
    for lengths, given, states in zip(BATCHES, asked, found, strict=True):
        with torch.no_grad():
            output = body(**given, use_cache=False)
        expected = output.last_hidden_state if chunked else output.logits
        for row, length in enumerate(lengths):  # what follows a text is padding
            torch.testing.assert_close(
                states[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5
            )
    assert float(found[0].std()) > 1e-2


@pytest.mark.parametrize("host", [0, 3_000])
def test_states_have_the_same_bits_wherever_they_wait(
    folder: Path, host: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [texts(lengths) for lengths in BATCHES]
    written: list[int] = []
    write = TensorStore._mapped

    def counting(store: TensorStore, value: Tensor) -> Tensor:
        written.append(value.numel())
        return write(store, value)

    monkeypatch.setattr(TensorStore, "_mapped", counting)
    model = in_files(folder)
    one = list(OutputLayer(model).states(asked))
    assert not written
    set_memory(model, ModelMemory(device_hidden_bytes=0, host_hidden_bytes=host))
    other = list(OutputLayer(model).states(asked))
    assert written
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)


def test_batches_pass_together_as_far_as_memory_has_room(llama: Path) -> None:
    """Who takes one batch after the other has those of a part before the next part is read."""
    asked = [ids_alone([8]) for _ in range(5)]
    hidden = SMALL["hidden_size"] * 4
    model = in_files(llama)
    one = list(OutputLayer(model).states(asked))
    reads: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, _: None if next(layer.parameters()).is_meta else reads.append(1)
    )
    for room, parts in ((5, [5]), (2, [2, 2, 1]), (0, [1] * 5)):
        device, host = divmod(room * 8 * hidden, 2)
        set_memory(model, ModelMemory(None, device, device + host))
        reads.clear()
        seen = []
        for states, expected in zip(OutputLayer(model).states(asked), one, strict=True):
            assert torch.equal(states, expected)
            seen.append(len(reads))
        ends = np.cumsum(parts)
        assert seen == [ends[np.searchsorted(ends, place, side="right")] for place in range(5)]


def test_logits_are_taken_in_parts_from_the_same_models(folder: Path) -> None:
    streamed, whole = in_files(folder), in_memory(folder)
    assert head_is_linear(streamed) == head_is_linear(whole)
    layers = OutputLayer(streamed), OutputLayer(whole)
    assert layers[0].logits_dtype() == layers[1].logits_dtype() == torch.float32
    windows = [[ScoredWindow(np.arange(1, size), 1, 1, 1) for size in (30, 20)] for _ in range(2)]
    found, expected = (list(losses(layer, windows)) for layer in layers)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", test_positions.CONFIGS)
def test_positions_that_depend_on_the_length_are_those_of_a_text_alone(
    name: str, tmp_path: Path
) -> None:
    whole = test_positions.made(name)
    whole.save_pretrained(tmp_path)
    windows = [ScoredWindow(np.array(ids), 1, 1, 1) for ids in test_positions.TEXTS]
    layer = OutputLayer(in_files(tmp_path))
    places = list(batches(windows, 512, None, layer.lengths))
    found = [0.0] * len(windows)
    measured = losses(layer, [[windows[place] for place in batch] for batch in places])
    for batch, own in zip(places, measured, strict=True):
        for place, loss in zip(batch, own, strict=True):
            found[place] = loss
    expected = [-float(test_positions.alone(whole, ids).sum()) for ids in test_positions.TEXTS]
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_batch_reads_no_layer(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = OutputLayer(in_files(llama))
    monkeypatch.setattr(streaming, "_read", lambda stored: pytest.fail("it was read"))
    assert list(layer.states([])) == []


# ------------------------------------------------------------------------------------------ checks


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64, "initializer_range": 1.0}
    for is_decoder in (True, False):
        config = transformers.BertConfig(**SMALL, **sizes, is_decoder=is_decoder)
        folder = saved(config, tmp_path / str(is_decoder))
        if is_decoder:
            check_causal(in_files(folder))
        else:
            with pytest.raises(InputError, match="depend on later tokens"):
                check_causal(in_files(folder))


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.1", "model.norm"])
def test_the_first_module_with_a_broken_value_is_named(
    llama: Path, tmp_path: Path, place: str
) -> None:
    folder = saved(CONFIGS["llama"], tmp_path / "broken")
    assert first_nonfinite(in_files(folder), [5, 6, 7]) is None
    tensors = load_file(folder / "model.safetensors")
    broken = next(name for name in sorted(tensors) if name.startswith(place))
    tensors[broken].fill_(math.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert first_nonfinite(in_files(folder), [5, 6, 7]) == place


# ------------------------------------------------------------------------------------------ memory


def test_each_layer_is_read_once_while_the_one_before_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    in_memory_now: set[int] = set()
    most: list[int] = []
    ran: list[int] = []
    model = in_files(folder)
    root, layers = decoder_layers(model)
    numbers = {id(vars(layer)["stored_layer"]): place for place, layer in enumerate(layers)}
    begun = [threading.Event() for _ in range(len(layers) + 1)]
    begun[-1].set()  # there is no layer above the last
    read_one, drop = streaming._read, streaming._drop
    inside = absent(model)

    def reading(stored: Any) -> Any:
        number = numbers[id(stored)]
        read.append(number)
        in_memory_now.add(number)
        most.append(len(in_memory_now))
        begun[number].set()
        return read_one(stored)

    def dropping(layer: nn.Module, stored: Any) -> None:
        drop(layer, stored)
        in_memory_now.remove(numbers[id(stored)])

    def running(number: int, *_: object) -> None:
        present = inside - absent(model)
        if present:  # else it is passed over
            assert present == {name for name in inside if name.startswith(f"{root}.{number}.")}
            assert begun[number + 1].wait(timeout=600)
            ran.append(number)

    monkeypatch.setattr(streaming, "_read", reading)
    monkeypatch.setattr(streaming, "_drop", dropping)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(running, number))
    list(OutputLayer(model).states([texts(lengths) for lengths in BATCHES]))
    assert read == list(range(len(layers)))
    assert max(most) == 2
    assert ran == [number for number in read for _ in BATCHES]
    assert not in_memory_now
    assert absent(model) == inside


def test_layers_are_released_when_a_pass_is_given_up(llama: Path) -> None:
    model = in_files(llama)
    inside = absent(model)

    def fail(*_: object) -> None:
        if absent(model) != inside:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        list(OutputLayer(model).states([ids_alone([8])]))
    assert absent(model) == inside


# ------------------------------------------------------------------------------------------ choice


def test_a_model_is_loaded_whole_if_its_weights_take_four_fifths_of_the_memory(
    folder: Path, tmp_path: Path
) -> None:
    spec = Dense(folder).model()
    weights = sum(each.numel() * 4 for each in in_memory(folder).parameters())
    assert weight_bytes(spec, {}) == weights
    assert weight_bytes(spec.model_copy(update={"dtype": "bfloat16"}), {}) == weights / 2
    least = math.ceil(weights / 0.8)
    for memory, streams in ((least, False), (least - 1, True)):
        one = open_model(spec, {}, tmp_path / "scratch", ModelMemory(memory))
        assert is_streamed(one) == streams
        both = open_model(spec, {}, tmp_path / "scratch", ModelMemory(2 * memory), models=2)
        assert is_streamed(both) == streams


def test_without_a_limit_a_model_is_compared_with_the_machines_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Dense(llama).model()
    assert not is_streamed(open_model(spec, {}, tmp_path / "scratch"))
    monkeypatch.setattr(loading, "weight_bytes", lambda *_: 2**60)
    assert is_streamed(open_model(spec, {}, tmp_path / "scratch"))


def test_masks_are_applied_whenever_a_layer_is_read(folder: Path, tmp_path: Path) -> None:
    dense = Dense(folder)
    spec = dense.spec(dense.model(), Magnitude(), sparsity=0.6)
    artifacts = dense.run(spec, {}, tmp_path / "pruned")
    streamed = open_model(spec, artifacts, tmp_path / "scratch", ModelMemory(1))
    assert is_streamed(streamed)
    whole = load_model(spec, artifacts, torch.device("cpu"))
    for _ in range(2):
        (found,) = OutputLayer(streamed, chunked=False).states([ids_alone([30])])
        with torch.no_grad():
            expected = whole(**ids_alone([30])).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        without = in_memory(folder)(**ids_alone([30])).logits
    assert float((found - without).abs().max()) > 1e-2
