from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from grpo.composition import explain, from_hydra, register, to_yaml
from grpo.config import RunConfig
from grpo.types import ConfigError
from grpo.validation import validate, warnings

CONFIGS = Path(__file__).parents[1] / "configs"


def composed(*overrides) -> RunConfig:
    """As `python scripts/train.py *overrides` would see it; raises ConfigError as the script would print it."""
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return from_hydra(compose("config", overrides=list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def test_the_default_is_the_design():
    config = composed()
    assert (config.rollout.concurrency, config.rollout.group_size, config.buffer.max_policy_age) == (32, 8, 1)
    assert config.ticket_capacity == 32
    assert warnings(config) == []


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    needs_a_model = "override /model: hf" in (CONFIGS / f"experiment/{experiment}.yaml").read_text()
    composed(f"+experiment={experiment}", *(["model.path=x"] if needs_a_model else []))


@pytest.mark.parametrize(
    ("group", "choice"),
    sorted(
        (path.parent.name, path.stem)
        for group in ("model", "task", "dataloader", "loss")
        for path in (CONFIGS / group).glob("*")
    ),
)
def test_every_choice_of_a_group_composes(group, choice):
    composed(f"{group}={choice}", *(["model.path=x"] if (group, choice) == ("model", "hf") else []))


@pytest.mark.parametrize(
    ("override", "message"),
    [
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
        ("trainer.num_cpus=-1", r"trainer\.num_cpus: is -1\.0, must be at least 0"),
        ("trainer.betas=[0.9,1.0]", r"trainer\.betas: .* two numbers in"),
        ("reward.functions.task=nan", r"reward\.functions: the weight of task is nan, must be finite"),
        ("model.dtype=float16", r"model\.dtype: 'float16' is not one of float32, bfloat16"),
        ("rollout.top_p=0", r"rollout\.top_p: is 0\.0, must be in \(0, 1\]"),
        ("dataloader.sampling=hard", r"dataloader\.sampling: 'hard' is not one of uniform, difficulty"),
        ("dataloader.revisit=0", r"dataloader\.revisit: is 0\.0, must be in \(0, 1\], .* 0\.1 is usual"),
        ("dataloader.revisit=1.5", r"dataloader\.revisit: is 1\.5, must be in \(0, 1\]"),
        ("dataloader.revisit=nan", r"dataloader\.revisit: is nan, must be in \(0, 1\]"),
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
        ("eval.samples=0", r"eval\.samples: is 0, must be at least 1"),
        ("eval.samples=512", r"eval\.samples: is 512, but .* generator\.max_sequences=256"),
        ("trainer.betas=[0.9]", r"trainer\.betas: is \[0\.9\], must be two numbers in"),
        (
            "task.args.letters=4",
            r"task\.args\.letters: is not there yet; add it with a plus sign, \+task\.args\.letters=",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        composed(*override.split())
    assert "\n" not in str(caught.value)


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


def test_evaluations_that_will_not_happen_are_warned_about():
    (warning,) = warnings(composed("eval.every=150"))
    assert "only the start and the end are evaluated" in warning
    (warning,) = warnings(composed("eval.every=10", "eval.prompts=0"))
    assert "nothing is evaluated" in warning


def test_math_verify_that_can_end_the_run_is_warned_about():
    (warning,) = warnings(composed("+reward.functions.math_verify=0.5"))
    assert "reward.on_error=drop" in warning
    assert warnings(composed("+reward.functions.math_verify=0.5", "reward.on_error=drop")) == []


def test_yaml_round_trip():
    config = composed("task.args.max_letters=4", "trainer.lr=1e-5")
    from omegaconf import OmegaConf

    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(to_yaml(config))))
    assert again == config


def test_a_config_in_code_is_checked_like_a_composed_one():
    config = composed()
    config.trainer.groups_per_step = 0
    with pytest.raises(ConfigError, match=r"trainer\.groups_per_step"):
        validate(config)
