"""Finding rewards, calling them by parameter name, and what their returns become (PITFALLS C14, E8, F4)."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reasoner.config import Reward, RewardPart
from reasoner.errors import MissingExtra, RewardError
from reasoner.rewards.base import load_rewards
from reasoner.rewards.sources import BUILTINS, JUDGE

REPO = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "my_reward.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refused(load, fn: str, columns: set[str] = frozenset(), **options) -> str:  # type: ignore[assignment]
    with pytest.raises(RewardError) as caught:
        load({"mine": RewardPart(fn=fn, options=options)}, columns=columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_reward_gets_what_its_parameters_name(load, make_prompt, make_completion):
    def score(completion, answer, prompt, finish_reason, num_tokens, level, bonus, missing=None):
        wanted = ["<think>\nyes", "18", "Q: ", "stop", 7, "easy", 0.5, None]
        return [completion, answer, prompt, finish_reason, num_tokens, level, bonus, missing] == wanted

    rewards = load({"part": RewardPart(fn="score", options={"bonus": 0.5})}, columns={"level", "other"}, score=score)
    prompt = make_prompt("18", prefill="<think>\n", level="easy", other=3)
    assert rewards.score([prompt], [make_completion("yes", num_tokens=7)])[0].parts == {"part": 1.0}


def test_double_star_takes_all_the_rest(load, make_prompt, make_completion):
    def score(completion, **columns):
        names = ["answer", "bonus", "finish_reason", "level", "num_tokens", "other", "prefill", "prompt"]
        return sorted(columns) == names and columns["other"] == {"deep": [1, 2]}

    rewards = load({"part": RewardPart(fn="score", options={"bonus": 1})}, columns={"level", "other"}, score=score)
    prompt = make_prompt("18", level="easy", other={"deep": [1, 2]})
    assert rewards.score([prompt], [make_completion("yes")])[0].parts == {"part": 1.0}


def test_f4_our_names_come_before_columns(load, make_prompt, make_completion):
    rewards = load(
        {"part": "same"}, columns={"completion", "answer"}, same=lambda completion, answer: completion == answer == "18"
    )
    row = {"completion": "of the row", "num_tokens": -1}
    assert rewards.score([make_prompt("18", **row)], [make_completion("18")])[0].parts == {"part": 1.0}


def test_a_row_without_the_column_is_a_failure(load, make_prompt, make_completion):
    rewards = load({"part": "level"}, columns={"level"}, level=lambda level: level)
    scores = rewards.score([make_prompt("", level=2), make_prompt("")], [make_completion("")] * 2)
    assert scores[0].parts == {"part": 2.0}
    assert "missing 1 required positional argument: 'level'" in scores[1].failures["part"]


def test_total_is_the_weighted_sum_of_the_parts_that_apply(load, make_prompt, make_completion):
    parts = {
        "a": RewardPart(fn="number", weight=2.0),
        "b": RewardPart(fn="maybe", weight=-0.5),
        "c": RewardPart(fn="breaks", weight=9.0),
    }
    rewards = load(
        parts,
        number=lambda completion: int(completion),
        maybe=lambda completion: None if completion == "3" else 1,
        breaks=lambda answer: 1 // int(answer),
    )
    assert rewards.part_names == ("a", "b", "c")
    scores = rewards.score(
        [make_prompt("1"), make_prompt("1"), make_prompt("0")], [make_completion(text) for text in "434"]
    )
    assert [(score.total, score.parts, score.failed) for score in scores] == [
        (2.0 * 4 - 0.5 * 1 + 9.0, {"a": 4.0, "b": 1.0, "c": 1.0}, False),
        (2.0 * 3 + 9.0, {"a": 3.0, "c": 1.0}, False),
        (2.0 * 4 - 0.5 * 1, {"a": 4.0, "b": 1.0}, True),
    ]
    assert scores[2].failures["c"].startswith("ZeroDivisionError: integer division or modulo by zero (test_base.py:")


def test_one_part_alone(load, make_prompt, make_completion):
    parts = {"a": RewardPart(fn="one", weight=2.0), "b": "breaks"}
    rewards = load(parts, one=lambda completion: 1, breaks=lambda completion: 1 // 0)
    (score,) = rewards.score([make_prompt("")], [make_completion("")], only="a")
    assert (score.total, score.parts, score.failures) == (2.0, {"a": 1.0}, {})


def test_c14_each_completion_is_scored_against_its_own_prompt(load, make_prompt, make_completion):
    rewards = load({"accuracy": "math"})
    prompts = [make_prompt(str(i)) for i in range(40)]
    completions = [make_completion(f"#### {i if i % 3 else -1}") for i in range(40)]
    assert [score.total for score in rewards.score(prompts, completions)] == [float(i % 3 > 0) for i in range(40)]
    assert rewards.score([], []) == []


RETURNS = {
    "None": (None, {}),
    "True": (1.0, {}),
    "3": (3.0, {}),
    "Fraction(1, 4)": (0.25, {}),
    "float('nan')": (None, "returned nan"),
    "-float('inf')": (None, "returned -inf"),
    "10 ** 400": (None, "too large"),
    "'0.5'": (None, "returned str"),
    "[1.0, 0.0]": (None, "returned list of 2: a reward returns one float for its one completion"),
    "Tensor()": (None, "returned Tensor"),
    "1j": (None, "returned complex"),
    "later()": (1.0, {}),
    "(0.5, {'length': 3})": (0.5, {}),
    "{'accuracy': 1, 'format': 0.5, 'none': None}": (1.5, {}),
    "{'accuracy': 'yes'}": (None, "its part 'accuracy': returned str"),
    "{'score': 1.0, 'format': 0.5}": (None, "one of them 'score'"),
    "{}": (None, {}),
    "(0.5, 0.5)": (None, "returned tuple of 2"),
    "(None, {'length': 3})": (None, {}),
    "1 / 0": (None, "ZeroDivisionError: division by zero (my_reward.py:7)"),
    "open('/no/such')": (None, "FileNotFoundError"),
    "json.loads('{')": (None, "(my_reward.py:7)"),  # the reward's own line, not the library's
    "deep()": (None, "RecursionError"),
}


def test_e8_what_a_reward_may_return(load, make_prompt, make_completion, tmp_path):
    write(
        tmp_path,
        "import json\nfrom fractions import Fraction\nclass Tensor:\n    def __float__(self): return 1.0\n"
        "async def later(): return 1.0\n"
        "def score(completion):\n    return eval(completion)\n"
        "def deep(): return deep()\n",
    )
    rewards = load({"part": "my_reward.py:score"}, workers=1)
    scores = rewards.score([make_prompt("")] * len(RETURNS), [make_completion(text) for text in RETURNS])
    for score, (text, (value, reason)) in zip(scores, RETURNS.items(), strict=True):
        if reason:
            assert not score.parts, text
            assert reason in score.failures["part"], text
            assert score.failed
        else:
            named = {name: number for name, number in score.parts.items() if name != "part"}
            assert score.parts.get("part") == value, text
            assert bool(named) == ("length" in text or "format" in text), text
            assert not score.failed


def test_files_are_looked_for_beside_the_conf_and_then_here(load, make_prompt, make_completion, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write(here, "def score(completion): return 2\n")
    assert load({"p": "my_reward.py:score"}).score([make_prompt("")], [make_completion("")])[0].total == 2
    write(tmp_path, "def score(completion): return 1\n")
    assert load({"p": "my_reward.py:score"}).score([make_prompt("")], [make_completion("")])[0].total == 1


def test_an_edit_between_runs_is_seen_and_one_in_mid_run_is_not(load, make_prompt, make_completion, tmp_path):
    """In the same second and of the same length, so that cached bytecode would look fresh."""
    write(tmp_path, "import os\ndef score(completion): return 1 if completion else os._exit(1)\n")
    first = load({"p": "my_reward.py:score"}, workers=1)
    once = lambda rewards, text: rewards.score([make_prompt("")], [make_completion(text)])[0]  # noqa: E731
    assert once(first, "x").total == 1
    write(tmp_path, "import os\ndef score(completion): return 2 if completion else os._exit(1)\n")
    assert once(first, "").failed  # a new worker follows
    assert once(first, "x").total == 1
    assert once(load({"p": "my_reward.py:score"}, workers=1), "x").total == 2
    assert not (tmp_path / "__pycache__").exists()


def test_sibling_imports_work_and_shadow_nothing(load, make_prompt, make_completion, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder, "import math\nfrom my_numbers import SEVEN\ndef score(completion): return math.sqrt(SEVEN * 7)\n")
    write(folder, "SEVEN = 7\n", "my_numbers.py")
    write(folder, "raise RuntimeError('this is not the standard library')\n", "math.py")
    assert load({"p": "mine/my_reward.py:score"}).score([make_prompt("")], [make_completion("")])[0].total == 7


def test_a_module_beside_the_conf(load, make_prompt, make_completion, tmp_path):
    write(tmp_path, "def score(completion): return 3\n", "module_of_mine.py")
    assert load({"p": "module_of_mine:score"}).score([make_prompt("")], [make_completion("")])[0].total == 3


def test_functions_from_python_lambdas_closures_and_callables(load, make_prompt, make_completion):
    table = {"a": 0.25}

    class Callable:
        def __call__(self, completion):
            return 0.75

    rewards = load({"x": "x", "y": "y", "z": "z"}, x=lambda completion: table[completion], y=len_of("ab"), z=Callable())
    assert rewards.score([make_prompt("")], [make_completion("a")])[0].parts == {"x": 0.25, "y": 2.0, "z": 0.75}


def len_of(text: str):
    return lambda completion: len(text)


def test_a_given_function_comes_before_a_built_in(load, make_prompt, make_completion):
    assert load({"p": "math"}, math=lambda completion: 5).score([make_prompt("")], [make_completion("")])[0].total == 5


def test_a_script_without_a_main_guard_and_functions_in_it(tmp_path):
    """No worker runs the user's script a second time."""
    script = write(
        tmp_path,
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "from reasoner.config import Reward, RewardPart\nfrom reasoner.rewards.base import load_rewards\n"
        "from reasoner.types import Completion, Prompt\n"
        "print('once')\nHALF = 0.5\ndef half(completion): return HALF\n"
        "reward = Reward({'p': RewardPart('half')}, workers=1)\n"
        "with load_rewards(reward, functions={'half': half}, base_dir=Path('.'), columns=set()) as rewards:\n"
        "    print(rewards.score([Prompt('', '', '', {}, ())], [Completion((), (), (), '', 'stop', 0, 0)])[0].total)\n",
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout, done.stderr) == ("once\n0.5\n", "")


def test_a_wrong_parameter_name_is_refused_with_the_names_there_are(load, tmp_path):
    write(tmp_path, "\n\ndef score(completion, anser): return 1\n")
    message = refused(load, "my_reward.py:score", columns={"level", "question"})
    assert "reward.parts.mine.fn=my_reward.py:score (line 3) asks for 'anser'" in message
    assert "did you mean 'answer'?" in message
    assert "completion, answer, prompt, finish_reason, num_tokens, prefill, level, question" in message


def test_a_parameter_like_nothing_lists_the_names_once(load, tmp_path):
    write(tmp_path, "def score(xyzzy): return 1\n")
    assert refused(load, "my_reward.py:score", columns={"level"}).count("prefill, level") == 1


def test_an_option_that_nothing_takes_is_refused(load, tmp_path):
    write(tmp_path, "def score(completion, scale=1): return 1\n")
    assert "takes no option 'scael': did you mean 'scale'?" in refused(load, "my_reward.py:score", scael=2)
    assert "'completion' is an argument that every reward gets" in refused(load, "my_reward.py:score", completion="x")


def test_rewards_that_can_not_be_found(load, tmp_path):
    write(tmp_path, "import os\nlimit = 3\ndef score(completion): return 1\n")
    assert f"there is no file {tmp_path}/no.py or " in refused(load, "no.py:score")
    assert "it has no 'scor': did you mean 'score'?" in refused(load, "my_reward.py:scor")
    assert "it has no 'xyzzy'; there are: score" in refused(load, "my_reward.py:xyzzy")
    assert "it is int, not a function" in refused(load, "my_reward.py:limit")
    assert "write my_reward.py:NAME" in refused(load, "my_reward.py")
    assert "did you mean 'math'?" in refused(load, "maths")
    assert f"there are: {', '.join(sorted([*BUILTINS, JUDGE]))}" in refused(load, "xyzzy")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in refused(load, "no_such_module:score")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\ndef score(completion:\n    return 1\n", "(my_reward.py:2)"),
        ("x = 1\nimport no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package' (my_reward.py:2)"),
        ("def score(completion): return 1\nraise SystemExit(3)\n", "SystemExit: 3 (my_reward.py:2)"),
        ("import os\nos._exit(4)\n", "its process ended (exit code 4) while loading"),
        ("def score(completion): yield 1\n", "it yields"),
        ("def score(completion, /): return 1\n", "'completion' is positional-only"),
        ("score = 3\n", "it is int, not a function"),
    ],
)
def test_files_that_can_not_be_loaded(load, tmp_path, text, reason):
    write(tmp_path, text)
    message = refused(load, "my_reward.py:score")
    assert reason in message
    assert "can't be loaded" in message


def test_a_function_that_can_not_be_sent(load):
    held = threading.Lock()
    with pytest.raises(RewardError, match="can't be sent to the worker processes"):
        load({"p": "p"}, p=lambda completion: held.locked())


def test_no_parts(load):
    with pytest.raises(RewardError, match=r"reward\.parts is empty"):
        load({})


def test_a_missing_package_of_ours_names_the_extra(load, tmp_path):
    write(tmp_path, "raise ModuleNotFoundError('not here', name='reasoning_gym.tasks')\n")
    with pytest.raises(MissingExtra, match=r"reasoning_gym.*\.\[gym\]"):
        load({"p": "my_reward.py:score"})


def test_no_worker_is_left_of_loading_alone(tmp_path):
    """Loading checks in a worker of its own, so that rewards which are never used need no close."""
    rewards = load_rewards(Reward({"p": RewardPart("math")}), base_dir=tmp_path, columns=set())
    assert 1 <= rewards.workers <= 8
    rewards.close()


def test_rewards_load_no_torch():
    code = (
        "import sys\n"
        "import reasoner.rewards.base, reasoner.rewards.rehearsal, reasoner.rewards.math, reasoner.rewards.format\n"
        "import reasoner.rewards.exact, reasoner.rewards.length\n"
        "heavy = {'torch', 'transformers', 'datasets', 'math_verify', 'sympy', 'reasoning_gym', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
