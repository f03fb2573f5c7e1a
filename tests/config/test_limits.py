import pytest

from grpo.config.composition import validate
from grpo.errors import ConfigError
from tests.composed import assert_refused, composed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=1", r"rollout\.group_size: is 1, must be at least 2"),
        ("buffer.max_policy_age=-1", r"buffer\.max_policy_age: is -1, must be at least 0"),
        ("rollout.concurrency=0", r"rollout\.concurrency: is 0, must be at least 1"),
        ("trainer.max_steps=0", r"trainer\.max_steps: is 0, must be at least 1"),
        ("trainer.max_steps=-5", r"trainer\.max_steps: is -5, must be at least 1"),
        ("trainer.max_grad_norm=0", r"trainer\.max_grad_norm: is 0, must be greater than 0"),
        ("trainer.lr=nan", r"trainer\.lr: is nan"),
        ("trainer.ranks=0", r"trainer\.ranks: is 0, must be at least 1: 1 trains in one process"),
        ("recovery.collective_timeout_s=0", r"recovery\.collective_timeout_s: is 0, must be greater than 0"),
        (
            "weight_sync.transport=pigeon",
            r"weight_sync\.transport: is 'pigeon', must be one of object_store, collective",
        ),
        ("weight_sync.backend=mpi", r"weight_sync\.backend: is 'mpi', must be one of auto, gloo, nccl"),
        ("weight_sync.bucket_mb=0", r"weight_sync\.bucket_mb: is 0, must be greater than 0"),
        ("weight_sync.timeout_s=0", r"weight_sync\.timeout_s: is 0, must be greater than 0"),
        ("trainer.num_cpus=-1", r"trainer\.num_cpus: is -1, must be at least 0"),
        ("trainer.betas=[0.9,1.0]", r"trainer\.betas: .* two numbers in"),
        ("reward.functions.task=nan", r"reward\.functions\.task: is nan, must be a finite number"),
        ("model.dtype=float16", r"model\.dtype: is 'float16', must be one of float32, bfloat16"),
        ("rollout.top_p=0", r"rollout\.top_p: is 0, must be in \(0, 1\]"),
        ("dataloader.sampling=hard", r"dataloader\.sampling: is 'hard', must be one of uniform, difficulty"),
        ("dataloader.revisit_fraction=0", r"dataloader\.revisit_fraction: is 0, must be in \(0, 1\]: 0\.1 is usual"),
        ("dataloader.revisit_fraction=1.5", r"dataloader\.revisit_fraction: is 1\.5, must be in \(0, 1\]"),
        ("dataloader.revisit_fraction=nan", r"dataloader\.revisit_fraction: is nan, must be in \(0, 1\]"),
        ("trainer.packing=sometimes", r"trainer\.packing: is 'sometimes', must be one of auto, never"),
        ("generator.engine=magic", r"generator\.engine: is 'magic', must be one of torch, vllm, simulated"),
        ("reward.on_error=ignore", r"reward\.on_error: is 'ignore', must be one of fail, drop"),
        ("generator.gpu_memory_fraction=1.5", r"generator\.gpu_memory_fraction: is 1\.5, must be in"),
        ("generator.prefix_cache_mb=-1", r"generator\.prefix_cache_mb: is -1, must be at least 0: 0 switches it off"),
        ("generator.prefix_cache_mb=inf", r"generator\.prefix_cache_mb: is inf, must be"),
        ("eval.temperature=-1", r"eval\.temperature: is -1, must be at least 0"),
        ("eval.temperature=nan", r"eval\.temperature: is nan, must be at least 0"),
        ("eval.success_threshold=nan", r"eval\.success_threshold: is nan, must be a finite number"),
        ("trainer.updates_per_batch=0", r"trainer\.updates_per_batch: is 0, must be at least 1"),
        ("loss.kl_estimator=k4", r"loss\.kl_estimator: is 'k4', must be one of k1, k2, k3"),
        (
            "loss.aggregation=mean",
            r"loss\.aggregation: is 'mean', must be one of null, token_mean, sequence_mean, fixed_",
        ),
        ("loss.horizon=0", r"loss\.horizon: is 0, must be at least 1"),
        ("loss.beta=-1", r"loss\.beta: is -1, must be at least 0"),
        ("correction=tis correction.min_ratio=1.5", r"correction\.min_ratio: is 1\.5, must be in \[0, 1\]"),
        ("correction=tis correction.max_ratio=0.5", r"correction\.max_ratio: is 0\.5, must be at least 1"),
        ("correction=tis correction.min_ratio=nan", r"correction\.min_ratio: is nan, must be in \[0, 1\]"),
        ("correction.mode=clip", r"correction\.mode: is 'clip', must be one of none, truncate, mask"),
        (
            "correction=tis correction.level=word",
            r"correction\.level: is 'word', must be one of token, sequence, geometric",
        ),
        ("shaping.overlong=cut", r"shaping\.overlong: is 'cut', must be one of keep, mask, penalize"),
        ("shaping.clip_low=nan", r"shaping\.clip_low: is nan, must be a finite number"),
        ("shaping.clip_high=inf", r"shaping\.clip_high: is inf, must be a finite number"),
        ("shaping.scale=0", r"shaping\.scale: is 0, must be greater than 0"),
        ("shaping.scale=inf", r"shaping\.scale: is inf, must be finite"),
        ("shaping.length_penalty=-1", r"shaping\.length_penalty: is -1, must be at least 0"),
        ("filter.max_dropped_batches=0", r"filter\.max_dropped_batches: is 0, must be at least 1"),
        ("eval.samples=0", r"eval\.samples: is 0, must be at least 1"),
        ("lora.rank=-1", r"lora\.rank: is -1, must be at least 0: 0 trains all weights"),
        ("lora.alpha=0", r"lora\.alpha: is 0, must be greater than 0"),
        ("lora.dropout=1", r"lora\.dropout: is 1, must be in \[0, 1\)"),
        ("lora.target_modules=attention", r"lora\.target_modules: is 'attention', must be all-linear or a list of"),
        ("lora.target_modules=[]", r"lora\.target_modules: is \[\], must be"),
        ("lora.target_modules=[3]", r"lora\.target_modules: is \[3\], must be"),
        ("cluster.wait_for_nodes_s=-1", r"cluster\.wait_for_nodes_s: is -1, must be at least 0"),
        ("cluster.address=ray://head:10001", r"cluster\.address: is 'ray://head:10001', must be auto or HOST:PORT"),
        ("trainer.betas=[0.9]", r"trainer\.betas: is \[0\.9\], must be two numbers in"),
    ],
)
def test_a_setting_beyond_its_limits_is_one_line_that_names_the_key(override, message):
    assert_refused(override, message)


def test_a_config_in_code_is_checked_like_a_composed_one():
    config = composed()
    config.trainer.groups_per_step = 0
    with pytest.raises(ConfigError, match=r"trainer\.groups_per_step"):
        validate(config)
