"""The reward `code`: right, wrong and cheating programs for every kind of tests, and what it makes of broken rows."""

import json

import pytest

from reasoner.__main__ import main
from reasoner.config import RewardPart
from reasoner.errors import RewardError
from reasoner.rewards.code import code, prepare, program, same_output, same_value
from reasoner.rewards.sandbox_confine import can_filter

if not can_filter():
    pytest.skip("the sandbox is Linux's, on x86_64 and aarch64", allow_module_level=True)


def fenced(source: str) -> str:
    return f"<think>Let me see.</think>\nHere it is:\n```python\n{source}\n```\n"


STDIN = json.dumps({"inputs": ["1 2", "3 4\n", "-5 5"], "outputs": ["3", "7\n", "0"]})
CASES = json.dumps([{"input": "1 2", "output": "3"}, {"input": "3 4", "output": "7"}, {"input": "-5 5", "output": "0"}])
CALLS = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4], [-5, 5]], "outputs": [3, [7], 0]})
LINES = json.dumps({"fn_name": "add", "inputs": ["1\n2", "3\n4", "-5\n5"], "outputs": ["3", "7", "0"]})
ASSERTS = json.dumps(["assert add(1, 2) == 3", "assert add(3, 4) == 7", "assert add(-5, 5) == 0"])
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(3, 4) == 7\n"
CHECK += "    for i in range(5):\n        assert candidate(-i, i) == 0\n"
FUNCTIONS = "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n    assert add(3, 4) == 7\n\n"
FUNCTIONS += "def test_zero():\n    assert add(-5, 5) == 0\n"

SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
FUNCTION = "def add(a, b):\n    return a + b"
SCRIPTS = {"pairs": STDIN, "cases": CASES}
CALLED = {"calls": CALLS, "lines": LINES, "asserts": ASSERTS, "check": CHECK, "functions": FUNCTIONS}


def earned(source: str, tests: str, **options: object) -> float:
    entry = "add" if tests == CHECK else None
    return code(fenced(source), tests, entry_point=entry, test_s=1.0, **options)  # type: ignore[arg-type]


RIGHT_SCRIPTS = [
    SCRIPT,
    "import sys\ndata = sys.stdin.read().split()\nsys.stdout.write(str(sum(map(int, data))))",
    "if __name__ == '__main__':\n    print(sum(int(x) for x in open(0).read().split()))\n    raise SystemExit",
    "import threading, sys\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(2 ** 26)\n"
    "def run():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=run).start()",
    "import atexit, os\nout = []\natexit.register(lambda: os.write(1, ''.join(out).encode()))\n"
    "out.append(str(sum(map(int, input().split()))))",
    SCRIPT + "\nexit()",
    # what an interpreter still does at its end
    "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\n"
    "print(pool.submit(lambda: sum(map(int, input().split()))).result())",
    "import io, sys\n" + SCRIPT + "\nsys.stdout = io.StringIO()\nprint('log')",
    "import sys\n" + SCRIPT + "\nsys.stdout.close()",
    "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
]
WRONG_SCRIPTS = [
    "a, b = map(int, input().split())\nprint(a - b)",
    "print(3)",
    "",
    "a, b = map(int, input().split())\nprint(a + b)\nprint(a + b)",
    SCRIPT + "\nraise SystemExit(1)",
    SCRIPT + "\n1 / 0",
    "print(input(",
    FUNCTION,
    "def add(a, b):\n    return a + b\nprint(add(*input().split()))",
]


@pytest.mark.parametrize("tests", SCRIPTS.values(), ids=list(SCRIPTS))
@pytest.mark.parametrize("source", RIGHT_SCRIPTS)
def test_right_scripts_earn_one(source, tests):
    assert earned(source, tests) == 1.0


@pytest.mark.parametrize("source", WRONG_SCRIPTS)
def test_wrong_scripts_earn_nothing(source):
    assert earned(source, STDIN) == 0.0


RIGHT_FUNCTIONS = [
    FUNCTION,
    "class Solution:\n    def add(self, a: int, b: int) -> Optional[int]:\n        return a + b",
    "add = lambda a, b: a + b\nprint('loaded')",
    "from functools import lru_cache\n@lru_cache\ndef add(a, b):\n    print('called')\n    return a + b",
]
WRONG_FUNCTIONS = [
    "def add(a, b):\n    return a - b",
    "def add(a):\n    return a",
    "def sum_of(a, b):\n    return a + b",
    "def add(a, b):\n    return str(a + b)",
    "def add(a, b):\n    return None",
    "def add(a, b) return a + b",
    SCRIPT,
    "",
]
CHEATS = [
    # equal to everything, in any way that an object can be
    "class E:\n    __eq__ = __ne__ = __lt__ = __gt__ = lambda self, other: True\n    __hash__ = None\n"
    "def add(a, b):\n    return E()",
    "class E(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return E(99)",
    "class E(str):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return E('x')",
    "class E(list):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return [E()]",
    "from unittest.mock import ANY\ndef add(a, b):\n    return ANY",
    # an end that looks like success
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "import sys\ndef add(a, b):\n    sys.exit(0)",
    "import os\ndef add(a, b):\n    os._exit(0)",
    "raise SystemExit",
    "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    raise KeyboardInterrupt",
    # printed and written verdicts
    "print('PASS')\nprint('OK')\nprint('3')\nprint('passed: 3')",
    "import os, json, struct\nfor fd in range(1, 64):\n    for text in ('{\"passed\": true}', '3', "
    "'{\"value\": 3}', '{\"end\": true}'):\n"
    "        for blob in (text.encode(), struct.pack('>I', len(text)) + text.encode()):\n"
    "            try: os.write(fd, blob)\n            except OSError: pass\n"
    "def add(a, b):\n    os._exit(0)",
    # the tests' interpreter, if it were the same
    "import builtins\nbuiltins.AssertionError = SystemExit\nbuiltins.abs = lambda x: 0\nbuiltins.print = None\n"
    "def add(a, b):\n    return 99",
    "import sys, inspect\ndef add(a, b):\n    for frame in inspect.stack():\n"
    "        frame.frame.f_globals.update(check=lambda c: None)\n    return 99",
    "import gc, types\nfor f in gc.get_objects():\n    if isinstance(f, types.FunctionType) and f.__name__ in "
    "('run_tests', '_passes', 'judge'):\n        f.__code__ = (lambda *a, **k: True).__code__\n"
    "def add(a, b):\n    return 99",
    "import sys\ndef add(a, b):\n    sys.settrace(lambda *a: None)\n    raise AssertionError",
    # deleting, reading, waiting
    "import os, shutil\nfor root in ('.', '/box', '/tmp'):\n    shutil.rmtree(root, ignore_errors=True)\n"
    "def add(a, b):\n    return 99",
    "import threading, time\ndef later():\n    time.sleep(0.1)\n    print(3)\n"
    "threading.Thread(target=later, daemon=True).start()\ndef add(a, b):\n    return 99",
    "def check(candidate):\n    pass\ndef test_small():\n    pass\ndef add(a, b):\n    return 99",
    "__name__ = 'tests'\nassert_ = True\ndef add(a, b):\n    yield a + b",
]


@pytest.mark.parametrize("tests", CALLED.values(), ids=list(CALLED))
def test_right_functions_earn_one(tests):
    assert [earned(source, tests) for source in RIGHT_FUNCTIONS] == [1.0] * len(RIGHT_FUNCTIONS)


@pytest.mark.parametrize("tests", [*CALLED.values(), STDIN], ids=[*CALLED, "pairs"])
def test_wrong_functions_and_cheats_earn_nothing(tests):
    wrong = [one for one in WRONG_FUNCTIONS if not (tests == STDIN and one == SCRIPT)]
    assert {source: earned(source, tests) for source in [*wrong, *CHEATS]} == dict.fromkeys([*wrong, *CHEATS], 0.0)


def test_shares_are_paid_only_if_asked_for():
    three = "def add(a, b):\n    return a + b if a != 3 else 0"
    script = "a, b = map(int, input().split())\nprint(a + b if a != 3 else 0)"
    for source, tests, share in [
        (three, ASSERTS, 2 / 3),
        (three, CALLS, 2 / 3),
        (script, STDIN, 2 / 3),
        (three, FUNCTIONS, 1 / 2),
        (three, CHECK, 0.0),
        ("def add(a, b):\n    while a == 3: pass\n    return a + b", CALLS, 2 / 3),
    ]:
        assert earned(source, tests) == 0.0
        assert earned(source, tests, partial=True) == pytest.approx(share)


def test_time_that_is_up_is_wrong_not_failed():
    """Ten tests of a second each, with half a second left for all of them after the worker's margin."""
    many = json.dumps({"inputs": ["1 2"] * 10, "outputs": ["3"] * 10})
    slow = "import time\ntime.sleep(0.2)\n" + SCRIPT
    share = code(fenced(slow), many, test_s=1.0, timeout_s=2.0, partial=True)
    assert 0.0 < share < 0.5
    assert code(fenced("import time\ntime.sleep(9)"), ASSERTS, timeout_s=2.0) == 0.0


BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (BLOCK, "print(1)"),
        (f"First\n{BLOCK}\nbetter\n```py\nprint(2)\n```\ndone", "print(2)"),
        (f"{BLOCK}\nIt prints\n```\n1\n```", "print(1)"),
        (f"{BLOCK}\n```text\n1\n```\n```json\n1\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("  ```Python3 title=x\nprint(1)\n  ```", "print(1)"),
        ("````python\nprint('''\n```\n''')\n````", "print('''\n```\n''')"),
        (f"<think>{BLOCK}</think>\n```python\nprint(2)\n```", "print(2)"),
        (f"<think>\n{BLOCK}\n</think>", None),
        (f"<think>\n{BLOCK}", None),
        ("```python\nprint(1)", None),
        ("print(1)", None),
        ("```bash\nls\n```", None),
        (r"\boxed{```python print(1) ```}", None),
        (f"{BLOCK}\nUser: and now?\n```python\nprint(2)\n```", None),
        (f"{BLOCK}\n<|im_end|>\n<|im_start|>user\nthanks", None),
        ("```python\n# Question: none\nUser: int = 1\n```", "# Question: none\nUser: int = 1"),
        ("Question: 1?\n" + BLOCK, "print(1)"),
        ("", None),
    ],
)
def test_the_last_marked_block_is_the_program(completion, found):
    assert program(completion) == found


def test_a_completion_of_fences_costs_nothing():
    assert program("```python\n" * 20_000) is None
    assert program("```\n```python\n" * 20_000) == ""
    assert code(fenced("x = 1\n" * 50_000), STDIN) == 0.0


@pytest.mark.parametrize(
    ("wanted", "said", "same"),
    [
        ("3", "3\n", True),
        ("1 2\n3\n", "1  2 \n3\n\n", True),
        ("1\n2", "1 2", False),
        ("3", "3.0", False),
        ("0.333333", "0.3333333333", True),
        ("0.333333", "0.33", False),
        ("2.5e3", "2500", True),
        ("1000000.0", "1000000.5", True),
        ("1.5", "nan", False),
        ("1.5", "1_5", False),
        ("YES", "yes", False),
        ("", "", True),
        ("a", "", False),
    ],
)
def test_outputs_are_compared_by_lines_and_words(wanted, said, same):
    assert same_output(wanted, said, 1e-6) is same


@pytest.mark.parametrize(
    ("wanted", "said", "same"),
    [
        (3, "3", True),
        (3, "3.0", True),
        (3, "true", False),
        (1, "true", False),
        (True, "1", False),
        (True, "true", True),
        ([1, 2], '{"tuple": [1, 2]}', True),
        ([[1, 2]], "[1, 2]", True),
        ([1, 2], "[2, 1]", False),
        ([3], "3", True),
        (0.5, "0.5000000001", True),
        (0.5, "0.51", False),
        (0.5, "NaN", False),
        ("3", "3", False),
        ("3", '"3"', True),
        (None, "null", True),
        (None, "0", False),
        ({"1": [2]}, '{"dict": [[1, [2]]]}', True),
        ({"1": 2}, '{"dict": [[1, 3]]}', False),
        (2**70, json.dumps({"int": hex(2**70)}), True),
        (3, '{"object": 0}', False),
        (3, "3 3", False),
        (3, "[" * 100_000, False),
        (3, '{"int": 5}', False),
        (3, '{"dict": [[[1], 2]]}', False),
        (0.5, json.dumps({"int": hex(10**400)}), False),
        (10**400, "1.5", False),
        (3, '{"complex": [1' + "0" * 400 + ", 0]}", False),
    ],
)
def test_values_are_compared_by_type(wanted, said, same):
    assert same_value(wanted, said, 1e-6) is same


@pytest.mark.parametrize(
    "answer", ["", "18", "[]", "{}", '{"inputs": ["1"], "outputs": []}', '{"inputs": [], "outputs": []}']
)
def test_an_answer_without_tests_is_a_failure(answer):
    with pytest.raises(ValueError, match=r"tests|length"):
        code(fenced(SCRIPT), answer)


def test_rows_of_humaneval_and_mbpp():
    """Setup, imports, helpers that the tests define, standard modules that they take for granted."""
    mbpp = json.dumps(["assert math.isclose(area(Circle(2.0)), 12.566, rel_tol=0.001)"])
    circle = "import math\nclass Circle:\n    def __init__(self, r):\n        self.r = r\n"
    assert code(fenced(circle + "def area(c): return math.pi * c.r ** 2"), mbpp, test_imports=["import math"]) == 1.0
    assert code(fenced(circle + "def area(c): return 0"), mbpp) == 0.0
    # a program that brings its own `math` gains nothing
    forged = "class math:\n    isclose = staticmethod(lambda *a, **k: True)\nclass Circle:\n    def __init__(s, r): 0\n"
    assert code(fenced(forged + "def area(c): return 0"), mbpp) == 0.0
    poly = "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n"
    check = "def check(candidate):\n    assert abs(poly([-2, 1], candidate([-2, 1]))) < 1e-4\n"
    gold = fenced("def find_zero(xs):\n    return -xs[0] / xs[1]")
    assert code(gold, check, entry_point="find_zero", test_setup_code=poly) == 1.0
    forged = fenced("def poly(xs, x): return 0\ndef abs(x): return 0\ndef find_zero(xs): return 7")
    assert code(forged, check, entry_point="find_zero", test_setup_code=poly) == 0.0
    with pytest.raises(ValueError, match=r"set options.helpers=\[poly\]"):
        code(gold, check, entry_point="find_zero")


CLASSES = {
    "unittest": "import unittest\nclass TestCases(unittest.TestCase):\n    def setUp(self):\n        self.wanted = 3\n"
    "    def test_add(self):\n        self.assertEqual(add(1, 2), self.wanted)\n",
    "pytest": "class TestAdd:\n    def setup_method(self):\n        self.wanted = 3\n"
    "    def test_add(self):\n        assert add(1, 2) == self.wanted\n",
}


@pytest.mark.parametrize("tests", CLASSES.values(), ids=list(CLASSES))
def test_the_methods_of_classes_are_tests(tests):
    assert [code(fenced(s), tests) for s in (FUNCTION, "def add(a, b): return 9", "")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("def never_called():\n    assert add(1, 2) == 3", "never ask the program"),
        ("async def test_add():\n    assert add(1, 2) == 3", "asynchronous"),
        ("def test_add(tmp_path):\n    assert add(1, 2) == 3", "takes arguments"),
    ],
)
def test_tests_that_every_program_would_pass_are_a_failure(tests, why):
    with pytest.raises(ValueError, match=why):
        code(fenced(FUNCTION), tests)


def test_what_a_program_breaks_in_the_tests_is_wrong_not_failed():
    looped = "def test_add():\n    for x in add(1, 2):\n        last = x\n    assert last == 3"
    assert code(fenced("def add(a, b): return []"), looped) == 0.0
    node, tests = "class Node:\n    def __init__(self, x): self.x = x", json.dumps(["assert root.left.x == 2"])
    setup = "root = Node(1)\nroot.left = Node(2)"
    assert code(fenced(node), tests, test_setup_code=setup) == 1.0
    assert code(fenced(""), tests, test_setup_code=setup) == 0.0
    assert code(fenced("def bisect(a, b): return a + b"), json.dumps(["assert bisect(1, 2) == 3"])) == 1.0


def test_exceptions_and_objects_cross_over():
    tests = "def test_negative():\n    try:\n        root(-1)\n    except ValueError as error:\n"
    tests += "        assert 'negative' in str(error)\n    else:\n        assert False\n"
    good = "def root(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x ** 0.5"
    assert code(fenced(good), tests) == 1.0
    assert code(fenced("def root(x): return 1"), tests) == 0.0
    assert code(fenced("def root(x): raise SystemExit('negative')"), tests) == 0.0
    stack = json.dumps(["s = Stack()\ns.push(1)\ns.push((2, {'a'}))\nassert s.pop() == (2, {'a'})\nassert len(s) == 1"])
    own = "class Stack:\n    def __init__(self): self.all = []\n    def push(self, x): self.all.append(x)\n"
    own += "    def pop(self): return self.all.pop()\n    def __len__(self): return len(self.all)"
    assert code(fenced(own), stack) == 1.0
    assert code(fenced(own.replace("len(self.all)", "2")), stack) == 0.0


def test_a_part_is_prepared_and_its_sandbox_said(load, make_prompt, make_completion):
    rewards = load({"accuracy": RewardPart(fn="code", options={"partial": True, "test_s": 0.5})}, workers=1)
    assert len(rewards.notices) == 1
    assert rewards.notices[0].startswith("reward.parts.accuracy: programs that the model writes run under ")
    texts = [fenced(SCRIPT), fenced("print(3)"), "", fenced("while True: pass"), "18"]
    scores = rewards.score([make_prompt(STDIN)] * 5, [make_completion(text) for text in texts])
    assert [score.total for score in scores] == [1.0, pytest.approx(1 / 3), 0.0, 0.0, 0.0]
    (failed,) = rewards.score([make_prompt("18")], [make_completion(texts[0])])
    assert "holds no tests" in failed.failures["accuracy"]


@pytest.mark.parametrize(
    ("options", "timeout_s", "said"),
    [
        ({"protection": "unsandboxed"}, 5.0, "options.protection is found out, not set"),
        ({"timeout_s": 3}, 5.0, "options.timeout_s is found out, not set"),
        ({"unsandboxed": True}, 5.0, "completions run with my rights"),
        ({"test_s": 0}, 5.0, "options.test_s=0: give a number from 0.1 on"),
        ({"memory_mib": "1G"}, 5.0, "options.memory_mib='1G'"),
        ({}, 1.0, "timeout_s=1 is too short"),
    ],
)
def test_options_that_can_not_be_are_refused(options, timeout_s, said):
    with pytest.raises(RewardError, match=said):
        prepare("reward.parts.p", options, timeout_s)


CONF = """\
# Programs
defaults: [tiny, override reward: code, _self_]
stages: [grpo]
model: {scratch: {characters: '%s'}}
data:
  {name: null, path: rows.jsonl, prompt: "{question}", answer: "{tests}", answer_pattern: null, heldout: 0,
   completion: "```python\\n{program}\\n```", max_prompt_tokens: 200}
evaluate: {sets: null}
"""


def test_the_verb_reward_tries_a_file_of_programs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": "Read two numbers, print their sum.", "tests": json.loads(STDIN), "program": SCRIPT},
        {"question": "Write add(a, b).", "tests": json.loads(ASSERTS), "program": FUNCTION},
        {
            "question": "Print twice what you read.",
            "tests": [{"input": "4", "output": "8"}],
            "program": "print(int(input()) * 2)",
        },
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    characters = "".join(map(chr, range(32, 127))).replace("'", "''")
    (tmp_path / "mine.yaml").write_text(CONF % characters)
    assert main(["reward", "conf=mine.yaml"]) == 0
    said = capsys.readouterr().out
    assert said.count("programs that the model writes run under ") == 1
    assert said.endswith("every gold completion earns full marks, and every other one less\n")
    assert main(["reward", "conf=mine.yaml", "reward.parts.accuracy.options={unsandboxed: yes please}"]) == 2
    assert "completions run with my rights" in capsys.readouterr().err
