import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, GPTNeoConfig, MambaConfig

from grpo.actors.specs import actor_specs
from grpo.cli import preflight
from grpo.config.actors import LoraConfig, ModelConfig
from grpo.errors import ConfigError, GRPOError
from grpo.models import loading
from grpo.models.export import export_adapters
from grpo.models.loading import load_model
from grpo.models.lora import add_adapters
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.weights.payload import trained_parameters


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
        (lambda c: setattr(c.observe, "sinks", {"magic": {}}), r"observe\.sinks: 'magic' is not one of tensorboard"),
        (lambda c: setattr(c.model, "builder", "json:dumpz"), r"model\.builder: can't import"),
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

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
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


@pytest.fixture
def checked(tiny_config):
    """What the actors get once everything has been looked at."""

    def check():
        task = preflight.check_names(tiny_config)
        prepared = preflight.prepare_model(tiny_config, task)
        preflight.check_model(prepared, task)
        preflight.check_runnable(prepared)
        return prepared

    return check


@pytest.fixture
def model_folder(tiny_config, tmp_path):
    """A model folder that a test may change."""
    tiny_llama(width=16, layers=1, heads=2).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    tiny_config.model.path = str(tmp_path)
    return tmp_path


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("context", "asked", "limit"),
    [(512, 500, 500), (512, 504, 504), (512, 600, 504), (14, 16, 6)],
)
def test_prompts_get_what_the_models_context_has_room_for(tiny_config, model_folder, checked, context, asked, limit):
    change_json(model_folder / "config.json", max_position_embeddings=context)
    tiny_config.rollout.max_prompt_tokens, tiny_config.rollout.max_completion_tokens = asked, 8
    assert checked().rollout.max_prompt_tokens == limit
    assert tiny_config.rollout.max_prompt_tokens == asked


def test_completions_that_fill_the_context_name_the_keys(tiny_config, checked):
    tiny_config.rollout.max_completion_tokens = 512
    with pytest.raises(GRPOError, match=r"^rollout\.max_completion_tokens: is 512, .* context of 512 tokens; lower it"):
        checked()


def test_no_prompt_within_the_context_names_the_keys(tiny_config, checked):
    tiny_config.rollout.max_completion_tokens = 509
    with pytest.raises(GRPOError, match=r"^rollout\.max_prompt_tokens: none .* 3 tokens; .*max_completion_tokens"):
        checked()


def test_a_base_model_for_a_chat_task_names_the_setting(tiny_config, checked):
    tiny_config.task.template = "chat"
    with pytest.raises(GRPOError, match=r"^task\.template: the model has no chat template; set task\.template=plain"):
        checked()


def test_weights_that_are_no_safetensors_have_to_be_asked_for(model_folder, checked):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(GRPOError, match=r"^model\.allow_pickle: .* set it to true"):
        checked()


def test_a_model_with_code_of_its_own_has_to_be_trusted(model_folder, checked):
    change_json(model_folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (model_folder / "own.py").write_text("raise SystemError('this code must not run')")
    with pytest.raises(GRPOError, match=r"^model\.trust_remote_code: .* code of its own; set it to true if you trust"):
        checked()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1), r"^generator\.engine: .* MambaForCausalLM"),
        (CLIPConfig(), r"^model\.path: can't load .*Unrecognized configuration class"),
    ],
)
def test_what_is_no_model_for_us_is_refused(model_folder, checked, settings, message):
    settings.save_pretrained(model_folder)
    with pytest.raises(GRPOError, match=message) as raised:
        checked()
    assert "\n" not in str(raised.value)


def test_an_attention_that_the_model_does_not_have_names_the_key(tiny_config, model_folder, checked):
    GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]).save_pretrained(model_folder)
    tiny_config.model.attention = "sdpa"
    with pytest.raises(GRPOError, match=r"^model\.attention: gpt_neo models have no sdpa; use auto"):
        checked()


def test_a_good_config_passes(tiny_config):
    task = preflight.check_names(tiny_config)
    preflight.check_resources(tiny_config, actor_specs(tiny_config), pytest.fail)
    preflight.check_model(preflight.prepare_model(tiny_config, task), task)


def test_the_prepared_model_takes_the_place_of_the_path(tiny_config, tiny_model_path):
    tiny_config.model.path, tiny_config.model.builder = None, "tests.fakes.prepare_model"
    tiny_config.model.args = {"folder": tiny_model_path}
    prepared = preflight.prepare_model(tiny_config, preflight.check_names(tiny_config))
    assert (prepared.model.path, prepared.model.builder) == (tiny_model_path, None)


def test_actors_get_absolute_paths(tiny_config, tiny_model_path, monkeypatch):
    folder = Path(tiny_model_path)
    monkeypatch.chdir(folder.parent)
    task = preflight.check_names(tiny_config)
    tiny_config.model.path, tiny_config.task.path = f"./{folder.name}", "problems.jsonl"
    prepared = preflight.prepare_model(tiny_config, task)
    assert prepared.model.path == str(folder)
    assert prepared.task.path == str(folder.parent / "problems.jsonl")


def test_a_vllm_that_is_not_there_is_named_with_the_line_to_type(tiny_config, monkeypatch):
    tiny_config.generator.engine = "vllm"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GRPOError, match=r"^generator\.engine: vllm is not installed: pip install -e '\.\[vllm\]'"):
        preflight.check_names(tiny_config)


def test_a_peft_that_is_not_there_is_named_with_the_line_to_type(tiny_config, monkeypatch):
    tiny_config.lora.rank = 4
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GRPOError, match=r"^lora\.rank: needs peft: pip install -e '\.\[lora\]'"):
        preflight.check_names(tiny_config)


def test_adapters_of_what_the_model_has_not_are_refused(tiny_config, checked):
    tiny_config.lora.rank, tiny_config.lora.target_modules = 4, ["query"]
    with pytest.raises(GRPOError, match=r"^lora\.target_modules: 'query' is not an nn\.Linear of LlamaForCausalLM"):
        checked()
    tiny_config.lora.target_modules = "all-linear"
    checked()


def test_a_folder_of_adapters_is_merged_before_the_actors_see_it(tiny_config, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_model(ModelConfig(path=tiny_model_path), torch.float32, "cpu")
    add_adapters(model, LoraConfig(rank=2))
    export_adapters(ModelConfig(path=tiny_model_path), LoraConfig(rank=2), trained_parameters(model), tmp_path / "a")
    tiny_config.model.path = str(tmp_path / "a")
    task = preflight.check_names(tiny_config)
    prepared = preflight.prepare_model(tiny_config, task)
    assert Path(prepared.model.path).parent == tmp_path / "cache/grpo"
    preflight.check_model(tiny_config, task)
    change_json(tmp_path / "a/adapter_config.json", base_model_name_or_path="/gone")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(
        (tmp_path / "a/adapter_model.safetensors").read_bytes() + b" "
    )
    with pytest.raises(GRPOError, match=r"^model\.path: can't merge the adapters at .*adapter_config.json there names"):
        preflight.prepare_model(tiny_config, task)


def test_reward_functions_have_no_part_in_episodes(tiny_config):
    tiny_config.task.target, tiny_config.task.args = "tests.fake_environments:Words", {}
    with pytest.raises(ConfigError, match=r"^reward\.functions: is .* leave it out$"):
        preflight.check_names(tiny_config)
    tiny_config.reward.functions = {"task": 1.0}
    preflight.check_names(tiny_config)
