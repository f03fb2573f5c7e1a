import subprocess
import sys

import pytest

from grpo.observe.sinks.tensorboard import TensorBoardSink

pytest.importorskip("tensorboard")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def text(events, tag):
    (event,) = events.Tensors(tag)
    return event.tensor_proto.string_val[0].decode()


def test_everything_is_read_back(tmp_path):
    sink = TensorBoardSink(tmp_path, {"seed": 3})
    sink.scalars(1, {"loss": 0.5, "reward/mean": 1})
    sink.scalars(2, {"loss": 0.25, "reward/mean": 2})
    sink.histogram(2, "ages", [0, 0, 1, float("nan")])
    sink.histogram(2, "nothing", [])
    rows = [{"prompt": "a|b", "completion": "<x>\ny", "reward": 1.0, "advantage": 1 / 3}]
    sink.text(2, "samples", rows)
    sink.text(2, "no_samples", [])
    sink.summary({"status": "completed"})
    sink.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Tags()["histograms"] == ["ages"]
    (ages,) = events.Histograms("ages")
    assert (ages.step, ages.histogram_value.num, ages.histogram_value.max) == (2, 3, 1)
    assert sum(ages.histogram_value.bucket) == 3
    assert len(ages.histogram_value.bucket) == len(ages.histogram_value.bucket_limit)
    assert set(events.Tags()["tensors"]) == {"config", "samples", "summary"}
    assert "| a\\|b | &lt;x><br>y | 1 | 0.3333 |" in text(events, "samples")
    assert '"seed": 3' in text(events, "config")
    assert "| status | completed |" in text(events, "summary")
    assert set(events.PluginTagToContent("text")) == {"config", "samples", "summary"}


def test_a_resumed_run_takes_the_place_of_what_came_after_the_checkpoint(tmp_path):
    for steps, value in ((range(1, 6), 1), (range(4, 7), 2)):
        sink = TensorBoardSink(tmp_path, {})
        for step in steps:
            sink.scalars(step, {"loss": value})
        sink.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_steps_are_on_disk_before_the_end(tmp_path):
    sink = TensorBoardSink(tmp_path, {})
    sink.scalars(1, {"loss": 1})
    assert [e.step for e in read(tmp_path).Scalars("loss")] == [1]
    sink.close()


def test_torch_is_imported_only_when_the_sink_is_made(tmp_path):
    code = (
        "import sys; from pathlib import Path; from grpo.observe.sinks.tensorboard import TensorBoardSink\n"
        "assert not {'torch', 'tensorboard'} & sys.modules.keys()\n"
        f"TensorBoardSink(Path({str(tmp_path)!r}), {{}}).close()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
