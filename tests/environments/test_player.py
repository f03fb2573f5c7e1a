"""Episodes on a scripted policy: tokens, limits, rewards, and whatever an environment does wrong."""

import asyncio
import logging
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from grpo.environments import Environment, Message, Opening, Reply
from grpo.environments import player as player_module
from grpo.environments.player import merge_runs
from grpo.errors import EnvironmentFailed, EnvironmentInvalid, EnvironmentTimeout, GRPOError, LeaseLost
from grpo.types import Turn
from tests.environments.scripted import PROMPT, TOKENIZER, Game, Policy, ScoredGame, ids, play, play_one, turn

DONE = Reply(done=True, reward=1.0)


@pytest.fixture
def clock(monkeypatch):
    """The clock by which the player measures; it stands still unless a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(player_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# --- tokens ---


async def test_the_next_prompt_is_the_last_one_then_what_was_sampled_then_what_was_given():
    policy = Policy(["12.", "1", "7."])
    opening, [episode] = await play([Game("<", ">>", DONE)], policy)
    assert opening.tolist() == ids("q:")
    assert policy.prompts == [ids("q:"), ids("q:12.<"), ids("q:12.<1.>>")]  # a turn that was cut off is ended
    assert episode.completion.token_ids.tolist() == ids("12.<1.>>7.")


async def test_runs_of_sampled_and_given_tokens_say_which_is_which():
    episode = await play_one(Game("<", ">>", DONE), "12.", "1", "7.")
    completion = episode.completion
    assert completion.turns == (
        Turn(sampled=3, given=1),
        Turn(sampled=1, given=3, finish_reason="length"),
        Turn(sampled=2, reward=1.0),
    )
    assert completion.token_ids[completion.sampled_places()].tolist() == ids("12.17.")
    assert completion.finish_reason == "stop"


async def test_only_sampled_tokens_have_logprobs_and_versions():
    episode = await play_one(Game("<", "<", DONE), turn("12.", version=3), turn("3.", version=3), turn("4.", version=5))
    np.testing.assert_array_equal(episode.completion.logprobs, np.array(ids("12.3.4."), np.float32) / -100)
    assert episode.completion.versions == ((3, 5), (5, 2))


def test_neighbouring_runs_of_one_version_are_joined():
    assert merge_runs([(1, 2), (2, 1), (2, 3), (1, 1), (1, 1)]) == ((1, 2), (2, 4), (1, 2))
    assert merge_runs([]) == ()


async def test_the_first_turns_of_a_group_are_sampled_together_and_the_others_one_by_one():
    policy = Policy(["1.", "22.", "3."], ["1.", "2."], ["1."])
    await play([Game("<", "<", DONE), Game("<", DONE), Game(DONE)], policy)
    first, *others = policy.params
    assert (first.n, first.first_sample, first.first_token) == (3, 0, 0)
    assert {(params.n, params.seed) for params in others} == {(1, 5)}
    # The stream of random numbers of an episode goes on: given tokens take none.
    assert sorted((params.first_sample, params.first_token) for params in others) == [(0, 2), (0, 5), (1, 2)]


async def test_each_episode_hears_its_own_turns():
    games = [Game("<", DONE), Game("<", DONE)]
    _, episodes = await play(games, Policy(["1.", "2."], ["3.", "4."]))
    assert [[said.content for said in game.heard] for game in games] == [["1", "2"], ["3", "4"]]
    assert [episode.completion.token_ids.tolist() for episode in episodes] == [ids("1.<2."), ids("3.<4.")]


async def test_a_reply_without_a_message_gives_nothing():
    policy = Policy(["1.", "2."])
    _, [episode] = await play([Game(Reply(), DONE)], policy)
    assert policy.prompts[1] == ids("q:1.")
    assert episode.completion.sampled_places().tolist() == [0, 1, 2, 3]


async def test_environments_of_a_group_are_made_from_its_problem_and_its_seed():
    made = []
    await play([Game(DONE), Game(DONE)], Policy(["1."], ["1."]), made=made)
    assert made == [(PROMPT.problem, 5)] * 2


async def test_plain_methods_run_in_threads():
    class Plain:
        def begin(self):
            self.threads = [threading.current_thread()]
            return Opening((Message("user", "q:"),))

        def reply(self, said):
            self.threads.append(threading.current_thread())
            return Reply(done=True)

        def score(self):
            self.threads.append(threading.current_thread())
            return 1

        def close(self):
            self.threads.append(threading.current_thread())

    game = Plain()
    assert (await play_one(game, "1.")).reward == 1.0
    assert len(game.threads) == 4
    assert threading.main_thread() not in game.threads


# --- limits ---


async def test_a_turn_that_runs_into_the_limit_of_the_episode_gets_no_reply():
    game = ScoredGame("<")
    episode = await play_one(game, "12.", "345", max_tokens=7)
    assert episode.report.ended_by == "tokens"
    assert [said.content for said in game.heard] == ["12"]
    assert episode.completion.finish_reason == "length"
    assert episode.completion.token_ids.tolist() == ids("12.<345")
    assert episode.reward == 0.25


@pytest.mark.parametrize(("reply", "ended_by", "reward"), [(DONE, "done", 1.0), ("<", "tokens", 0.0)])
async def test_a_turn_that_just_fits_is_heard_and_may_still_win(reply, ended_by, reward):
    episode = await play_one(Game(reply), "123.", max_tokens=4)
    assert (episode.report.ended_by, episode.reward) == (ended_by, reward)


@pytest.mark.parametrize(("max_tokens", "ended_by", "turns"), [(6, "tokens", 1), (7, "tokens", 2), (9, "turns", 2)])
async def test_a_reply_that_leaves_no_room_for_another_token_ends_the_episode(max_tokens, ended_by, turns):
    episode = await play_one(Game("<<<"), "12.", "3", max_tokens=max_tokens, max_turns=2)
    assert (episode.report.ended_by, episode.report.turns) == (ended_by, turns)
    last = episode.completion.turns[-1]
    assert (last.given, episode.completion.sampled_places()[-1]) == (0, len(episode.completion.token_ids) - 1)


async def test_a_turn_may_take_what_is_left_of_the_episode_and_no_more_than_a_turn_may():
    policy = Policy(["12.", "3.", "4."])
    await play([Game("<", "<", DONE)], policy, max_tokens=8, max_turn_tokens=3)
    assert [params.max_tokens for params in policy.params] == [3, 3, 1]
    policy = Policy(["12.", "3."])
    await play([Game("<", DONE)], policy, max_tokens=8)
    assert [params.max_tokens for params in policy.params] == [8, 4]


async def test_a_turn_that_was_cut_off_is_heard_when_there_is_room():
    game = Game("<", DONE)
    await play_one(game, "12", "3.", max_turn_tokens=2)
    assert [said.content for said in game.heard] == ["12", "3"]


async def test_an_episode_that_never_ends_is_ended_after_its_turns():
    episode = await play_one(Game("<"), *["1."] * 5, max_turns=5)
    assert (episode.report.ended_by, episode.report.turns) == ("turns", 5)
    assert episode.completion.turns[-1] == Turn(sampled=2)  # nothing answers the last reply


async def test_an_async_reply_that_takes_too_long_ends_the_episode():
    class Slow(ScoredGame):
        async def reply(self, said):
            if self.heard:
                await asyncio.Event().wait()
            return await super().reply(said)

    game = Slow("<")
    episode = await play_one(game, "1.", "2.", timeout_s=0.2)
    assert (episode.report.ended_by, episode.reward, game.closed) == ("timeout", 0.25, 1)
    assert episode.completion.token_ids.tolist() == ids("1.<2.")


@pytest.mark.parametrize("in_thread", [True, False])
async def test_a_reply_that_overruns_its_time_but_returns_ends_the_episode(clock, in_thread):
    class Late(ScoredGame):
        async def reply(self, said):
            clock.now += 61.0
            return Reply((Message("user", "<"),), reward=0.5)

    class LateInThread(Late):
        def reply(self, said):
            clock.now += 61.0
            return Reply((Message("user", "<"),), reward=0.5)

    episode = await play_one(LateInThread() if in_thread else Late(), "1.", timeout_s=60.0)
    assert (episode.report.ended_by, episode.reward) == ("timeout", 0.25)
    assert episode.completion.turns == (Turn(sampled=2, reward=0.5),)
    assert episode.report.environment_s == 61.0


async def test_a_thread_may_return_though_the_time_is_used_up(clock):
    """It can't be cancelled: it has as much time again."""

    class Late(Game):
        async def begin(self):
            clock.now += 601.0
            return await super().begin()

        def reply(self, said):
            time.sleep(0.05)
            return DONE

    episode = await play_one(Late(), "1.", timeout_s=600.0)
    assert (episode.report.ended_by, episode.reward) == ("done", 1.0)


async def test_the_time_at_the_generator_does_not_count(clock):
    policy = Policy(["1.", "2.", "3."])

    async def slow(prompt_ids, params):
        clock.now += 1000.0
        return await policy(prompt_ids, params)

    _, [episode] = await play([Game("<", "<", DONE)], slow, timeout_s=1.0)
    assert episode.report.ended_by == "done"
    assert (episode.report.generator_s, episode.report.environment_s) == (3000.0, 0.0)


async def test_waiting_for_a_free_thread_does_not_count(clock):
    inside, go = threading.Semaphore(0), threading.Event()

    class Blocking(Game):
        def reply(self, said):
            inside.release()
            go.wait(600)
            return DONE

    async with asyncio.TaskGroup() as group:
        policy = Policy(*[["1."]] * 5)
        playing = group.create_task(play([Blocking() for _ in range(5)], policy, timeout_s=600.0))
        for _ in range(4):  # there are four threads
            await asyncio.to_thread(inside.acquire)
        clock.now += 500.0
        go.set()
    _, episodes = playing.result()
    assert sorted(episode.report.environment_s for episode in episodes) == [0.0, 500.0, 500.0, 500.0, 500.0]


LIMITS = {
    "tokens": {"max_tokens": 2},
    "timeout": {"timeout_s": 1.0},
    "turns": {"max_turns": 1},
}


@pytest.mark.parametrize("limits", [("tokens", "timeout", "turns"), ("timeout", "turns"), ("turns",)])
async def test_of_several_limits_the_first_one_is_told(clock, limits):
    class Late(Game):
        async def reply(self, said):
            clock.now += 2.0
            return await super().reply(said)

    settings = {key: value for limit in limits for key, value in LIMITS[limit].items()}
    assert (await play_one(Late("<" * 100), "1.", **settings)).report.ended_by == limits[0]


async def test_an_environment_that_is_done_has_the_word_before_any_limit(clock):
    class Late(Game):
        async def reply(self, said):
            clock.now += 2.0
            return DONE

    episode = await play_one(Late(), "1.", max_tokens=2, timeout_s=1.0, max_turns=1)
    assert (episode.report.ended_by, episode.reward) == ("done", 1.0)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("on_limit", "reward"), [("score", 0.25), ("zero", 0.0)])
async def test_what_an_episode_earns_at_a_limit_is_a_setting(clock, limit, on_limit, reward):
    class Late(ScoredGame):
        async def reply(self, said):
            clock.now += 2.0
            return Reply((Message("user", "<"),), reward=0.5)

    episode = await play_one(Late(), "1.", on_limit=on_limit, **LIMITS[limit])
    assert (episode.report.ended_by, episode.reward) == (limit, reward)


async def test_an_episode_that_its_environment_ends_is_scored_whatever_the_setting():
    assert (await play_one(ScoredGame(DONE), "1.", on_limit="zero")).reward == 0.25


# --- rewards and numbers ---


async def test_without_a_score_the_rewards_of_the_turns_are_summed():
    replies = [Reply((Message("user", "<"),), reward=reward) for reward in (0.5, -2.0)]
    assert (await play_one(Game(*replies, DONE), "1.", "2.", "3.")).reward == -0.5


@pytest.mark.parametrize("reward", [True, 1, np.float32(1), np.int64(1), np.bool_(True)])
async def test_any_kind_of_number_is_a_reward(reward):
    class Scored(Game):
        async def score(self):
            return reward

    episode = await play_one(Scored(Reply(done=True, reward=reward)), "1.")
    assert (episode.reward, type(episode.reward)) == (1.0, float)
    assert type(episode.completion.turns[0].reward) is float


async def test_methods_that_are_only_inherited_from_the_protocol_are_left_out():
    class Inheriting(Environment):
        async def begin(self):
            return Opening((Message("user", "q:"),))

        async def reply(self, said):
            return DONE

    assert (await play_one(Inheriting(), "1.")).reward == 1.0


async def test_metrics_are_summed_over_the_turns():
    replies = [
        Reply((Message("user", "<"),), metrics={"calls": 2, "errors": 1}),
        Reply(done=True, metrics={"calls": 1}),
    ]
    report = (await play_one(Game(*replies), "1.", "2.")).report
    assert report.metrics == {"calls": 3, "errors": 1}
    assert (report.turns, report.given, report.ended_by) == (2, 1, "done")


# --- what goes wrong ---


def game_with(method, does):
    """A game one of whose methods does something else."""

    class Odd(Game):
        pass

    async def odd(self, *args):
        return does() if callable(does) else does

    setattr(Odd, method, odd)
    return Odd(DONE)


def raises(error):
    def do():
        raise error

    return do


@pytest.mark.parametrize("method", ["begin", "reply", "score"])
@pytest.mark.parametrize(
    "error", [KeyError("x"), TimeoutError(), SystemExit(2), asyncio.CancelledError(), StopIteration()], ids=repr
)
async def test_what_an_environment_raises_names_the_method(method, error):
    game = game_with(method, raises(error))
    with pytest.raises(EnvironmentFailed, match=rf"^{method} raised \w+") as caught:
        await play_one(game, "1.")
    assert type(caught.value) is EnvironmentFailed
    assert "\n" not in str(caught.value)
    assert game.closed == 1


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(2), StopIteration()], ids=repr)
async def test_what_a_thread_raises_is_told_like_anything_else(error):
    class Raising(Game):
        def reply(self, said):
            raise error

    with pytest.raises(EnvironmentFailed, match=r"^reply raised \w+"):
        await play_one(Raising(), "1.")


async def test_a_message_of_several_lines_is_told_on_one():
    with pytest.raises(EnvironmentFailed, match=r"^reply raised ValueError: one two three$"):
        await play_one(Game(ValueError("one\ntwo\n  three")), "1.")


async def test_an_error_of_the_package_passes_as_it_is():
    with pytest.raises(GRPOError, match=r"^a line of ours$") as caught:
        await play_one(Game(GRPOError("a line of ours")), "1.")
    assert type(caught.value) is GRPOError


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("begin", None, "begin returned None"),
        ("begin", Opening(()), "return an Opening with a tuple of Messages"),
        ("begin", Opening("q:"), "return an Opening with a tuple of Messages"),
        ("begin", Opening((Message("user", None),)), "return an Opening with a tuple of Messages"),
        ("reply", None, "reply returned None; return a Reply"),
        ("reply", "<", "reply returned '<'; return a Reply"),
        ("reply", Reply(Message("user", "<")), "return a Reply with a tuple of Messages"),
        ("reply", Reply(({"role": "user", "content": "<"},)), "return a Reply with a tuple of Messages"),
        ("reply", Reply((Message("user", 5),)), "return a Reply with a tuple of Messages"),
        ("reply", Reply((Message("assistant", "5"),)), "only the policy speaks as assistant"),
        ("reply", Reply(reward=math.nan), "reply returned the reward nan; return a finite number"),
        ("reply", Reply(reward=-math.inf), "reply returned the reward -inf"),
        ("reply", Reply(reward=None), "reply returned the reward None"),
        ("reply", Reply(reward="1"), "reply returned the reward '1'"),
        ("reply", Reply(metrics={"x": math.nan}), "reply returned the metrics"),
        ("reply", Reply(metrics=["x"]), "reply returned the metrics"),
        ("score", math.nan, "score returned nan; return a finite number"),
        ("score", None, "score returned None"),
        ("score", "1", "score returned '1'"),
        ("score", [1.0], "score returned"),
    ],
)
async def test_what_an_environment_must_not_return_is_named(method, returned, message):
    game = game_with(method, returned)
    with pytest.raises(EnvironmentInvalid, match=message):
        await play_one(game, "1.")
    assert game.closed == 1


async def test_a_long_value_is_told_in_short():
    with pytest.raises(EnvironmentInvalid) as caught:
        await play_one(game_with("reply", "x" * 10_000), "1.")
    assert len(str(caught.value)) < 200


async def test_episodes_of_a_group_that_begin_differently_are_refused():
    policy, games = Policy([], []), [Game(), game_with("begin", Opening((Message("user", "p:"),)))]
    with pytest.raises(EnvironmentInvalid, match="must begin with the same messages and tools"):
        await play(games, policy)
    assert policy.params == []
    assert [game.closed for game in games] == [1, 1]


@pytest.mark.parametrize(("text", "count"), [("q" * 17, 17), ("", 0)])
async def test_an_opening_that_is_too_long_or_empty_names_both_numbers_and_the_key(text, count):
    game = game_with("begin", Opening((Message("user", text),)))
    with pytest.raises(EnvironmentInvalid, match=rf"begins with {count} tokens.*rollout\.max_prompt_tokens=16$"):
        await play_one(game, "1.")
    assert game.closed == 1


async def test_an_async_begin_that_hangs_is_an_error_for_which_no_process_has_to_go():
    class Hanging(Game):
        async def begin(self):
            await asyncio.Event().wait()

    with pytest.raises(EnvironmentTimeout, match=r"^begin did not return within environment.timeout_s=0.05$") as caught:
        await play_one(Hanging(), timeout_s=0.05)
    assert not caught.value.hung


async def test_a_score_that_hangs_is_an_error():
    class Hanging(Game):
        async def score(self):
            await asyncio.Event().wait()

    with pytest.raises(EnvironmentTimeout, match=r"^score did not return"):
        await play_one(Hanging(DONE), "1.", timeout_s=0.05)


class Hanging(Game):
    """Its reply runs in a thread until the test lets it go."""

    def __init__(self):
        super().__init__()
        self.inside, self.release = threading.Event(), threading.Event()

    def reply(self, said):
        self.inside.set()
        self.release.wait()
        self.closed_before = self.closed


async def test_a_thread_that_hangs_is_an_error_and_says_so_and_is_not_closed(caplog, monkeypatch):
    monkeypatch.setattr(player_module, "_CLOSE_S", 0.02)
    game = Hanging()
    try:
        with pytest.raises(EnvironmentTimeout, match="reply did not return") as caught:
            await play_one(game, "1.", timeout_s=0.05)
        assert caught.value.hung
        assert game.closed == 0
        assert "an environment did not close: TimeoutError" in caplog.text
    finally:
        game.release.set()


async def test_an_environment_is_closed_once_its_thread_has_returned(monkeypatch):
    monkeypatch.setattr(player_module, "_CLOSE_S", 600.0)
    game = Hanging()
    playing = asyncio.create_task(play([game], Policy(["1."])))
    await asyncio.to_thread(game.inside.wait)
    playing.cancel()
    asyncio.get_running_loop().call_later(0.02, game.release.set)
    with pytest.raises(asyncio.CancelledError):
        await playing
    await until_closed(game)
    assert game.closed_before == 0


async def until_closed(game):
    async with asyncio.timeout(60):
        while not game.closed:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_plain_method_that_returns_something_to_await_hangs_as_an_async_one(clock):
    """Its thread has returned: no process has to go."""

    class Wrapped(ScoredGame):
        def reply(self, said):
            return asyncio.Event().wait()

    episode = await play_one(Wrapped(), "1.", timeout_s=0.05)
    assert (episode.report.ended_by, episode.reward) == ("timeout", 0.25)


async def test_an_episode_that_fails_ends_the_others_of_its_group():
    ended = []

    class Waiting(Game):
        async def reply(self, said):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(self)

    class Failing(Game):
        async def reply(self, said):
            await asyncio.sleep(0)
            raise KeyError("x")

    games = [Waiting(), Failing(), Waiting()]
    with pytest.raises(EnvironmentFailed, match="reply raised KeyError"):
        await play(games, Policy(*[["1."]] * 3))
    assert ended == [games[0], games[2]]
    assert [game.closed for game in games] == [1, 1, 1]


async def test_an_error_of_the_generator_passes_and_the_environments_are_closed():
    async def gone(prompt_ids, params):
        raise LeaseLost("generator-0 died")

    games = [Game(), Game()]
    with pytest.raises(LeaseLost, match="generator-0 died"):
        await play(games, gone)
    assert [game.closed for game in games] == [1, 1]


async def test_environments_are_closed_when_the_group_is_cancelled_even_twice():
    asked, may_close, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(Game):
        async def reply(self, said):
            asked.set()
            await asyncio.Event().wait()

        async def close(self):
            await may_close.wait()
            closed.set()

    playing = asyncio.create_task(play([Slow()], Policy(["1."])))
    await asked.wait()
    for _ in range(2):
        playing.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await playing
    may_close.set()
    async with asyncio.timeout(60):
        await closed.wait()


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(2), asyncio.CancelledError()], ids=repr)
async def test_an_environment_that_does_not_close_costs_a_warning(caplog, error):
    game = game_with("close", raises(error))
    with caplog.at_level(logging.WARNING):
        assert (await play_one(game, "1.")).reward == 1.0
    assert f"an environment did not close: {type(error).__name__}" in caplog.text


async def test_a_close_that_hangs_is_left_behind(caplog, monkeypatch):
    monkeypatch.setattr(player_module, "_CLOSE_S", 0.02)

    class Stuck(Game):
        async def close(self):
            await asyncio.Event().wait()

    with caplog.at_level(logging.WARNING):
        assert (await play_one(Stuck(DONE), "1.")).reward == 1.0
    assert "did not close: TimeoutError" in caplog.text


# --- long replies ---


async def test_a_reply_that_is_too_long_is_cut_in_the_middle_and_says_so():
    episode = await play_one(Game("ab" * 60, DONE), "1.", "2.", max_reply_tokens=100, max_tokens=200)
    given = TOKENIZER.decode(episode.completion.token_ids[2:-2], skip_special_tokens=True)
    kept = 2 * len("ab" * 16)
    assert given == f"{'ab' * 16}... {120 - kept} characters left out ...{'ab' * 16}"
    assert episode.completion.turns[0].given <= 100


async def test_a_reply_that_just_fits_is_given_whole():
    episode = await play_one(Game("ab" * 50, DONE), "1.", "2.", max_reply_tokens=100, max_tokens=200)
    assert TOKENIZER.decode(episode.completion.token_ids[2:-2]) == "ab" * 50


async def test_of_a_megabyte_only_a_part_is_tokenized(monkeypatch):
    tokenized, encode = [], TOKENIZER.encode

    def counting(text, **options):
        tokenized.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(TOKENIZER, "encode", counting)
    episode = await play_one(Game("a" + "b" * 1_000_000 + "c", DONE), "1.", "2.", max_reply_tokens=64, max_tokens=200)
    assert sum(tokenized) < 5000
    given = TOKENIZER.decode(episode.completion.token_ids[2:-2])
    assert (given[0], given[-1], episode.completion.turns[0].given <= 64) == ("a", "c", True)
