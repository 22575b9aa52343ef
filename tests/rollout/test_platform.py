"""WSL2 by the name of its kernel, and what vLLM is told there. No test here runs under WSL2 itself."""

import platform

import pytest

from reasoner.rollout.platform import engine_environment, wsl2_version

PINNED = {"VLLM_WSL2_ENABLE_PIN_MEMORY": "1"}
OLDER_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@pytest.mark.parametrize(
    ("kernel", "version", "environment"),
    [
        ("6.6.87.2-microsoft-standard-WSL2", (6, 6, 87, 2), PINNED),
        ("5.15.167.4-microsoft-standard-WSL2", (5, 15, 167, 4), PINNED),
        ("4.19.121-microsoft-standard", (4, 19, 121), PINNED),
        ("4.19.128-Microsoft-WSL2", (4, 19, 128), PINNED),
        ("10.0-microsoft-standard-WSL2", (10, 0), PINNED),
        ("4.19.104-microsoft-standard", (4, 19, 104), OLDER_RUNNER),
        ("4.9.500-microsoft-standard", (4, 9, 500), OLDER_RUNNER),
        ("4.19-microsoft-standard", (4, 19), OLDER_RUNNER),
    ],
)
def test_wsl2_gets_one_variable_and_one_line_that_names_both(kernel, version, environment):
    assert wsl2_version(kernel) == version
    found, sentence = engine_environment(kernel)
    assert found == environment
    ((name, value),) = environment.items()
    assert sentence is not None and "\n" not in sentence
    assert f"{name}={value}" in sentence and kernel in sentence
    assert ("wsl --update" in sentence) == (environment == OLDER_RUNNER)


@pytest.mark.parametrize("kernel", ["6.8.0-60-generic", "4.19.0-27-amd64", "24.5.0", "", "microsoft"])
def test_other_kernels_get_nothing(kernel):
    assert wsl2_version(kernel) is None
    assert engine_environment(kernel) == ({}, None)


def test_this_machines_own_kernel_is_read():
    assert (wsl2_version(platform.release()) is None) == ("microsoft" not in platform.release().lower())
