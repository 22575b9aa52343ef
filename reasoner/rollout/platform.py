"""What the operating system asks of vLLM. Left out: what the card asks of it; native Windows, which has no vLLM.

Under WSL2 vLLM keeps pinned host memory off unless told otherwise, and its newer model runner (V2), the default for
most families, can't start without: "UVA is not available" (vllm#47387, seen with 0.24.0).
"""

import re

PINS_FROM = (4, 19, 121)  # the first WSL2 kernel whose pinned memory vLLM trusts


def wsl2_version(kernel: str) -> tuple[int, ...] | None:
    """The kernel's version where this is WSL2, None elsewhere; `kernel` is what platform.release() says.

    >>> wsl2_version("6.6.87.2-microsoft-standard-WSL2"), wsl2_version("6.8.0-60-generic")
    ((6, 6, 87, 2), None)
    """
    found = re.match(r"\d+(\.\d+)*", kernel)
    return tuple(map(int, found[0].split("."))) if found and "microsoft" in kernel.lower() else None


def engine_environment(kernel: str) -> tuple[dict[str, str], str | None]:
    """Environment variables that vLLM needs on this kernel (platform.release()), and the sentence to say, if any.

    They are defaults: what the user has set stands. Nothing is needed outside WSL2.
    """
    version = wsl2_version(kernel)
    if version is None:
        return {}, None
    if version >= PINS_FROM:
        name, value = "VLLM_WSL2_ENABLE_PIN_MEMORY", "1"
        why = "turns on pinned memory, which vLLM's engine needs and leaves off there"
    else:
        name, value = "VLLM_USE_V2_MODEL_RUNNER", "0"
        why = (
            f"takes vLLM's older model runner, because pinned memory needs a kernel of at least "
            f"{'.'.join(map(str, PINS_FROM))}: `wsl --update` in Windows brings one"
        )
    return {name: value}, f"WSL2 (kernel {kernel}): {name}={value} {why}"
