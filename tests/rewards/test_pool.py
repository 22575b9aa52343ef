"""Worker processes: what hangs, dies or floods costs its own call alone (PITFALLS D17, E1, E2, E8, E9, E12, G3)."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.reward_pool import measure
from reasoner.config import RewardPart
from reasoner.rewards.pool import Call, Failure, Outcome, Pool, Setup, Worker

BOMBS = [
    r"\boxed{9^{9^9}}",
    r"\boxed{\binom{10^7}{5*10^6}}",
    "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    r"\boxed{1000000!}",
]
REPO = Path(__file__).parents[2]


def wait_until(condition, limit_s: float = 30.0) -> bool:
    """Whether the condition came true in time; polled, since another process makes it so."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outcomes(pool: Pool, *calls: Call) -> list[Outcome]:
    return [future.result() for future in [pool.submit(call) for call in calls]]


def test_e2_bombs_cost_themselves_only(load, make_prompt, make_completion):
    rewards = load({"accuracy": "math"}, workers=2)
    prompt = make_prompt("18", answer_kind="latex")
    scores = rewards.score([prompt] * 5, [make_completion(text) for text in [*BOMBS, r"\boxed{\frac{36}{2}}"]])
    assert scores[4].parts == {"accuracy": 1.0}
    assert [score.total for score in scores[:4]] == [0.0] * 4
    assert scores[1].failures  # within the caps, but math-verify gives no verdict
    assert rewards.score([prompt], [make_completion(r"\boxed{18}")])[0].parts == {"accuracy": 1.0}


def misbehave(completion: str) -> float:
    """Stands for a stranger's function that does what its completion says."""
    import os
    import signal
    import sys
    import time

    match completion:
        case "sleep":
            time.sleep(1000)
        case "spin":
            while True:
                pass
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(3)
        case "exit":
            sys.exit(3)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        case "flood":
            return len(bytearray(5 << 30))  # never touched, so only the limit refuses it
        case "print":
            print("noise on standard output")
            os.write(1, b"and below it")
        case "read":
            return len(sys.stdin.read())
    return 1.0


def test_e2_hangs_deaths_and_floods_are_failures_and_the_pool_lives_on(score):
    def act(completion):
        return misbehave(completion)

    texts = ["sleep", "fine", "spin", "die", "leave", "exit", "flood", "interrupt", "print", "read", "fine"]
    scores = dict(zip(texts, score(act, texts, workers=2, timeout_s=2.0), strict=True))
    assert scores["sleep"].failures == scores["spin"].failures == {"part": "timed out after 2 s"}
    assert scores["die"].failures == {"part": "its process died (signal 9)"}
    assert scores["leave"].failures == {"part": "its process ended (exit code 3)"}
    assert scores["exit"].failures["part"].startswith("SystemExit: 3 (test_pool.py:")
    assert scores["flood"].failures["part"].startswith("MemoryError: more memory than a worker may have")
    assert (
        scores["fine"].parts == scores["interrupt"].parts == scores["print"].parts == {"part": 1.0}
    )  # G3: SIGINT is the parent's
    assert scores["read"].parts == {"part": 0.0}
    assert not any(scores[text].parts for text in ("sleep", "spin", "die", "leave", "exit", "flood"))


def test_calls_that_hang_leave_their_places_to_others(load, make_prompt, make_completion, tmp_path):
    """Four on two workers wait for what only a later call does: a pool that keeps their places can't get there."""
    marker = str(tmp_path / "reached")

    def wait(completion):
        import time
        from pathlib import Path

        if completion == "release":
            Path(marker).touch()
        while completion == "wait" and not Path(marker).exists():
            time.sleep(0.02)
        return 1.0

    rewards = load({"part": RewardPart(fn="wait", timeout_s=15.0)}, workers=2, wait=wait)
    texts = ["wait", "wait", "fine", "wait", "wait", *["fine"] * 20, "release"]
    rewards.score([make_prompt("")], [make_completion("fine")])  # what is odd is told by what came before
    scores = rewards.score([make_prompt("")] * len(texts), [make_completion(text) for text in texts])
    assert [score.parts for score in scores] == [{"part": 1.0}] * len(texts)
    assert rewards._pool is not None and sum(worker.running for worker in rewards._pool._workers) <= 2


def test_the_benchmark_s_bombs_touch_no_other_score():
    found = measure(64, timeout_s=1.0, rounds=1)
    assert found["wrong_scores"] == 0 and len(found["bombs"]) == 8
    assert all(isinstance(outcome, str) for outcome in found["bombs"].values())  # a failure each, and no value
    timed_out = {name for name, outcome in found["bombs"].items() if outcome == "timed out after 1 s"}
    assert timed_out >= {"power", "regex", "loop", "printing"}
    assert found["bombs"]["memory"].startswith("MemoryError") and "died (signal 6)" in found["bombs"]["crash"]


def test_what_a_call_prints_is_shown_up_to_a_limit(score, capfd):
    def talk(completion):
        print("said" * 100_000 if completion == "much" else completion, flush=True)
        return 1.0

    assert [s.total for s in score(talk, ["a few words", "much", "and after it"])] == [1.0] * 3
    seen = ""

    def all_there():
        nonlocal seen
        seen += capfd.readouterr().err
        return "and after it" in seen

    assert wait_until(all_there)
    assert "a few words" in seen and "printed more than 64 KiB" in seen and len(seen) < 70_000


def test_kill_9_of_a_worker_in_mid_call(load, make_prompt, make_completion, tmp_path):
    marker = str(tmp_path / "pid")

    def hang(completion):
        import os
        import time
        from pathlib import Path

        if completion == "hang":
            Path(marker + ".new").write_text(str(os.getpid()))
            os.rename(marker + ".new", marker)
            time.sleep(1000)
        return 1.0

    rewards = load({"part": RewardPart(fn="hang", timeout_s=100)}, workers=1, hang=hang)

    def kill():
        assert wait_until(Path(marker).exists)
        os.kill(int(Path(marker).read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    scores = rewards.score([make_prompt("18")] * 2, [make_completion("hang"), make_completion("after")])
    killer.join()
    assert scores[0].failures == {"part": "its process died (signal 9)"}
    assert scores[1].parts == {"part": 1.0}


def test_children_of_a_killed_reward_are_killed_too(score, tmp_path):
    marker = str(tmp_path / "pid")

    def start_another(completion):
        import subprocess
        import time
        from pathlib import Path

        child = subprocess.Popen(["sleep", "1000"])
        Path(marker).write_text(str(child.pid))
        time.sleep(1000)

    assert score(start_another, [""], timeout_s=3.0)[0].failures
    pid = int(Path(marker).read_text())
    assert wait_until(lambda: not alive(pid))


def test_e1_scores_asked_for_in_a_thread(load, make_prompt, make_completion):
    rewards = load({"accuracy": "math"}, workers=1)
    scores = []
    prompt = make_prompt(r"\frac{1}{2}", answer_kind="latex")
    thread = threading.Thread(target=lambda: scores.extend(rewards.score([prompt], [make_completion(r"\boxed{0.5}")])))
    thread.start()
    thread.join()
    assert scores[0].parts == {"accuracy": 1.0}
    assert rewards.score([prompt], [make_completion(r"\boxed{1}")])[0].parts == {"accuracy": 0.0}


def test_workers_outlive_the_thread_that_asked_first(score, load, make_prompt, make_completion):
    """The kernel kills a worker with the thread that started it, so that must not be the caller's."""

    def pid(completion):
        import os

        return os.getpid()

    rewards = load({"part": "pid"}, workers=1, pid=pid)
    seen: list[float] = []

    def ask():
        seen.append(rewards.score([make_prompt("18")], [make_completion("")])[0].total)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    ask()
    assert seen[0] == seen[1] != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a busy worker ends with its call")
def test_d17_kill_9_of_the_parent_leaves_no_worker(tmp_path):
    marker = tmp_path / "pid"
    program = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from reasoner.config import Reward, RewardPart
from reasoner.rewards.base import load_rewards
from reasoner.types import Completion, Prompt

def hang(completion):
    import os, time
    Path({str(marker)!r} + ".new").write_text(str(os.getpid()))
    os.rename({str(marker)!r} + ".new", {str(marker)!r})
    while True:
        pass

parts = {{"part": RewardPart(fn="hang", timeout_s=1000)}}
rewards = load_rewards(Reward(parts, workers=1), functions={{"hang": hang}}, base_dir=Path("."), columns=set())
rewards.score([Prompt("", "", "", {{}}, ())], [Completion((), (), (), "", "stop", 0, 0)])
"""
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        assert wait_until(marker.exists, 60)
        worker = int(marker.read_text())
        assert alive(worker)
        parent.kill()
    assert wait_until(lambda: not alive(worker))


def test_g3_workers_have_their_own_process_group(score):
    def group(completion):
        import os

        return os.getpgrp()

    assert score(group, [""])[0].total != os.getpgrp()


def test_close_ends_a_busy_worker(load, make_prompt, make_completion, tmp_path):
    marker = str(tmp_path / "pid")

    def hang(completion):
        import os
        import time
        from pathlib import Path

        Path(marker + ".new").write_text(str(os.getpid()))
        os.rename(marker + ".new", marker)
        time.sleep(1000)

    rewards = load({"part": RewardPart(fn="hang", timeout_s=1000)}, workers=1, hang=hang)
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(rewards.score([make_prompt("")], [make_completion("")])))
    thread.start()
    assert wait_until(Path(marker).exists)
    rewards.close()
    thread.join()
    assert scores[0].failures == {"part": "its process died (signal 9)"}
    assert not alive(int(Path(marker).read_text()))


def test_e12_order_batch_and_number_of_workers_change_nothing(load, make_prompt, make_completion):
    parts = {"accuracy": "math", "format": RewardPart(fn="think_format", weight=0.1)}
    cases = [
        (make_prompt(str(i), answer_kind="number"), make_completion(f"<think>{i}</think>#### {i % 7}"))
        for i in range(60)
    ]
    cases += [
        (make_prompt(rf"\frac{{{i}}}{{7}}", answer_kind="latex"), make_completion(rf"\boxed{{{i % 3}/7}}"))
        for i in range(6)
    ]
    prompts, completions = zip(*cases, strict=True)
    one, two = load(parts, workers=1), load(parts, workers=2)
    first = one.score(prompts, completions)
    assert {score.total for score in first} == {0.0, 0.1, 1.0, 1.1}
    assert one.score(prompts, completions) == first
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    shuffled = two.score([prompts[i] for i in order], [completions[i] for i in order])
    assert shuffled == [first[i] for i in order]


HARD_TEXTS = [
    "<think>" * 3000,
    "</think>" * 2500,
    r"\boxed{" * 2800,
    "{" * 20_000,
    "#### " * 4000,
    "####" + "1,234" * 4000,
    "####" + " " * 20_000,
    "\\boxed{" + "a " * 10_000 + "}",
    "\\boxed{" + r"\text{" * 3000 + "}" * 3000 + "}",
    "<|" * 10_000,
    "\n" * 20_000 + "####",
    "#### 1" + "\n \t" * 6600,
    "1,234" * 4000,
    "-" * 20_000,
    "1." * 10_000,
    "$1 " * 6600,
]


@pytest.mark.parametrize("kind", ["number", "latex", "choice", "text"])
def test_e9_built_ins_take_no_polynomial_time(load, make_prompt, make_completion, kind):
    """20,000 characters meant to make patterns go back again and again; a limit that a linear pattern can't meet."""
    gold = {"number": "18", "latex": "18", "choice": "A", "text": "yes"}[kind]
    slow = {"timeout_s": 10.0}
    parts = {"accuracy": RewardPart(fn="math", **slow), "format": RewardPart(fn="think_format", **slow)}
    if kind == "number":
        parts |= {"exact": RewardPart(fn="exact", **slow), "numeric": RewardPart(fn="numeric", **slow)}
    rewards = load(parts, workers=1)
    prompt = make_prompt(gold, answer_kind=kind)
    scores = rewards.score([prompt] * len(HARD_TEXTS), [make_completion(text) for text in HARD_TEXTS])
    assert [score.failures for score in scores] == [{}] * len(HARD_TEXTS)


HOSTILE = ["<think>" * 3000, "{" * 20_000, r"\boxed{" * 3000, "a" * 20_000, "answer is " * 2000, "<answer>" * 2500]
HOSTILE += ["[" + "1," * 9_000 + "1]", "[" * 900 + "]" * 900]
HOSTILE += ["( " * 10_000, "\n" * 20_000, "1," * 10_000, "answer is (" * 1800, "</answer>" * 2200, "A) " * 6600]
OF_FORM = {
    "choice": {},
    "answer_format": {},
    "tag_count": {},
    "repetition": {},
    "language": {},
    "json_schema": {"schema": {"uniqueItems": True, "items": {"enum": ["a", 1]}}},
}


def test_e9_nor_do_those_of_form_and_choice(load, make_prompt, make_completion):
    parts = {name: RewardPart(fn=name, options=options, timeout_s=10.0) for name, options in OF_FORM.items()}
    rewards = load(parts, workers=1)
    scores = rewards.score([make_prompt("B", answer_kind="choice")] * len(HOSTILE), [*map(make_completion, HOSTILE)])
    assert [score.failures for score in scores] == [{}] * len(HOSTILE)


def test_a_row_that_can_not_be_pickled_is_a_failure(load, make_prompt, make_completion):
    rewards = load({"part": "takes"}, workers=1, columns={"thing"}, takes=lambda thing: 1.0)
    scores = rewards.score([make_prompt("", thing=lambda: 0), make_prompt("", thing=2)], [make_completion("")] * 2)
    assert "can't be sent to a worker" in scores[0].failures["part"]
    assert scores[1].parts == {"part": 1.0}


def test_a_worker_that_can_not_start_again_is_a_failure(tmp_path):
    module = tmp_path / "gone_module.py"
    module.write_text("import os\ndef score(completion): os._exit(1)\n")
    pool = Pool(Setup({"part": ("module", "gone_module", "score", b"")}, (str(tmp_path), *sys.path)), 1)
    try:
        assert outcomes(pool, Call("part", {"completion": ""}, 10.0)) == [Failure("its process ended (exit code 1)")]
        module.unlink()
        (outcome,) = outcomes(pool, Call("part", {"completion": ""}, 10.0))
        assert isinstance(outcome, Failure)
        assert "could not be started again: ModuleNotFoundError" in outcome.reason
    finally:
        pool.close()


def test_a_stopped_worker_leaves_no_process():
    worker = Worker(Setup({"part": ("module", "reasoner.rewards.format", "think_format", b"")}, tuple(sys.path)))
    assert worker.load()[0] == "loaded"
    assert worker.stop() == -9
    assert worker.stop() == 0


def test_slow_imports_of_a_built_in_are_outside_the_limit(tmp_path):
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(4)\n")
    (tmp_path / "my_module.py").write_text("def score(completion):\n    import slow_module\n    return 1\n")
    pool = Pool(Setup({"part": ("module", "my_module", "score", b"")}, (str(tmp_path), *sys.path)), 1)
    try:
        assert outcomes(pool, *[Call("part", {"completion": ""}, 2.0, imports=("slow_module",))] * 2) == [1.0, 1.0]
        (outcome,) = outcomes(pool, Call("part", {"completion": ""}, 2.0, imports=("no_such_module",)))
        assert outcome == Failure("ModuleNotFoundError: No module named 'no_such_module'")
    finally:
        pool.close()
