"""What a person sees while a run goes on: a progress line a stage, hints, samples, the closing table.

The words are made by functions that only return text; `Console` puts them out. In a terminal the progress line is
redrawn in place, elsewhere it is a plain line, at most one a second. Nothing that a model or a file says can move the
cursor or be taken for markup. Left out: what to show when, which the stages decide.
"""

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from reasoner import world
from reasoner.types import Completion, Group, Score
from reasoner.words import plural

PLAIN_INTERVAL_S = 1.0  # between plain progress lines: a log of a night stays readable
HINT_EVERY = 50  # steps before the same hint is given again
ETA_OVER = 20  # steps whose mean time the ETA takes
FIRST_STEPS = 5  # of a stage; their mean entropy is what a collapse is judged against
PROMPT_CHARS, COMPLETION_CHARS = 200, 800  # shown of a sample
AT_K = re.compile(r"(pass|maj)_at_\d+")
MAX_NOTES = 200  # kept of what was said, the newest
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with characters that move a cursor, turn the writing direction or show nothing written as escapes."""
    return UNSAFE.sub(lambda found: "    " if found[0] == "\t" else found[0].encode("unicode_escape").decode(), text)


def number(value: float, digits: int) -> str:
    """0.613 -> '0.61'; '-' where there is no number."""
    return f"{value:.{digits}f}" if isfinite(value) else "-"


def short(value: float, digits: int) -> str:
    """As `number`, without the 0 before the point: 0.0213 -> '.021', 9.84 -> '9.8'."""
    return re.sub(r"^(-?)0\.", r"\1.", number(value, digits))


def percent(share: float, digits: int = 0) -> str:
    """0.58 -> '58%'; '-' where there is no number."""
    return f"{100 * share:.{digits}f}%" if isfinite(share) else "-"


def rate(per_s: float) -> str:
    """6712 -> '6.7K', 812 -> '812'."""
    if per_s >= 999_950:
        return f"{per_s / 1e6:.1f}M"
    return f"{per_s / 1e3:.1f}K" if per_s >= 999.5 else f"{per_s:.0f}"


def duration(seconds: float) -> str:
    """2040 -> '34 min', 40 -> '40 s', 8000 -> '2 h 13 min'."""
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress_line(row: Mapping[str, Any], num_steps: int, eta_s: float) -> str:
    """A row of metrics.jsonl as one line."""
    parts = _grpo_parts(row) if row["stage"] == "grpo" else _sft_parts(row)
    end = [f"{rate(row['tokens_per_s'])} tok/s"]
    if row["step"] < num_steps:
        end.append(f"ETA {duration(eta_s)}")
    return " · ".join([f"{row['stage']} {row['step']}/{num_steps}", *parts, *end])


def _sft_parts(row: Mapping[str, Any]) -> list[str]:
    return [f"loss {number(row['loss'], 3)}", f"{row['examples']:.0f} examples"]


def _grpo_parts(row: Mapping[str, Any]) -> list[str]:
    train_s = row["logprobs_s"] + row["update_s"]
    times = f"sample {short(row['generate_s'], 1)} score {short(row['reward_s'], 1)} update {short(train_s, 1)}"
    return [
        f"reward {number(row['reward_mean'], 2)}",
        f"solved {percent(row['solved_share'])}",
        f"useful groups {row['useful_groups']:.0f}/{row['groups']:.0f}",
        f"length {number(row['completion_tokens_mean'], 0)} (cut {percent(row['cut_share'])})",
        f"gap {short(row['logprob_gap_mean'], 3)}",
        f"{short(row['step_s'], 1)} s ({times})",
    ]


def hints(row: Mapping[str, Any], entropy_at_start: float) -> dict[str, str]:
    """What is bad in a row of metrics.jsonl, by name: a sentence each, with the key to change.

    `entropy_at_start` is the stage's mean entropy over its first steps, in nats.
    """
    stage, found = row["stage"], {}
    if not isfinite(row["grad_norm"]):
        found["gradient"] = f"the gradient is not finite, so the step moved no weight: lower {stage}.optim.lr"
    if stage != "grpo":
        return found
    if row["reward_failures"] > 0:
        found["failures"] = (
            f"{row['reward_failures']:.0f} rewards failed and count for nothing: completions.jsonl has the reasons; "
            "a slow one needs reward.parts.NAME.timeout_s"
        )
    if row["cut_share"] > 0.3:
        found["cut"] = f"{percent(row['cut_share'])} of the completions were cut: raise grpo.max_completion_tokens"
    if row["useful_groups"] < 0.1 * row["groups"]:
        found["groups"] = f"useful groups {row['useful_groups']:.0f}/{row['groups']:.0f}: {_why_no_signal(row)}"
    if row["logprob_gap_mean"] > 0.05:
        found["gap"] = (
            f"engine and trainer differ by {short(row['logprob_gap_mean'], 3)} nats a token: "
            "model.dtype=float32 or model.quantize=none brings them together"
        )
    if row["entropy"] < 0.1 * entropy_at_start:
        found["entropy"] = (
            f"entropy fell from {short(entropy_at_start, 3)} to {short(row['entropy'], 3)} nats, samples are alike: "
            "lower grpo.optim.lr, or set grpo.entropy_coef"
        )
    return found


def _why_no_signal(row: Mapping[str, Any]) -> str:
    if row["solved_share"] > 0.8:
        return "the problems are too easy to learn from; give harder ones in grpo.data"
    if row["solved_share"] < 0.2:
        return "the problems are too hard to learn from; give easier ones in grpo.data, or more sft.steps first"
    return "all completions of a problem earn the same; see what reward.parts tells apart"


def sample_lines(group: Group) -> list[str]:
    """A prompt's end with its best and its worst completion, each with its score parts; text indented behind a bar."""
    ranked = sorted(range(len(group.scores)), key=lambda index: group.scores[index].total, reverse=True)
    picked = [ranked[0]] if group.scores[ranked[0]].total == group.scores[ranked[-1]].total else [ranked[0], ranked[-1]]
    prompt = group.prompt.text
    lines = [
        f"prompt {visible(group.prompt.id)}",
        *_quoted(prompt if len(prompt) <= PROMPT_CHARS else f"… {prompt[-PROMPT_CHARS:]}"),
    ]
    for index in picked:
        completion = group.completions[index]
        lines += [score_line(completion, group.scores[index]), *_quoted(_shortened(completion.text))]
    return lines


def score_line(completion: Completion, score: Score) -> str:
    """`reward 1.10: accuracy 1.00 · format 0.50 · 14 tokens`."""
    parts = [f"{name} {value:.2f}" for name, value in score.parts.items()]
    parts += [f"{name} failed ({reason})" for name, reason in score.failures.items()]
    cut = ", cut" if completion.finish_reason == "length" else ""
    return visible(
        f"reward {score.total:.2f}: {' · '.join([*parts, plural(len(completion.token_ids), 'token') + cut])}"
    )


def _shortened(text: str) -> str:
    half = COMPLETION_CHARS // 2
    return text if len(text) <= COMPLETION_CHARS else f"{text[:half]} … {text[-half:]}"


def _quoted(text: str) -> list[str]:
    return [f"  | {line}".rstrip() for line in visible(text).split("\n")]


def closing_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of eval.json, a block a set, accuracies and shares in percent; pass@k and maj@k where some row has a
    number there."""
    lines: list[str] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        at = [key for key in dict.fromkeys(key for row in of_set for key in row) if AT_K.fullmatch(key)]
        at = [key for key in at if key == "pass_at_8" or any(row.get(key) is not None for row in of_set)]
        titles = [key.replace("_at_", "@") for key in at]
        cells = [("", "greedy", "95% interval", "sampled", *titles, "tokens", "cut")]
        cells += [_cells(row, at) for row in of_set]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append(f"{visible(name)}: {plural(of_set[-1]['problems'], 'held-out problem')}")
        for first, *others in cells:
            padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("   ".join([first.ljust(widths[0]), *padded]).rstrip())
    return lines


def _cells(row: Mapping[str, Any], at: Sequence[str]) -> tuple[str, ...]:
    return (
        row["row"],
        percent(row["greedy_accuracy"], 1),
        f"{percent(row['greedy_low'], 1)} to {percent(row['greedy_high'], 1)}",
        *("-" if row.get(key) is None else percent(row[key], 1) for key in ("sampled_accuracy", *at)),
        f"{row['mean_tokens']:.1f}",
        percent(row["cut_share"]),
    )


class _Screen(RichConsole):
    def on_broken_pipe(self) -> None:
        """Go silent where `| head` has read enough: the run goes on, its files hold everything."""
        self.quiet = True
        with suppress(OSError):  # a stream without a descriptor has nothing left to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Console:
    """Where a run speaks; silent on ranks other than the main one. A context manager: leaving it closes it.

    `notes` keeps what `say` was told, and after which step: `{"after": "grpo 120", "text": "out of memory: ..."}`.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._speaks = world.is_main()
        self._rich = _Screen(file=self._stream, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._line = ""
        self._printed_at = float("-inf")
        self._stage = ""
        self._step_s: deque[float] = deque(maxlen=ETA_OVER)
        self._entropies: list[float] = []
        self._hinted: dict[str, int] = {}
        self._last_step = ""
        self.notes: list[dict[str, str]] = []

    def say(self, line: str) -> None:
        """One line (or several), kept on the screen and in `notes`."""
        self.notes.append({"after": self._last_step, "text": line})
        del self.notes[:-MAX_NOTES]
        self._show(line)

    def _show(self, text: str) -> None:
        if self._speaks:
            self._print(visible(text))

    def status(self, line: str, *, last: bool = False) -> None:
        """The line that tells how far something is, in place of the one before; `last` keeps it on the screen."""
        if not self._speaks:
            return
        self._line = visible(line)
        if last:
            self._keep_line()
        elif self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._redraw()
        elif time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._keep_line()

    def progress(self, row: Mapping[str, Any], num_steps: int) -> None:
        """A finished step, as its row of metrics.jsonl, with a hint where a number is bad."""
        if row["stage"] != self._stage:
            self._stage = row["stage"]
            self._step_s.clear()
            self._entropies.clear()
            self._hinted.clear()
        self._last_step = f"{row['stage']} {row['step']}"
        self._step_s.append(row["step_s"])
        if len(self._entropies) < FIRST_STEPS and isfinite(row.get("entropy", math.nan)):
            self._entropies.append(row["entropy"])
        eta_s = (num_steps - row["step"]) * sum(self._step_s) / len(self._step_s)
        self.status(progress_line(row, num_steps, eta_s), last=row["step"] == num_steps)
        for name, hint in hints(row, sum(self._entropies) / max(1, len(self._entropies))).items():
            if row["step"] - self._hinted.get(name, -HINT_EVERY) >= HINT_EVERY:
                self._hinted[name] = row["step"]
                self.say(f"hint at {row['stage']} step {row['step']}: {hint}")

    def samples(self, step: int, groups: Sequence[Group]) -> None:
        """The group whose rewards differ most: its best and worst completion."""
        totals = [[score.total for score in group.scores] for group in groups]
        spread = [max(values) - min(values) for values in totals]
        if groups:
            self._show("\n".join([f"sample of step {step}", *sample_lines(groups[spread.index(max(spread))])]))

    def table(self, rows: Sequence[Mapping[str, Any]], gains: Sequence[str] = ()) -> None:
        """The closing table, then the sentences about what each stage gained."""
        self._show("\n".join([*closing_table(rows), *gains]))

    def close(self) -> None:
        """Keep the last progress line and leave the terminal as it was."""
        if self._line:
            self._keep_line()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _redraw(self) -> None:
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=True)
            self._live.start()
            self._rich.show_cursor(True)  # a second Ctrl-C ends the process without a chance to bring it back
        self._live.update(Text(self._line), refresh=True)

    def _keep_line(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        self._printed_at = time.monotonic()
        line, self._line = self._line, ""
        self._print(line)

    def _print(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._rich.print(Text(text.encode(encoding, "replace").decode(encoding)), soft_wrap=True)
