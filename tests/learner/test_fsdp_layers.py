import copy

import pytest
import torch
from transformers import AttentionInterface

from grpo.learner.batch import samples_of
from grpo.learner.fsdp import checkpoint_layers, compile_layers, layers_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.learner.packed_attention import PACKED_ATTENTION, packed_attention


@pytest.fixture
def attention_as_before():
    yield
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def gradients(model, groups, packing):
    logprobs = TokenLogprobs(model, 1.0, packing)
    for group in groups:  # each of another shape
        logprobs_N, _ = logprobs(samples_of(group))
        logprobs_N.sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_model_has_layers(model):
    assert len(layers_of(model)) == model.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks for it itself
@pytest.mark.usefixtures("attention_as_before")
@pytest.mark.parametrize(("packing", "checkpointed"), [("auto", True), ("never", False)])
@pytest.mark.long
def test_compiled_layers_have_the_gradients_of_others(model, make_group, packing, checkpointed):
    torch.compiler.reset()
    groups = [make_group(4, lengths, [1.0] * len(lengths)) for lengths in ((3, 1), (2, 9, 5), (7,))]
    expected, operations = gradients(copy.deepcopy(model), groups, packing), set()

    def backend(graph, inputs):
        """It traces as others do, and generates no code."""
        operations.update(node.target for node in graph.graph.nodes)
        return graph

    compile_layers(model, backend)
    if checkpointed:
        checkpoint_layers(model)
    for one, other in zip(gradients(model.train(), groups, packing), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert {torch.rsqrt, torch.nn.functional.linear, torch.nn.functional.silu} <= operations
