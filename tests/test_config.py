import importlib.util
import inspect

import pytest
import torch
from omegaconf import OmegaConf

from grpo.algorithms.losses import LOSSES, grpo
from grpo.composition import CONFIGS, from_overrides, to_yaml
from grpo.config import LOSS_PARAMETERS, CorrectionConfig, LossConfig, RunConfig
from grpo.learner.collate import MicroBatch
from grpo.learner.objective import Objective
from grpo.sinks import SINKS, check_sinks
from grpo.types import ConfigError
from grpo.validation import validate, warnings


def composed(*overrides) -> RunConfig:
    return from_overrides(overrides)


def checked(*overrides) -> RunConfig:
    """Composed, and asked for the loss that it names, as it is before anything starts."""
    config = composed(*overrides)
    Objective(config.loss, config.correction)
    return config


def in_file(group, choice) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{choice}.yaml"))


def test_the_default_is_the_design():
    config = composed()
    assert (config.rollout.concurrency, config.rollout.group_size, config.buffer.max_policy_age) == (32, 8, 1)
    assert config.ticket_capacity == 32
    assert warnings(config) == []


def test_the_learning_rate_goes_with_the_model():
    assert composed().trainer.lr == 3e-4
    assert composed("model=hf", "model.path=x").trainer.lr == 1e-6
    assert composed("model=hf", "model.path=x", "trainer.lr=1e-5").trainer.lr == 1e-5


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    needs_a_model = "override /model: hf" in (CONFIGS / f"experiment/{experiment}.yaml").read_text()
    assert warnings(composed(f"+experiment={experiment}", *(["model.path=x"] if needs_a_model else []))) == []


GROUPS = ("model", "lora", "task", "dataloader", "loss", "correction", "shaping", "filter")
GOES_WITH = {  # what a choice can't do without
    ("model", "hf"): ["model.path=x"],
}


@pytest.mark.parametrize(
    ("group", "choice"),
    sorted((path.parent.name, path.stem) for group in GROUPS for path in (CONFIGS / group).glob("*")),
)
def test_every_choice_of_a_group_composes(group, choice):
    config = checked(f"{group}={choice}", *GOES_WITH.get((group, choice), []))
    if group in ("model", "task"):  # they reach beyond their own
        return
    values = in_file(group, choice)
    if "horizon" in values:
        values["horizon"] = config.rollout.max_completion_tokens  # to which it refers
    assert {name: getattr(getattr(config, group), name) for name in values} == values


@pytest.mark.parametrize("correction", ["none", "tis", "mis", "icepop", "decoupled"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_with_every_correction(loss, correction):
    config = composed(f"loss={loss}", f"correction={correction}")
    assert Objective(config.loss, config.correction).needs_proximal == (correction != "none")


BEYOND_THE_FUNCTION = {"dapo": {"dual_clip": 3.0}}  # which null switches off


@pytest.mark.parametrize(
    ("overrides", "sinks"),
    [
        ([], {}),
        (["sinks=tensorboard"], {"tensorboard": {}}),
        (["sinks=[tensorboard,wandb]", "observe.sinks.wandb.mode=offline"], {"tensorboard": {}, "wandb": {}}),
        (["+observe.sinks.wandb.mode=offline"], {"wandb": {"mode": "offline"}}),
        (["+observe.sinks={tensorboard:{},wandb:{project:x}}"], {"tensorboard": {}, "wandb": {"project": "x"}}),
        (["+observe.sinks.tensorboard={}"], {"tensorboard": {}}),
        (["+observe.sinks={my_sinks.Mine: {color: red}}"], {"my_sinks.Mine": {"color": "red"}}),
    ],
)
def test_sinks_are_named_in_a_group_or_by_their_options(overrides, sinks):
    found = composed(*overrides).observe.sinks
    assert found.keys() == sinks.keys()
    assert all(found[name].items() >= options.items() for name, options in sinks.items())


@pytest.mark.parametrize("name", SINKS)
def test_the_choice_of_a_sink_says_what_the_class_does_by_itself(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)  # the class is there without its package
    options = composed(f"sinks={name}").observe.sinks[name]
    parameters = inspect.signature(SINKS[name].sink).parameters.values()
    assert options == {p.name: p.default if p.default != () else [] for p in parameters if p.kind is p.KEYWORD_ONLY}
    check_sinks({name: options})


def test_every_loss_has_a_choice_of_its_name():
    assert {path.stem for path in (CONFIGS / "loss").glob("*")} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_the_choice_of_a_loss_says_what_the_function_does_by_itself(name):
    values = in_file("loss", name)
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(LOSSES[name]).parameters.values()
        if parameter.name in (*LOSS_PARAMETERS, "aggregation") and parameter.default is not None
    }
    assert values["name"] == name
    given = {key: values[key] for key in values if key in (*LOSS_PARAMETERS, "aggregation")}
    assert defaults | given == defaults | (BEYOND_THE_FUNCTION.get(name, {}))
    assert given.keys() >= defaults.keys() - {"aggregation"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sinks=papers", r"Could not find 'sinks/papers' Available options in 'sinks': .*tensorboard"),
        ("observe.sinks.wandb.mode=offline", r"observe\.sinks\.wandb: is not there yet; add it with a plus sign"),
        ("trainer.stepz=3", r"trainer\.stepz: no such key; did you mean trainer\.\w+\?"),
        ("+trainer.stepz=3", r"trainer\.stepz: no such key"),
        ("++extra=3", r"extra: no such key"),
        ("rolout.concurrency=3", r"rolout: no such key; did you mean rollout\?"),
        ("trainer.max_steps=many", r"trainer\.max_steps: Value 'many' .* Integer"),
        ("task=chess", r"Could not find 'task/chess' Available options in 'task': .*sorting"),
        ("+experiment=chess", r"Could not find 'experiment/chess' Available options"),
        ("model=hf", r"model\.path: set either"),
        ("rollout.group_size=1", r"rollout\.group_size: is 1, must be at least 2"),
        ("buffer.max_policy_age=-1", r"buffer\.max_policy_age: is -1, must be at least 0"),
        ("rollout.concurrency=0", r"rollout\.concurrency: is 0, must be at least 1"),
        ("trainer.max_steps=0", r"trainer\.max_steps: is 0, must be at least 1"),
        ("trainer.max_steps=-5", r"trainer\.max_steps: is -5, must be at least 1"),
        ("trainer.max_grad_norm=0", r"trainer\.max_grad_norm: is 0\.0, must be greater than 0"),
        ("trainer.lr=nan", r"trainer\.lr: is nan"),
        ("trainer.ranks=0", r"trainer\.ranks: is 0, must be at least 1: 1 trains in one process"),
        ("trainer.ranks=2 trainer.num_gpus=2", r"trainer\.num_gpus: is 2, but each of trainer\.ranks=2 .*: 1 or 0$"),
        ("trainer.ranks=2 trainer.num_gpus=0.5", r"trainer\.num_gpus: is 0\.5, but each of trainer\.ranks=2 .*GPU of"),
        ("trainer.num_gpus=2", r"trainer\.num_gpus: is 2, but .* computes on one GPU: set it to 1, and trainer\.ranks"),
        ("trainer.num_gpus=1.5", r"trainer\.num_gpus: is 1\.5, but .* on one GPU: set it to 1, and trainer\.ranks"),
        ("generator.num_gpus=2", r"generator\.num_gpus: is 2, but .* on one GPU: set it to 1, and generator\.replicas"),
        ("eval.num_gpus=1.5", r"eval\.num_gpus: is 1\.5, but each computes on one GPU: .* eval\.replicas"),
        ("reference.num_gpus=2", r"reference\.num_gpus: is 2, but each computes on one GPU: .* reference\.replicas"),
        ("generator.engine=vllm generator.num_gpus=2", r"generator\.num_gpus: is 2; with .* 1, or a part of one$"),
        ("generator.engine=vllm generator.num_gpus=1.5", r"generator\.num_gpus: is 1\.5; with .* 1, or a part of one$"),
        (
            "weights.backend=nccl trainer.num_gpus=1 generator.num_gpus=1 trainer.ranks=2",
            r"weights\.backend: nccl takes a trainer of one rank, and trainer\.ranks is 2, .*: take auto or gloo$",
        ),
        ("trainer.ranks=2 trainer.num_cpus=0", r"trainer\.num_cpus: is 0, but trainer\.ranks=2 are placed by what"),
        ("recovery.collective_timeout_s=0", r"recovery\.collective_timeout_s: is 0\.0, must be greater than 0"),
        ("weights.transport=pigeon", r"weights\.transport: 'pigeon' is not one of object_store, collective"),
        ("weights.backend=mpi", r"weights\.backend: 'mpi' is not one of auto, gloo, nccl"),
        ("weights.backend=nccl", r"weights\.backend: nccl needs whole GPUs, and trainer\.num_gpus is 0: raise it"),
        (
            "weights.backend=nccl trainer.num_gpus=1 generator.num_gpus=0.5",
            r"weights\.backend: nccl needs whole GPUs, and generator\.num_gpus is 0\.5: raise it, or take auto or gloo",
        ),
        (
            "weights.backend=nccl generator.engine=vllm generator.num_gpus=1 trainer.num_gpus=1",
            r"weights\.backend: the vllm engine has no GPU in the actor's process; take auto or gloo",
        ),
        ("weights.bucket_mb=0", r"weights\.bucket_mb: is 0\.0, must be greater than 0"),
        ("weights.timeout_s=0", r"weights\.timeout_s: is 0\.0, must be greater than 0"),
        ("trainer.num_cpus=-1", r"trainer\.num_cpus: is -1\.0, must be at least 0"),
        ("trainer.betas=[0.9,1.0]", r"trainer\.betas: .* two numbers in"),
        ("reward.functions.task=nan", r"reward\.functions: the weight of task is nan, must be finite"),
        ("model.dtype=float16", r"model\.dtype: 'float16' is not one of float32, bfloat16"),
        ("rollout.top_p=0", r"rollout\.top_p: is 0\.0, must be in \(0, 1\]"),
        ("dataloader.sampling=hard", r"dataloader\.sampling: 'hard' is not one of uniform, difficulty"),
        ("dataloader.revisit=0", r"dataloader\.revisit: is 0\.0, must be in \(0, 1\], .* 0\.1 is usual"),
        ("dataloader.revisit=1.5", r"dataloader\.revisit: is 1\.5, must be in \(0, 1\]"),
        ("dataloader.revisit=nan", r"dataloader\.revisit: is nan, must be in \(0, 1\]"),
        ("trainer.packing=sometimes", r"trainer\.packing: 'sometimes' is not one of auto, never"),
        ("generator.engine=magic", r"generator\.engine: 'magic' is not one of torch, vllm, simulated"),
        ("reward.on_error=ignore", r"reward\.on_error: 'ignore' is not one of fail, drop"),
        ("generator.max_sequences=4", r"generator\.max_sequences: is 4, but a group of rollout\.group_size=8"),
        ("model.path=x", r"model\.path: set either"),
        ("generator.engine=vllm rollout.temperature=3", r"rollout\.temperature: is 3\.0, vLLM takes at most 2"),
        ("generator.engine=vllm eval.temperature=3", r"eval\.temperature: is 3\.0, vLLM takes at most 2"),
        ("generator.tensor_parallel=2", r"generator\.tensor_parallel: only the vllm engine"),
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
            r"eval\.num_gpus: is 0; with .* it must be 1, or a part of one$",
        ),
        ("generator.gpu_memory_fraction=1.5", r"generator\.gpu_memory_fraction: is 1\.5, must be in"),
        ("eval.temperature=-1", r"eval\.temperature: is -1\.0, must be at least 0"),
        ("eval.temperature=nan", r"eval\.temperature: is nan, must be at least 0"),
        ("eval.solved_at=nan", r"eval\.solved_at: is nan, must be finite"),
        ("trainer.updates_per_batch=17", r"trainer\.updates_per_batch: is 17, but a batch has 16 groups .*: lower it"),
        ("trainer.updates_per_batch=0", r"trainer\.updates_per_batch: is 0, must be at least 1"),
        ("loss.name=magic", r"loss\.name: 'magic' is not one of grpo, .*, nor of the form module:function"),
        ("loss=magic", r"Could not find 'loss/magic' Available options in 'loss': .*grpo"),
        ("loss.tau_positive=1", r"loss\.tau_positive: the loss grpo takes .* but clip_low, .*; leave it at null"),
        ("loss=sapo loss.clip_low=0.2", r"loss\.clip_low: the loss sapo takes .* tau_positive, tau_negative; leave it"),
        ("+loss.args.speed=3", r"loss\.args\.speed: the loss grpo takes no such parameter, but clip_low, .*; leave it"),
        ("+loss.args.aggregation=token_mean", r"loss\.args\.aggregation: the loss grpo takes no such parameter"),
        ("+loss.args.beta=1", r"loss\.args\.beta: the loss grpo takes no such parameter"),
        ("loss.kl=k4", r"loss\.kl: 'k4' is not one of k1, k2, k3"),
        ("loss.aggregation=mean", r"loss\.aggregation: 'mean' is not one of null, token_mean, sequence_mean, fixed_"),
        ("loss.horizon=0", r"loss\.horizon: is 0, must be at least 1"),
        ("loss.beta=-1", r"loss\.beta: is -1\.0, must be at least 0"),
        ("loss.clip_low=-1", r"loss\.clip_low: is -1\.0, must be at least 0"),
        ("loss.dual_clip=0.5", r"loss\.dual_clip: is 0\.5, must be at least 1"),
        ("loss=reinforce loss.max_ratio=0", r"loss\.max_ratio: is 0\.0, must be greater than 0"),
        ("loss=sapo loss.tau_negative=0", r"loss\.tau_negative: is 0\.0, must be greater than 0"),
        (
            "correction.high=3",
            r"correction\.weights: no weights are there to bound; take correction=tis, mis, icepop or dec",
        ),
        (
            "correction.low=0.5",
            r"correction\.weights: no weights are there to bound; take correction=tis, mis, icepop or dec",
        ),
        ("correction=tis correction.low=1.5", r"correction\.low: is 1\.5, must be at most 1"),
        ("correction=tis correction.high=0.5", r"correction\.high: is 0\.5, must be at least 1"),
        ("correction=tis correction.low=nan", r"correction\.low: is nan, must be at least 0"),
        ("correction.weights=clip", r"correction\.weights: 'clip' is not one of none, truncate, mask"),
        ("correction=tis correction.level=word", r"correction\.level: 'word' is not one of token, sequence, geometric"),
        ("shaping.overlong=cut", r"shaping\.overlong: 'cut' is not one of keep, mask, penalize"),
        ("shaping.overlong_zone=0.3", r"shaping\.overlong_zone: is 0\.3 with shaping\.overlong=keep; .* the others 0"),
        ("shaping=overlong_mask shaping.overlong_zone=0.3", r"shaping\.overlong_zone: is 0\.3 with .*overlong=mask;"),
        ("shaping.overlong=penalize", r"shaping\.overlong_zone: is 0 with .*=penalize; penalize needs a part of"),
        (
            "shaping=overlong_penalty shaping.overlong_zone=4",
            r"shaping\.overlong_zone: is 4 .* needs a part of rollout",
        ),
        (
            "shaping.clip_low=1 shaping.clip_high=1",
            r"shaping\.clip_low: is 1\.0, must be below shaping\.clip_high=1\.0",
        ),
        (
            "shaping.clip_low=2 shaping.clip_high=1",
            r"shaping\.clip_low: is 2\.0, must be below shaping\.clip_high=1\.0",
        ),
        ("shaping.clip_low=nan", r"shaping\.clip_low: is nan, must be finite"),
        ("shaping.clip_high=inf", r"shaping\.clip_high: is inf, must be finite"),
        ("shaping.scale=0", r"shaping\.scale: is 0\.0, must be greater than 0"),
        ("shaping.scale=inf", r"shaping\.scale: is inf, must be finite"),
        ("shaping.length_penalty=-1", r"shaping\.length_penalty: is -1\.0, must be at least 0"),
        ("filter.max_batches=0", r"filter\.max_batches: is 0, must be at least 1"),
        ("eval.samples=0", r"eval\.samples: is 0, must be at least 1"),
        ("lora.rank=-1", r"lora\.rank: is -1, must be at least 0: 0 trains all weights"),
        ("lora.alpha=0", r"lora\.alpha: is 0\.0, must be greater than 0"),
        ("lora.dropout=1", r"lora\.dropout: is 1\.0, must be in \[0, 1\)"),
        ("lora.target_modules=attention", r"lora\.target_modules: is 'attention', must be all-linear or a list of"),
        ("lora.target_modules=[]", r"lora\.target_modules: is \[\], must be"),
        ("lora.target_modules=[3]", r"lora\.target_modules: is \[3\], must be"),
        ("lora=r7", r"Could not find 'lora/r7' Available options in 'lora': .*r16"),
        ("eval.samples=512", r"eval\.samples: is 512, but .* generator\.max_sequences=256"),
        ("cluster.dashboard=true cluster.address=auto", r"cluster\.dashboard: is for a cluster of the run's own"),
        ("cluster.nodes_timeout_s=-1", r"cluster\.nodes_timeout_s: is -1\.0, must be at least 0"),
        ("cluster.address=ray://head:10001", r"cluster\.address: is 'ray://head:10001', must be auto or HOST:PORT"),
        ("trainer.betas=[0.9]", r"trainer\.betas: is \[0\.9\], must be two numbers in"),
        (
            "task.args.letters=4",
            r"task\.args\.letters: is not there yet; add it with a plus sign, \+task\.args=\{letters: \.\.\.\}",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        checked(*override.split())
    assert "\n" not in str(caught.value)


def micro_batch() -> tuple[torch.Tensor, MicroBatch]:
    """Log-probabilities of a policy, and what they belong to: three answers of up to five tokens."""
    generator = torch.Generator().manual_seed(0)
    policy_BK, behavior_BK = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) / 4 - 1
    advantages_BK = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64).expand(3, 5)
    mask_BK = torch.arange(5) < torch.tensor([[5], [3], [2]])
    others = dict.fromkeys(("versions_BK", "reference_logprobs_BK", "proximal_logprobs_BK"))
    micro = MicroBatch(mask_BK=mask_BK, behavior_logprobs_BK=behavior_BK, advantages_BK=advantages_BK, **others)
    return policy_BK, micro


@pytest.mark.parametrize(
    ("args", "factor"), [([], 2.0), (["+loss.args.factor=3.0"], 3.0), (["+loss.args={factor: 0.5}"], 0.5)]
)
def test_a_loss_of_ones_own_is_named_by_module_and_function_and_gets_its_arguments(args, factor):
    own = ["loss.name=tests.fakes:doubled_grpo", "loss.clip_low=null", "loss.clip_high=null"]
    config = composed(*own, *args)
    policy_BK, micro = micro_batch()
    found = Objective(config.loss, config.correction)(policy_BK, micro, denominator=7.0)
    expected = grpo(policy_BK, micro.behavior_logprobs_BK, factor * micro.advantages_BK, micro.mask_BK, denominator=7.0)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-12)
    assert float(found.loss) != 0


def test_a_loss_of_ones_own_takes_no_arguments_but_its_own():
    own = ["loss.name=tests.fakes:doubled_grpo", "loss.clip_low=null", "loss.clip_high=null"]
    with pytest.raises(
        ConfigError, match=r"^loss\.args\.speed: .* takes no such parameter, but factor; leave it at null$"
    ):
        checked(*own, "+loss.args.speed=3")
    with pytest.raises(
        ConfigError, match=r"^loss\.clip_low: .* takes no such parameter, but factor; leave it at null$"
    ):
        checked("loss.name=tests.fakes:doubled_grpo")


@pytest.mark.parametrize("name", ["aggregation", "beta", "kl", "horizon", "denominator", "reference_logprobs_BT"])
def test_what_every_loss_is_given_is_no_argument_of_its_own(name):
    """Also of a loss that spells it out."""
    with pytest.raises(ConfigError, match=rf"^loss\.args\.{name}: .* takes no such parameter, but sharpness; leave it"):
        Objective(LossConfig(name="tests.fakes:spelled_out", args={name: 1.0}), CorrectionConfig())


def test_more_rollouts_than_tickets_is_a_warning_that_says_how_many_can_run():
    (warning,) = warnings(composed("buffer.max_policy_age=0"))
    assert "only 16 rollouts can ever run" in warning


def test_filters_and_greedy_sampling_are_warned_about():
    found = warnings(composed("rollout.top_k=5", "rollout.temperature=0"))
    assert len(found) == 2


@pytest.mark.parametrize("override", ["eval.temperature=0", "rollout.temperature=0"])
def test_several_greedy_answers_to_a_prompt_are_refused(override):
    with pytest.raises(ConfigError, match=r"eval\.samples: is 4, but at temperature 0 all completions .* are equal"):
        composed("eval.samples=4", override)


def test_algorithms_that_undo_each_other_are_warned_of():
    (warning,) = warnings(composed("filter=zero_advantage", "shaping.length_penalty=0.1"))
    assert warning.startswith("filter.zero_advantage: with shaping.length_penalty above 0")
    (warning,) = warnings(composed("loss.beta=0.1", "loss.kl=k1"))
    assert "take k2 or k3" in warning


@pytest.mark.parametrize("horizonless", ["loss.aggregation=fixed_horizon", "loss.name=dr_grpo"])
def test_a_fixed_horizon_that_is_not_given_is_warned_of(horizonless):
    (warning,) = warnings(composed(horizonless))
    assert warning.startswith("loss.horizon: without it")
    assert warnings(composed(horizonless, "loss.horizon=16")) == []
    assert warnings(composed("loss=dr_grpo")) == []
    assert warnings(composed("loss.name=dr_grpo", "loss.aggregation=token_mean")) == []


@pytest.mark.parametrize("penalty", ["shaping.length_penalty=0.1", "shaping=overlong_penalty"])
def test_max_rl_takes_no_penalty_that_could_make_rewards_negative(penalty):
    with pytest.raises(ConfigError, match=r"^loss\.advantages: max_rl takes rewards of 0 and more, .* or no penalty$"):
        composed("loss.advantages=max_rl", penalty)


def test_evaluations_that_will_not_happen_are_warned_about():
    (warning,) = warnings(composed("eval.every=150"))
    assert "only the start and the end are evaluated" in warning
    (warning,) = warnings(composed("eval.every=10", "eval.prompts=0"))
    assert "nothing is evaluated" in warning


def test_ranks_that_would_have_nothing_to_do_are_warned_about():
    assert warnings(composed("trainer.ranks=16")) == []
    (warning,) = warnings(composed("trainer.ranks=16", "trainer.updates_per_batch=2"))
    assert warning.startswith("trainer.ranks=16: an update has 8 groups")


def test_math_verify_that_can_end_the_run_is_warned_about():
    (warning,) = warnings(composed("+reward.functions.math_verify=0.5"))
    assert "reward.on_error=drop" in warning
    assert warnings(composed("+reward.functions.math_verify=0.5", "reward.on_error=drop")) == []


def test_what_is_left_to_cpus_while_the_trainer_has_gpus_is_warned_about():
    on_gpus = ["trainer.num_gpus=1", "generator.num_gpus=1", "eval.every=10", "loss.beta=0.1"]
    assert warnings(composed(*on_gpus, "eval.num_gpus=1", "reference.num_gpus=0.5")) == []
    assert warnings(composed(*on_gpus, "eval.replicas=0", "lora=r16")) == []
    first, second = warnings(composed(*on_gpus))
    assert first.startswith("reference.num_gpus=0: it computes on CPUs while")
    assert second.startswith("eval.num_gpus=0: it computes on CPUs while")


def test_dropout_of_adapters_is_warned_of():
    assert "lora.dropout=0.1: the trainer sees" in " ".join(warnings(checked("lora=r16", "lora.dropout=0.1")))
    assert not any("lora" in warning for warning in warnings(checked("lora=r16", "lora.target_modules=[q_proj]")))


def test_yaml_round_trip():
    config = composed("task.args.max_letters=4", "trainer.lr=1e-5")
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(to_yaml(config))))
    assert again == config


def test_a_config_in_code_is_checked_like_a_composed_one():
    config = composed()
    config.trainer.groups_per_step = 0
    with pytest.raises(ConfigError, match=r"trainer\.groups_per_step"):
        validate(config)
