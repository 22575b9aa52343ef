"""What a person sees, word by word."""

import io
import math
import subprocess
import sys
import time
from typing import Any

import pytest

from reasoner import console
from reasoner.console import Console, closing_table, duration, hints, progress_line, rate, sample_lines, short, visible
from reasoner.types import Completion, Group, Prompt, Score

GRPO: dict[str, Any] = {
    "stage": "grpo",
    "step": 41,
    "reward_mean": 0.6130,
    "solved_share": 0.58,
    "useful_groups": 13.0,
    "groups": 32.0,
    "reward_failures": 0.0,
    "completion_tokens_mean": 214.2,
    "cut_share": 0.03,
    "entropy": 0.5,
    "logprob_gap_mean": 0.0214,
    "grad_norm": 0.3,
    "generate_s": 3.11,
    "reward_s": 0.2,
    "logprobs_s": 0.4,
    "update_s": 6.0,
    "step_s": 9.8,
    "tokens_per_s": 6712.0,
}
SFT = {
    "stage": "sft",
    "step": 120,
    "loss": 0.4117,
    "examples": 64.0,
    "grad_norm": 1.0,
    "step_s": 0.12,
    "tokens_per_s": 5100.0,
}
ESCAPES = "\x1b[2J\x07[bold]red[/bold] :smile: \u202e\x9b31m\r"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def group(*scored: tuple[str, float], prompt: str = "2+2=", finish: Any = "stop") -> Group:
    completions = tuple(Completion((1, 2), (True, True), (0.0, 0.0), text, finish, 0, 0) for text, _ in scored)
    scores = tuple(Score(total, {"accuracy": total}) for _, total in scored)
    return Group(Prompt("train:17", prompt, "4", {}, (1,)), completions, scores)


def plain(monkeypatch: pytest.MonkeyPatch, seconds: list[float] | None = None) -> tuple[Console, io.StringIO]:
    if seconds is not None:
        ticks = iter(seconds)
        monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    out = io.StringIO()
    return Console(out), out


def test_grpo_line() -> None:
    assert progress_line(GRPO, 250, eta_s=2048.2) == (
        "grpo 41/250 · reward 0.61 · solved 58% · useful groups 13/32 · length 214 (cut 3%) · gap .021 · "
        "9.8 s (sample 3.1 score .2 update 6.4) · 6.7K tok/s · ETA 34 min"
    )


def test_sft_line() -> None:
    assert progress_line(SFT, 600, eta_s=57.6 + 5) == "sft 120/600 · loss 0.412 · 64 examples · 5.1K tok/s · ETA 1 min"
    assert progress_line({**SFT, "step": 600}, 600, 0.0).endswith("5.1K tok/s"), "no ETA at the end"


def test_line_of_a_step_that_measured_nothing() -> None:
    line = progress_line(
        {**GRPO, "reward_mean": math.nan, "solved_share": math.nan, "logprob_gap_mean": math.nan}, 250, 1.0
    )
    assert "reward - · solved - · " in line
    assert " · gap - · " in line


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (3569, "59 min"),
        (3571, "1 h 00 min"),
        (8000, "2 h 13 min"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_numbers() -> None:
    assert [rate(n) for n in (0, 812.4, 999.6, 6712, 999_960, 2.5e6)] == ["0", "812", "1.0K", "6.7K", "1.0M", "2.5M"]
    assert [short(n, 2) for n in (0.214, -0.214, 10.5, 0.0, math.inf)] == [".21", "-.21", "10.50", ".00", "-"]


def test_a_good_row_earns_no_hint() -> None:
    assert hints(GRPO, entropy_at_start=0.6) == {}
    assert hints(SFT, entropy_at_start=0.0) == {}


@pytest.mark.parametrize(
    ("change", "name", "key"),
    [
        ({"cut_share": 0.31}, "cut", "31% of the completions were cut: raise grpo.max_completion_tokens"),
        ({"useful_groups": 3.0, "solved_share": 0.9}, "groups", "useful groups 3/32: the problems are too easy"),
        (
            {"useful_groups": 3.0, "solved_share": 0.1},
            "groups",
            "too hard to learn from; give easier ones in grpo.data",
        ),
        ({"useful_groups": 0.0, "solved_share": 0.5}, "groups", "see what reward.parts tells apart"),
        ({"logprob_gap_mean": 0.051}, "gap", "differ by .051 nats a token: model.dtype=float32"),
        ({"grad_norm": math.inf}, "gradient", "lower grpo.optim.lr"),
        ({"grad_norm": math.nan}, "gradient", "lower grpo.optim.lr"),
        ({"entropy": 0.059}, "entropy", "entropy fell from .600 to .059 nats, samples are alike: lower grpo.optim.lr"),
        ({"reward_failures": 2.0}, "failures", "2 rewards failed and count for nothing"),
    ],
)
def test_a_bad_number_earns_one_hint_with_the_key_to_change(change: dict, name: str, key: str) -> None:
    found = hints({**GRPO, **change}, entropy_at_start=0.6)
    assert list(found) == [name]
    assert key in found[name]


def test_a_hint_is_given_once_in_so_many_steps_and_anew_in_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    for step in range(1, 2 * console.HINT_EVERY + 1):
        speaker.progress({**GRPO, "step": step, "cut_share": 0.5}, 1000)
    assert out.getvalue().count("hint at grpo step") == 2
    assert f"hint at grpo step {console.HINT_EVERY + 1}: 50% of the completions were cut" in out.getvalue()
    speaker.progress({**GRPO, "step": 101, "grad_norm": math.nan}, 1000)
    speaker.progress({**SFT, "step": 1, "grad_norm": math.nan}, 1000)
    assert (
        "hint at sft step 1: the gradient is not finite, so the step moved no weight: lower sft.optim.lr"
        in out.getvalue()
    )


def test_entropy_collapse_is_judged_against_the_stage_s_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    for step, entropy in enumerate([math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 0.3, 0.09], start=1):
        assert "hint" not in out.getvalue()
        speaker.progress({**GRPO, "step": step, "entropy": entropy}, 1000)
    assert "hint at grpo step 8: entropy fell from 1.000 to .090 nats" in out.getvalue()


def test_sample_shows_the_prompt_s_end_and_the_best_and_the_worst() -> None:
    lines = sample_lines(group(("so\n5", 0.0), ("#### 4", 1.0), ("4?", 0.5), prompt="x" * 300 + "2+2="))
    assert lines == [
        "prompt train:17",
        f"  | … {'x' * 196}2+2=",
        "reward 1.00: accuracy 1.00 · 2 tokens",
        "  | #### 4",
        "reward 0.00: accuracy 0.00 · 2 tokens",
        "  | so",
        "  | 5",
    ]


def test_sample_of_equal_rewards_shows_one_and_cut_and_failed_ones_say_so() -> None:
    assert len(sample_lines(group(("a", 1.0), ("b", 1.0)))) == 4
    completion = Completion((1,), (True,), (0.0,), "a", "length", 0, 0)
    score = Score(0.0, {"format": 0.5}, {"accuracy": "timed out after 5 s"})
    assert console.score_line(completion, score) == (
        "reward 0.00: format 0.50 · accuracy failed (timed out after 5 s) · 1 token, cut"
    )
    long = sample_lines(group(("a" * 500 + "b" * 500, 1.0)))[-1]
    assert long == f"  | {'a' * 400} … {'b' * 400}"


def test_samples_picks_the_group_that_differs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    speaker.samples(40, [group(("dull", 1.0), ("dull", 1.0)), group(("good", 1.0), ("bad", 0.0))])
    speaker.samples(50, [])
    assert out.getvalue().splitlines()[0] == "sample of step 40"
    assert "good" in out.getvalue()
    assert "bad" in out.getvalue()
    assert "dull" not in out.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_model_s_text_can_neither_drive_the_terminal_nor_be_markup(
    stream: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = stream()
    Console(out).samples(1, [group((ESCAPES, 1.0), prompt=ESCAPES)])
    shown = r"\x1b[2J\x07[bold]red[/bold] :smile: \u202e\x9b31m\r"
    assert out.getvalue().count(shown) == 2
    assert not set(out.getvalue()) & set("\x1b\x07\r\x9b\u202e")


def test_visible_keeps_what_is_only_text() -> None:
    assert visible("ü 漢\n\ta\ud800") == "ü 漢\n    a\\ud800"


def test_plain_lines_at_most_one_a_second_and_always_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    #                                       step 1 prints, 2 and 3 come too soon, 4 prints, 5 is too soon but the last
    speaker, out = plain(monkeypatch, [0.0, 0.0, 0.4, 0.9, 1.0, 1.0, 1.2])
    for step in range(1, 6):
        speaker.progress({**SFT, "step": step}, 5)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/5", "4/5", "5/5"]


def test_plain_line_that_waited_is_kept_when_the_run_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch, [0.0, 0.0, 0.4, 0.5])
    with speaker:
        for step in (1, 2):
            speaker.progress({**SFT, "step": step}, 5)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/5", "2/5"]


def test_terminal_redraws_one_line_and_keeps_the_last() -> None:
    out = Terminal()
    with Console(out) as speaker:
        speaker.progress({**SFT, "step": 1}, 600)
        speaker.say("saved")
        speaker.progress({**SFT, "step": 2}, 600)
    text = out.getvalue()
    assert "\x1b[2K" in text, "a line is wiped before it is drawn again"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is there again"
    assert text.endswith("sft 2/600 · loss 0.412 · 64 examples · 5.1K tok/s · ETA 1 min\n")
    assert "saved\n" in text


def test_eta_is_the_mean_of_recent_steps_of_this_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    speaker.progress({**SFT, "step": 1, "step_s": 1000.0}, 2)
    speaker.progress({**GRPO, "step": 1, "step_s": 10.0}, 7)
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    speaker.progress({**GRPO, "step": 2, "step_s": 20.0}, 7)
    assert out.getvalue().splitlines()[-1].endswith("ETA 1 min"), "5 x 15 s"


def test_lines_are_never_wrapped_or_coloured_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    speaker.say("12345 'quoted' http://x " * 20)
    assert out.getvalue() == "12345 'quoted' http://x " * 20 + "\n"


def test_output_that_cannot_say_a_character_gets_a_question_mark() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    Console(out).say("reward · 漢")
    out.seek(0)
    assert out.read() == "reward ? ?\n"


def test_reader_that_went_away_does_not_stop_the_run() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    out = Closed()
    speaker = Console(out)
    speaker.say("a")
    speaker.say("b")
    assert out.writes == 1


def test_g4_run_into_a_closed_pipe_ends_as_usual() -> None:
    code = "from reasoner.console import Console\nc = Console()\nfor _ in range(9): c.say('x' * 9000)"
    script = f'"{sys.executable}" -c "{code}" | head -c 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("x", "", 0)


def test_closing_table() -> None:
    row = {"set": "heldout", "problems": 1024, "mean_tokens": 3.04, "cut_share": 0.0}
    base = {"row": "base", "greedy_accuracy": 0.0, "greedy_low": 0.0, "greedy_high": 0.0037}
    grpo = {"row": "grpo", "greedy_accuracy": 0.6416, "greedy_low": 0.6118, "greedy_high": 0.6704}
    rows = [
        {**row, **base, "sampled_accuracy": 0.002, "pass_at_8": 0.0144, "cut_share": 1.0, "mean_tokens": 12.0},
        {**row, **grpo, "sampled_accuracy": 0.455, "pass_at_8": 0.9},
        {**row, **grpo, "set": "easy", "problems": 32, "sampled_accuracy": None, "pass_at_8": None},
    ]
    assert closing_table(rows) == [
        "heldout: 1,024 held-out problems",
        "       greedy     95% interval   sampled   pass@8   tokens    cut",
        "base     0.0%     0.0% to 0.4%      0.2%     1.4%     12.0   100%",
        "grpo    64.2%   61.2% to 67.0%     45.5%    90.0%      3.0     0%",
        "easy: 32 held-out problems",
        "       greedy     95% interval   sampled   pass@8   tokens   cut",
        "grpo    64.2%   61.2% to 67.0%         -        -      3.0    0%",
    ]


def test_table_ends_with_the_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, out = plain(monkeypatch)
    speaker.table([], ["grpo over sft: +8.0 points"])
    assert out.getvalue() == "grpo over sft: +8.0 points\n"
