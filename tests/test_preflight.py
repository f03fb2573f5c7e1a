import pytest

from grpo import preflight
from grpo.types import GRPOError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.loss, "name", "magic"), r"loss\.name: 'magic' is not one of grpo"),
        (lambda c: setattr(c.loss, "advantages", "magic"), r"loss\.advantages: 'magic' is not one of group_norm"),
        (lambda c: setattr(c.task, "target", "nowhere:Task"), r"task\.target: can't import 'nowhere:Task'"),
        (lambda c: setattr(c.task, "args", {"letters": 3}), r"task\.args: 'letters' is not one of min_letters"),
        (lambda c: setattr(c.task, "args", {"train_size": 0}), r"task\.target: .* has no training problems"),
        (lambda c: setattr(c.reward, "functions", {"magic": 1.0}), r"reward\.functions: 'magic' is neither"),
        (lambda c: setattr(c.generator, "args", {"speed": 3}), r"generator\.args: the torch engine takes none"),
        (lambda c: setattr(c.model, "prepare", "json:dumpz"), r"model\.prepare: can't import"),
    ],
)
def test_names_that_do_not_exist_are_found_before_anything_starts(tiny_config, change, message):
    change(tiny_config)
    with pytest.raises(GRPOError, match=message):
        preflight.check_names(tiny_config)


def test_arguments_of_the_simulated_engine_are_checked(tiny_config):
    tiny_config.generator.engine = "simulated"
    tiny_config.generator.args = {"speed": 3}
    with pytest.raises(GRPOError, match=r"generator\.args: 'speed' is not one of latency_s"):
        preflight.check_names(tiny_config)


def test_a_model_that_cannot_be_reached_names_the_alternative(tiny_config, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr(preflight.AutoConfig, "from_pretrained", unreachable)
    tiny_config.model.path = "somebody/model"
    with pytest.raises(GRPOError, match=r"model\.path: can't load 'somebody/model' .*couldn't connect.*name a folder"):
        preflight.check_model(tiny_config, None)


def test_an_evaluation_without_held_out_prompts_is_found_at_once(tiny_config):
    tiny_config.task.args["held_out_size"] = 0
    task = preflight.check_names(tiny_config)
    preflight.check_model(tiny_config, task)
    tiny_config.eval.prompts = 8
    with pytest.raises(GRPOError, match=r"eval\.prompts: the task has no held-out prompt"):
        preflight.check_model(tiny_config, task)


def test_a_home_folder_is_expanded(tiny_config, monkeypatch, tiny_model_path):
    monkeypatch.setenv("HOME", tiny_model_path)
    tiny_config.model.path = "~"
    task = preflight.check_names(tiny_config)
    preflight.check_model(tiny_config, task)
    assert preflight.prepare_model(tiny_config, task).model.path == tiny_model_path


def test_a_good_config_passes(tiny_config):
    task = preflight.check_names(tiny_config)
    preflight.check_resources(tiny_config)
    preflight.check_model(preflight.prepare_model(tiny_config, task), task)


def test_the_prepared_model_takes_the_place_of_the_path(tiny_config):
    tiny_config.model.path, tiny_config.model.prepare = None, "tests.fakes.prepare_model"
    tiny_config.model.args = {"name": "made"}
    prepared = preflight.prepare_model(tiny_config, preflight.check_names(tiny_config))
    assert (prepared.model.path, prepared.model.prepare) == ("/models/made", None)
