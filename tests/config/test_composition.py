import importlib.util
import inspect
from dataclasses import fields

import pytest
import torch
from omegaconf import OmegaConf

from grpo.algorithms.losses import GRPO, LOSSES, PolicyLoss
from grpo.config.algorithm import LossConfig
from grpo.config.composition import CONFIGS, from_run, to_yaml
from grpo.config.warnings import warnings
from grpo.errors import ConfigError
from grpo.learner.batch import MicroBatch
from grpo.learner.objective import Objective
from grpo.observe.sinks.fanout import SINKS, check_sinks
from tests.composed import assert_refused, checked, composed


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
    if (group, choice) == ("loss", "custom"):
        assert_refused("loss=custom", r"^loss\.name: is null, must be text")
        return
    config = checked(f"{group}={choice}", *GOES_WITH.get((group, choice), []))
    if group in ("model", "task"):  # they reach beyond their own
        return
    values = in_file(group, choice)
    if "horizon" in values:
        values["horizon"] = config.rollout.max_completion_tokens  # to which it refers
    found = vars(getattr(config, group))
    assert {name: ({**found, **found.get("args", {})})[name] for name in values} == values


@pytest.mark.parametrize("correction", ["none", "tis", "mis", "icepop", "decoupled"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_with_every_correction(loss, correction):
    config = composed(f"loss={loss}", f"correction={correction}")
    assert Objective(config.loss, config.correction).needs_proximal == (correction != "none")


BEYOND_THE_CLASS = {"dapo": {"dual_clip": 3.0}}  # which null switches off


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
    parameters = inspect.signature(check_sinks({name: {}})[name]).parameters.values()
    assert options == {p.name: p.default if p.default != () else [] for p in parameters if p.kind is p.KEYWORD_ONLY}
    check_sinks({name: options})


def test_every_loss_has_a_choice_of_its_name():
    assert {path.stem for path in (CONFIGS / "loss").glob("*")} == {*LOSSES, "custom"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_choice_of_a_loss_says_what_the_class_does_by_itself(name):
    values = in_file("loss", name)
    own = {field.name for field in fields(LOSSES[name])} - {field.name for field in fields(PolicyLoss)}
    defaults = {key: value for key, value in vars(LOSSES[name]()).items() if key in own and value is not None}
    assert values["name"] == name
    assert values.get("aggregation", "token_mean") == LOSSES[name]().aggregation
    given = {key: value for key, value in values.items() if key not in {field.name for field in fields(LossConfig)}}
    assert given == defaults | BEYOND_THE_CLASS.get(name, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sinks=papers", r"Could not find 'sinks/papers' Available options in 'sinks': .*tensorboard"),
        (
            "observe.sinks.wandb.mode=offline",
            r"observe\.sinks\.wandb: not set by default; prefix it with `\+`, as in \+observe\.sinks={wandb",
        ),
        ("trainer.stepz=3", r"trainer\.stepz: no such key; did you mean trainer\.\w+\?"),
        ("+trainer.stepz=3", r"trainer\.stepz: no such key"),
        ("++extra=3", r"extra: no such key"),
        ("rolout.concurrency=3", r"rolout: no such key; did you mean rollout\?"),
        ("trainer.max_steps=many", r"trainer\.max_steps: is 'many', must be an integer"),
        ("task=chess", r"Could not find 'task/chess' Available options in 'task': .*sorting"),
        ("+experiment=chess", r"Could not find 'experiment/chess' Available options"),
        ("loss.name=magic", r"loss\.name: 'magic' is not one of grpo, .*, nor of the form module:function"),
        ("loss=magic", r"Could not find 'loss/magic' Available options in 'loss': .*grpo"),
        ("loss.tau_positive=1", r"loss\.tau_positive: no such key; it takes .*, clip_low, clip_high, dual_clip"),
        ("loss=sapo loss.clip_low=0.2", r"loss\.clip_low: no such key; it takes .*, tau_positive, tau_negative"),
        ("loss.clip_hihg=0.2", r"loss\.clip_hihg: no such key; did you mean loss\.clip_high\?"),
        ("loss.dual_clip=0.5", r"loss\.dual_clip: is 0\.5, must be at least 1"),
        ("+loss.args.speed=3", r"loss\.speed: no such key; it takes .*, clip_low, clip_high, dual_clip"),
        ("+loss.args.aggregation=token_mean", r"loss\.args\.aggregation: .* set loss\.aggregation"),
        ("+loss.args.beta=1", r"loss\.args\.beta: is no parameter of a single loss; set loss\.beta"),
        ("lora=r7", r"Could not find 'lora/r7' Available options in 'lora': .*r16"),
        (
            "task.args.letters=4",
            r"task\.args\.letters: not set by default; prefix it with `\+`, as in \+task\.args=\{letters: \.\.\.\}",
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
    ("args", "factor"),
    [([], 2.0), (["loss.factor=4"], 4.0), (["+loss.args.factor=3.0"], 3.0), (["+loss.args={factor: 0.5}"], 0.5)],
)
def test_a_loss_of_ones_own_is_named_by_module_and_class_and_gets_its_parameters(args, factor):
    config = composed("loss.name=tests.fakes:ScaledGRPO", *args)
    policy_BK, micro = micro_batch()
    found = Objective(config.loss, config.correction)(policy_BK, micro, denominator=7.0)
    scaled_BK = factor * micro.advantages_BK
    expected = GRPO()(policy_BK, micro.behavior_logprobs_BK, scaled_BK, micro.mask_BK, denominator=7.0)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-12)
    assert float(found.loss) != 0


def test_a_parameter_of_null_is_left_out():
    own = ["loss.name=tests.learner.test_objective:Bold", "loss.clip_low=null", "loss.clip_high=null"]
    assert checked(*own, "loss.boldness=2").loss.args == {"boldness": 2}
    with pytest.raises(ConfigError, match=r"^loss\.clip_low: no such key; it takes .*boldness$"):
        checked("loss.name=tests.learner.test_objective:Bold")


def test_yaml_round_trip(tmp_path):
    config = composed("task.args.max_letters=4", "trainer.lr=1e-5")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_run(tmp_path) == config
