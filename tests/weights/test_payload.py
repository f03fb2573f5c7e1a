import copy
import dataclasses
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from grpo.errors import WeightsError
from grpo.models.tiny import tiny_llama
from grpo.weights.payload import Weights, WeightsWriter, check_intact, load_weights


def tiny(seed=0):
    return tiny_llama(width=32, layers=2, heads=2, seed=seed)


class Odd(nn.Module):
    """Parameters whose sizes are no multiples of anything."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.three = nn.Parameter(torch.arange(3.0))
        self.matrix = nn.Parameter(torch.arange(35.0).view(5, 7))
        self.tail = nn.Parameter(torch.arange(17.0))
        self.register_buffer("not_a_parameter", torch.ones(4))


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("make_model", [tiny, Odd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_is_loaded(make_model, dtype):
    source, target = make_model(), make_model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1)
    load_weights(target, WeightsWriter(source, dtype).write(3))
    assert_same(state(target), {name: tensor.to(dtype).float() for name, tensor in state(source).items()})


def test_a_bfloat16_model_takes_bfloat16_weights_exactly():
    source, target = tiny().bfloat16(), tiny(seed=1).bfloat16()
    load_weights(target, WeightsWriter(source, torch.bfloat16).write(1))
    assert_same(state(target), state(source))


def test_views_carry_names_shapes_and_dtype():
    model = Odd()
    weights = WeightsWriter(model, torch.bfloat16).write(5)
    assert weights.version == 5
    assert {name: (tuple(t.shape), t.dtype) for name, t in weights.tensors()} == {
        name: (tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()
    }


def test_tied_parameters_appear_once_and_stay_tied():
    source, target = tiny(), tiny(seed=1)
    assert source.lm_head.weight is source.model.embed_tokens.weight
    weights = WeightsWriter(source, torch.float32).write(1)
    names = [spec.name for spec in weights.specs]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    load_weights(target, weights)
    assert target.lm_head.weight is target.model.embed_tokens.weight
    assert torch.equal(target.lm_head.weight, source.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_lie_aligned_and_apart(dtype):
    weights = WeightsWriter(Odd(), dtype).write(0)
    end = 0
    for spec in weights.specs:
        assert spec.offset % 64 == 0
        assert spec.offset >= end
        end = spec.offset + spec.nbytes
    assert end <= weights.buffer.nbytes


def test_views_share_the_memory_of_the_buffer():
    weights = WeightsWriter(Odd(), torch.float32).write(0)
    for _, tensor in weights.tensors():
        assert np.shares_memory(tensor.numpy(), weights.buffer)


def test_each_write_takes_the_present_parameters_into_the_same_buffer():
    model = Odd()
    writer = WeightsWriter(model, torch.float32)
    first = writer.write(1)
    with torch.no_grad():
        model.three.mul_(10)
    second = writer.write(2)
    assert second.buffer is first.buffer
    assert (first.version, second.version) == (1, 2)
    assert dict(second.tensors())["three"].tolist() == [0, 10, 20]


def travelled(weights):
    """As an object store hands them out: the buffer out of band, and read-only."""
    outside = []
    pickled = pickle.dumps(weights, protocol=5, buffer_callback=outside.append)
    return pickled, pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in outside]), outside


def test_the_buffer_travels_out_of_band():
    weights = WeightsWriter(tiny(), torch.float32).write(1)
    pickled, _, outside = travelled(weights)
    assert [buffer.raw().nbytes for buffer in outside] == [weights.buffer.nbytes]
    assert len(pickled) < weights.buffer.nbytes / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_read_only_buffer_becomes_the_memory_of_the_parameters(dtype):
    source, target = tiny().to(dtype), tiny(seed=1).to(dtype)
    _, received, _ = travelled(WeightsWriter(source, dtype).write(4))
    assert not received.buffer.flags.writeable
    load_weights(target, received)  # a warning would be an error here
    assert_same(state(target), state(source))
    for parameter in target.parameters():
        assert np.shares_memory(parameter.detach().view(torch.uint8).numpy(), received.buffer)
    assert target.lm_head.weight is target.model.embed_tokens.weight


def test_the_memory_of_a_version_is_freed_when_the_next_is_loaded():
    source, target = tiny(), tiny(seed=1)
    writer = WeightsWriter(source, torch.float32)
    _, received, _ = travelled(writer.write(1))
    load_weights(target, received)
    old = weakref.ref(received.buffer)
    _, received, _ = travelled(writer.write(2))
    gc.collect()
    assert old() is not None
    load_weights(target, received)
    gc.collect()
    assert old() is None


def test_a_buffer_that_may_be_written_again_is_copied_and_never_into_a_shared_one():
    source, target = tiny(), tiny(seed=1)
    writer = WeightsWriter(source, torch.float32)
    _, shared, _ = travelled(writer.write(1))
    load_weights(target, shared)
    first = state(source)
    with torch.no_grad():
        source.model.norm.weight.add_(1)
    load_weights(target, writer.write(2))
    second = state(source)
    with torch.no_grad():
        source.model.norm.weight.add_(1)
    writer.write(3)
    assert_same(state(target), second)
    assert_same(dict(shared.tensors()), first)


def test_weights_of_another_dtype_are_converted():
    source, target = tiny(), tiny(seed=1)
    _, received, _ = travelled(WeightsWriter(source, torch.bfloat16).write(4))
    load_weights(target, received)
    assert_same(state(target), {name: tensor.bfloat16().float() for name, tensor in state(source).items()})


class Large(nn.Module):
    """Parameters over several pieces, with small, empty and transposed ones between."""

    def __init__(self):
        super().__init__()
        sizes = {"first": (700_001,), "small": (3,), "empty": (0, 5), "second": (523, 1009), "last": (1,)}
        generator = torch.Generator().manual_seed(0)
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.turned = nn.Parameter(torch.randn(300, 41, generator=generator).T)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_written_whole_by_any_number_of_threads(dtype, threads):
    model, before = Large(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        weights = WeightsWriter(model, dtype).write(1)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    check_intact(weights)
    assert_same(dict(weights.tensors()), {name: tensor.to(dtype) for name, tensor in state(model).items()})


def test_a_model_without_parameters_has_weights():
    weights = WeightsWriter(nn.Module(), torch.float32).write(1)
    check_intact(weights)
    assert list(weights.tensors()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_found_in_every_place(value, dtype):
    model = Large()
    writer = WeightsWriter(model, dtype)
    for name, place in [("first", 0), ("first", 700_000), ("small", 1), ("second", 262_144), ("last", 0)]:
        with torch.no_grad():
            parameter = dict(model.named_parameters())[name].view(-1)
            kept = parameter[place].item()
            parameter[place] = value
            with pytest.raises(WeightsError, match=f"^{name} holds NaN or infinity"):
                writer.write(1)
            parameter[place] = kept
    writer.write(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_finite_weights_are_published(dtype, sign):
    model = Large()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(sign * torch.finfo(dtype).max)
    check_intact(WeightsWriter(model, dtype).write(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = Odd()
    with torch.no_grad():
        model.matrix[4, 6] = value
    with pytest.raises(WeightsError, match=r"^matrix holds NaN or infinity at version 9"):
        WeightsWriter(model, torch.float32).write(9)


def test_weights_that_overflow_the_published_dtype_are_refused():
    model = Odd()
    with torch.no_grad():
        model.tail[0] = 1e5
    WeightsWriter(model, torch.bfloat16).write(1)
    with pytest.raises(WeightsError, match=r"^tail holds NaN or infinity"):
        WeightsWriter(model, torch.float16).write(1)


def test_a_writer_goes_on_after_a_refusal():
    model = Odd()
    writer = WeightsWriter(model, torch.float32)
    with torch.no_grad():
        model.three[0] = float("nan")
    with pytest.raises(WeightsError):
        writer.write(1)
    with torch.no_grad():
        model.three[0] = 8.0
    assert dict(writer.write(2).tensors())["three"].tolist() == [8, 1, 2]


def with_first_spec(weights, **changes):
    first, *rest = weights.specs
    return dataclasses.replace(weights, specs=(dataclasses.replace(first, **changes), *rest))


MISMATCHES = {
    "renamed": lambda weights: with_first_spec(weights, name="other"),
    "reshaped": lambda weights: with_first_spec(weights, shape=weights.specs[0].shape[::-1]),
    "missing": lambda weights: dataclasses.replace(weights, specs=weights.specs[:-1]),
    "additional": lambda weights: dataclasses.replace(
        weights, specs=(*weights.specs, dataclasses.replace(weights.specs[0], name="other"))
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_weights_of_another_model_are_refused_before_anything_changes(mismatch):
    target = tiny(seed=1)
    before = state(target)
    weights: Weights = MISMATCHES[mismatch](WeightsWriter(tiny(), torch.float32).write(2))
    with pytest.raises(WeightsError, match="version 2 does not fit the model; it differs in"):
        load_weights(target, weights)
    assert_same(state(target), before)


@pytest.mark.parametrize("place", [0, 77, -1])
def test_damaged_weights_are_refused(place):
    _, weights, _ = travelled(WeightsWriter(tiny(), torch.float32).write(2))
    buffer = weights.buffer.copy()
    buffer[place] ^= 1
    with pytest.raises(WeightsError, match="version 2 was damaged on its way"):
        check_intact(dataclasses.replace(weights, buffer=buffer))
    check_intact(weights)


def test_loading_keeps_gradients_and_the_parameters_themselves():
    model = tiny(seed=1)
    parameter = model.model.norm.weight
    parameter.grad = torch.ones_like(parameter)
    kept = copy.copy(parameter.grad)
    load_weights(model, WeightsWriter(tiny(), torch.float32).write(1))
    assert model.model.norm.weight is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter.grad, kept)
