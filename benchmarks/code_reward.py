"""What a program's tests cost: 256 completions of five tests each through the reward workers, and one sandbox's start.

`python -m benchmarks.code_reward`. Two kinds of rows, a script with inputs and outputs and a function with assertions;
one completion in eight is wrong and one in 32 hangs until its limit of a second. Left out: a model.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import about, write_json
from reasoner.config import Reward, RewardPart
from reasoner.rewards.base import load_rewards
from reasoner.rewards.rehearsal import completion_of
from reasoner.rewards.sandbox import Limits, Sandbox, protection
from reasoner.types import Prompt

RESULTS = Path(__file__).parent / "results"
TESTS = 5
WRONG_EVERY, HANG_EVERY = 8, 32
SCRIPT = "a, b = map(int, input().split())\nprint(a {sign} b)"
FUNCTION = "def add(a, b):\n    return a {sign} b"
HANG = "while True:\n    pass"


def rows() -> dict[str, tuple[str, str]]:
    """By kind, the program with a place for its sign, and its tests."""
    pairs = {"inputs": [f"{i} {i + 1}" for i in range(TESTS)], "outputs": [str(2 * i + 1) for i in range(TESTS)]}
    statements = [f"assert add({i}, {i + 1}) == {2 * i + 1}" for i in range(TESTS)]
    return {"script": (SCRIPT, json.dumps(pairs)), "assertions": (FUNCTION, json.dumps(statements))}


def scored(program: str, tests: str, count: int, *, workers: int, hangs: bool) -> dict[str, Any]:
    """Seconds for `count` completions, and what they earned; the workers have been started before."""
    sources = [program.format(sign="-" if i % WRONG_EVERY == 1 else "+") for i in range(count)]
    if hangs:
        sources = [HANG if i % HANG_EVERY == 0 else source for i, source in enumerate(sources)]
    completions = [completion_of(f"```python\n{source}\n```") for source in sources]
    prompts = [Prompt(id=f"train:{i}", text="", answer=tests, columns={}, token_ids=()) for i in range(count)]
    part = RewardPart(fn="code", timeout_s=15.0, options={"test_s": 1.0})
    reward = Reward({"accuracy": part}, workers=workers)
    with load_rewards(reward, base_dir=Path.cwd(), columns=set()) as rewards:
        rewards.score(prompts[: 4 * workers], [completion_of("```\nprint(0)\n```")] * 4 * workers)
        began = time.monotonic()
        scores = rewards.score(prompts, completions)
        seconds = time.monotonic() - began
    wanted = [float("+" in source) for source in sources]
    assert [score.total for score in scores] == wanted, "a verdict is wrong"
    return {"seconds": seconds, "right": sum(wanted), "hanging": sum(source == HANG for source in sources)}


def starts(method: str, times: int) -> dict[str, float]:
    """Milliseconds to start a sandbox, and to run one test in it."""
    start_ms, test_ms = [], []
    for _ in range(times):
        sandbox = Sandbox(method)
        began = time.monotonic()
        sandbox.start()
        start_ms.append(1000 * (time.monotonic() - began))
        began = time.monotonic()
        list(sandbox.outputs("print(input())", ["1"] * TESTS, Limits(1.0, 9.0, 512)))
        test_ms.append(1000 * (time.monotonic() - began) / TESTS)
        sandbox.close()
    return {"start_ms": statistics.median(start_ms), "test_ms": statistics.median(test_ms)}


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    method, _ = protection("reward.parts.accuracy", "")
    found: dict[str, Any] = {
        **about(f"python -m benchmarks.code_reward --completions {options.completions} --workers {options.workers}"),
        "method": method,
        "tests": TESTS,
        "sandbox": starts(method, 10),
    }
    for kind, (program, tests) in rows().items():
        for hangs in (False, True):
            name = f"{kind}, one in {HANG_EVERY} hangs" if hangs else kind
            found[name] = scored(program, tests, options.completions, workers=options.workers, hangs=hangs)
            print(f"{name}: {found[name]['seconds']:.1f} s", flush=True)
    path = RESULTS / "code_reward.json"
    write_json(path, found)
    print(f"a sandbox starts in {found['sandbox']['start_ms']:.0f} ms, a test takes {found['sandbox']['test_ms']:.1f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
