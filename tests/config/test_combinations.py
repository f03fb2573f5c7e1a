import pytest

from grpo.errors import ConfigError
from tests.composed import assert_refused, composed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=hf", r"model\.path: set either"),
        (
            "trainer.ranks=2 trainer.num_gpus=2",
            r"trainer\.num_gpus: is 2, but each of trainer\.ranks=2 .*; set it to 1 or 0$",
        ),
        (
            "trainer.ranks=2 trainer.num_gpus=0.5",
            r"trainer\.num_gpus: is 0\.5, but each of trainer\.ranks=2 uses one whole GPU",
        ),
        (
            "trainer.num_gpus=2",
            r"trainer\.num_gpus: is 2, but each process .* uses one GPU; set it to 1, and trainer\.ranks",
        ),
        ("trainer.num_gpus=1.5", r"trainer\.num_gpus: is 1\.5, but .* uses one GPU; set it to 1, and trainer\.ranks"),
        (
            "generator.num_gpus=2",
            r"generator\.num_gpus: is 2, but .* uses one GPU; set it to 1, and generator\.replicas",
        ),
        ("eval.num_gpus=1.5", r"eval\.num_gpus: is 1\.5, but each replica uses one GPU; .* eval\.replicas"),
        ("reference.num_gpus=2", r"reference\.num_gpus: is 2, but each replica uses one GPU; .* reference\.replicas"),
        ("generator.engine=vllm generator.num_gpus=2", r"generator\.num_gpus: is 2; with .* 1, or a fraction$"),
        ("generator.engine=vllm generator.num_gpus=1.5", r"generator\.num_gpus: is 1\.5; with .* 1, or a fraction$"),
        (
            "weight_sync.backend=nccl trainer.num_gpus=1 generator.num_gpus=1 trainer.ranks=2",
            r"weight_sync\.backend: nccl needs a trainer of one rank, and trainer\.ranks=2 .*; take auto or gloo$",
        ),
        (
            "trainer.ranks=2 trainer.num_cpus=0",
            r"trainer\.num_cpus: is 0, but trainer\.ranks=2 are placed by their resources",
        ),
        (
            "weight_sync.backend=nccl",
            r"weight_sync\.backend: nccl needs whole GPUs, and trainer\.num_gpus is 0; raise it",
        ),
        (
            "weight_sync.backend=nccl trainer.num_gpus=1 generator.num_gpus=0.5",
            r"weight_sync\.backend: nccl needs whole GPUs, and generator\.num_gpus is 0\.5; raise it, or take auto or",
        ),
        (
            "weight_sync.backend=nccl generator.engine=vllm generator.num_gpus=1 trainer.num_gpus=1",
            r"weight_sync\.backend: is nccl, but the vllm engine has no GPU in the actor's process; take auto or gloo",
        ),
        ("generator.max_sequences=4", r"generator\.max_sequences: is 4, but a group of rollout\.group_size=8"),
        ("model.path=x", r"model\.path: set either"),
        ("task.renderer=qwen3", r"task\.renderer: is qwen3, which needs task\.template=chat; or set it to null"),
        ("generator.engine=vllm rollout.temperature=3", r"rollout\.temperature: is 3\.0, vLLM takes at most 2"),
        ("generator.engine=vllm eval.temperature=3", r"eval\.temperature: is 3\.0, vLLM takes at most 2"),
        ("generator.tensor_parallel=2", r"generator\.tensor_parallel: is 2, but only generator\.engine=vllm"),
        (
            "generator.engine=vllm generator.tensor_parallel=2 generator.num_gpus=1",
            r"generator\.num_gpus: is 1; with .* it must be 2$",
        ),
        (
            "generator.engine=vllm generator.tensor_parallel=2 generator.num_gpus=2 eval.every=5 eval.num_gpus=1",
            r"eval\.num_gpus: is 1; with .* it must be 2$",
        ),
        (
            "generator.engine=vllm generator.num_gpus=1 eval.every=5",
            r"eval\.num_gpus: is 0; with .* it must be 1, or a fraction$",
        ),
        ("trainer.updates_per_batch=17", r"trainer\.updates_per_batch: is 17, but a batch has 16 groups .*; lower it"),
        (
            "correction.max_ratio=3",
            r"correction\.mode: is none, so .* have no effect; take correction=tis, mis, icepop or dec",
        ),
        (
            "correction.min_ratio=0.5",
            r"correction\.mode: is none, so .* have no effect; take correction=tis, mis, icepop or dec",
        ),
        (
            "shaping.overlong_buffer=0.3",
            r"shaping\.overlong_buffer: is 0\.3 with shaping\.overlong=keep; .* and keep and mask need 0",
        ),
        (
            "shaping=overlong_mask shaping.overlong_buffer=0.3",
            r"shaping\.overlong_buffer: is 0\.3 with .*overlong=mask;",
        ),
        ("shaping.overlong=penalize", r"shaping\.overlong_buffer: is 0 with .*=penalize; penalize needs a fraction of"),
        (
            "shaping=overlong_penalty shaping.overlong_buffer=4",
            r"shaping\.overlong_buffer: is 4 .* needs a fraction of rollout",
        ),
        (
            "shaping.clip_low=1 shaping.clip_high=1",
            r"shaping\.clip_low: is 1\.0, must be less than shaping\.clip_high=1\.0",
        ),
        (
            "shaping.clip_low=2 shaping.clip_high=1",
            r"shaping\.clip_low: is 2\.0, must be less than shaping\.clip_high=1\.0",
        ),
        ("eval.samples=512", r"eval\.samples: is 512, but .* generator\.max_sequences=256"),
        (
            "cluster.dashboard=true cluster.address=auto",
            r"cluster\.dashboard: works only for a cluster that the run starts",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_that_names_a_key(override, message):
    assert_refused(override, message)


@pytest.mark.parametrize("override", ["eval.temperature=0", "rollout.temperature=0"])
def test_several_greedy_answers_to_a_prompt_are_refused(override):
    with pytest.raises(ConfigError, match=r"eval\.samples: is 4, but at temperature 0 all completions .* are equal"):
        composed("eval.samples=4", override)


@pytest.mark.parametrize("penalty", ["shaping.length_penalty=0.1", "shaping=overlong_penalty"])
def test_max_rl_takes_no_penalty_that_could_make_rewards_negative(penalty):
    with pytest.raises(ConfigError, match=r"^loss\.advantages: max_rl needs rewards of at least 0, .* or no penalty$"):
        composed("loss.advantages=max_rl", penalty)
