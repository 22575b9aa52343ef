"""How vLLM's requests are run to their ends, told by a stand-in for vLLM: without a card none of it runs."""

from types import SimpleNamespace

from reasoner.rollout.vllm_engine import run_requests


def test_outputs_are_given_as_they_end_under_the_numbers_of_their_prompts():
    """Ids count over all calls, end in random letters outside, and come back in any order, unfinished ones too."""
    steps = [[("7", False), ("9", True)], [], [("7", True)], [("8", True)]]
    log: list[object] = []

    def step():
        log.append("step")
        return [SimpleNamespace(request_id=name, finished=done) for name, done in steps.pop(0)]

    llm = SimpleNamespace(
        enqueue=lambda prompts, parameters, use_tqdm: [f"{7 + i}-0a1b2c3d" for i in range(len(prompts))],
        llm_engine=SimpleNamespace(has_unfinished_requests=lambda: bool(steps), step=step),
    )
    run_requests(llm, [{}] * 3, [None] * 3, lambda i, output: log.append((i, output.request_id)))
    assert log == ["step", (2, "9"), "step", "step", (0, "7"), "step", (1, "8")]
