"""The `grpo` command, up to what it calls."""

import sys

import pytest

import grpo
from grpo.cli.main import COMMANDS, main
from grpo.utils.imports import import_target


@pytest.fixture
def typed(monkeypatch, capsys):
    def type_in(*words):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/grpo", *words])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return type_in


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_it_lists_its_commands(typed, words):
    code, stdout, _ = typed(*words)
    assert code == 0
    assert all(f"\n  {name} " in stdout for name in COMMANDS)


def test_it_has_a_version(typed):
    assert typed("--version") == (0, f"grpo {grpo.__version__}\n", "")


def test_an_unknown_command_is_one_line(typed):
    code, stdout, stderr = typed("trian")
    assert code == "error: no command 'trian'; there are train, evaluate, export, report, scale, tune"
    assert (stdout, stderr) == ("", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    assert callable(import_target(COMMANDS[name], key=name))


@pytest.mark.parametrize("name", ["export", "report", "scale", "tune"])
def test_help_names_the_command_as_it_was_typed(typed, name):
    code, stdout, _ = typed(name, "--help")
    assert code == 0
    assert stdout.startswith(f"usage: grpo {name} ")


def test_a_mistake_in_the_arguments_is_one_line(typed):
    code, _, stderr = typed("report")
    assert code == "error: the following arguments are required: runs; --help tells more"
    assert stderr == ""


def test_a_mistake_in_the_settings_is_one_line(typed):
    code, _, stderr = typed("train", "trainer.stepz=3", "hydra.run.dir=/nowhere")
    assert code != 0
    assert (str(code) + stderr).startswith("error: trainer.stepz: no such key")
