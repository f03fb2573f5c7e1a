import importlib.util
import subprocess
import sys

import pytest

from grpo.errors import ConfigError
from grpo.observe.sinks.fanout import SINKS, check_sinks, make_sinks

made = []


class Own:
    """A sink of somebody's own."""

    def __init__(self, folder, config, /, *, color="red"):
        made.append((folder, config, color))

    def close(self):
        made.append("closed")


def test_one_of_your_own(tmp_path):
    made.clear()
    make_sinks({f"{__name__}:Own": {"color": "blue"}}, tmp_path, {"seed": 1}, print).close()
    make_sinks({f"{__name__}.Own": {}}, tmp_path, {"seed": 1}, print).close()
    assert made == [(tmp_path, {"seed": 1}, "blue"), "closed", (tmp_path, {"seed": 1}, "red"), "closed"]


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (
            {"tensorbored": {}},
            "observe.sinks: 'tensorbored' is not one of tensorboard, wandb, trackio, ray",
        ),
        ({"no_such_module:Sink": {}}, "observe.sinks: can't import 'no_such_module:Sink'"),
        ({"wandb": {"projekt": "x"}}, "observe.sinks.wandb: 'projekt' is not one of project, name, mode"),
        ({"wandb": {"folder": "x"}}, "observe.sinks.wandb: 'folder' is not one of"),
        ({"tensorboard": True}, "observe.sinks.tensorboard: is True, must be a mapping of options, {} for none"),
    ],
)
def test_what_cannot_be_is_refused(sinks, message):
    with pytest.raises(ConfigError) as refused:
        check_sinks(sinks)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", SINKS)
def test_a_package_that_is_missing_is_named_with_the_line_to_type(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as refused:
        check_sinks({name: {}})
    assert str(refused.value) == (
        f"observe.sinks.{name}: {SINKS[name].package} is not installed: pip install -e '.[{SINKS[name].extra}]'"
    )


def test_to_check_imports_nothing_heavy():
    code = (
        "import sys; from grpo.observe.sinks.fanout import check_sinks\n"
        "check_sinks({'tensorboard': {}, 'wandb': {'mode': 'offline'}})\n"
        "assert not {'torch', 'ray', 'tensorboard', 'wandb'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
