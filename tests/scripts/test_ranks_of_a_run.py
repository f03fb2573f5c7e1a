"""A run goes on with another number of ranks: what one number has saved, another one loads."""

import json

from tests.scripts.processes import finish

SMALL = (
    "checkpoint.every=2", "trainer.groups_per_step=4", "rollout.group_size=4", "rollout.max_completion_tokens=8",
    "reward.workers=1", "+reward.functions={tests.fake_rewards.vowel_share: 1.0}", "eval.prompts=0",
    "trainer.num_cpus=0.5", "hydra.run.dir=run",
)  # fmt: skip


def test_a_run_goes_on_with_more_ranks(train, tmp_path):
    for ranks, steps in ((1, 2), (2, 4)):
        resume = ("resume=run",) if steps > 2 else ()
        settings = (*SMALL, *resume, f"trainer.ranks={ranks}", f"trainer.max_steps={steps}")
        code, _, stderr = finish(train(*settings))
        assert (code, stderr) == (0, "")
        newest = tmp_path / f"run/checkpoints/step_{steps:06d}"
        assert len(list(newest.glob("trainer*.safetensors"))) == ranks
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["trainer/grad_norm"] > 0 for line in lines)
    processes = {
        event["args"]["name"]
        for event in json.loads((tmp_path / "run/timeline.json").read_text())
        if event["name"] == "process_name"
    }
    assert {"trainer-0", "trainer-1"} <= processes
