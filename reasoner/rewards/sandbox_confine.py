"""What a process gives up for good before it runs strangers' code: limits, namespaces, Landlock, capabilities and,
last, every system call that a computation has no use for. Linux on x86_64 and aarch64; elsewhere only the limits.

Standard library only, by ctypes: the sandbox's interpreter sees no installed package. Left out: cgroups, which belong
to the administrator, and running other programs.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

FOLDER = "/box"  # the fresh folder, where there are namespaces
FOLDER_BYTES = 64 << 20
FOLDER_FILES = 512
FILE_BYTES = 16 << 20
OPEN_FILES = 64
THREADS = 64

# The system calls a computation needs: x86_64's numbers, then aarch64's (None: not there). All others fail with ENOSYS,
# which covers fork, execve, socket, ptrace, mount, bpf, keyctl, io_uring and whatever a later kernel brings.
ALLOWED = {
    "files": """
        read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
        open 2 -, openat 257 56, close 3 57, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
        statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439, lseek 8 62, ftruncate 77 46, fallocate 285 47,
        fsync 74 82, fdatasync 75 83, flock 73 32, sendfile 40 71, copy_file_range 326 285, fadvise64 221 223,
        statfs 137 43, fstatfs 138 44, umask 95 166, getcwd 79 17, chdir 80 49, fchdir 81 50, getdents 78 -,
        getdents64 217 61, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
        renameat 264 38, renameat2 316 276, symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78""",
    "channels": """
        poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
        epoll_pwait 281 22, eventfd2 290 19, pipe 22 -, pipe2 293 59, dup 32 23, dup2 33 -, dup3 292 24, sendto 44 206,
        recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204, getsockopt 55 209""",
    "memory": """
        mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, msync 26 227, mincore 27 232,
        brk 12 214""",
    "time and signals": """
        rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
        rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103,
        nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
        time 201 -, times 100 153, restart_syscall 219 128""",
    "itself": """
        getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getuid 102 174, geteuid 107 175, getgid 104 176,
        getegid 108 177, getgroups 115 158, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, uname 63 160,
        sysinfo 99 179, getrlimit 97 163, setrlimit 160 164, getrusage 98 165, wait4 61 260, exit 60 93,
        exit_group 231 94, futex 202 98, set_tid_address 218 96, set_robust_list 273 99, arch_prctl 158 -,
        membarrier 324 283, rseq 334 293, getrandom 318 278""",
}
NUMBERS = {  # of the calls that are allowed with some arguments only, and of those made here
    "socketpair": (53, 199),
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "prctl": (157, 167),
    "pivot_root": (155, 41),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}  # column, audit word

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 15, 16, 22, 38
PR_SET_VMA = 0x53564D41  # what malloc names its memory with
SECCOMP_MODE_FILTER = 2
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << bit for bit in (17, 26, 27, 28, 29, 30))
MS_REC, MS_BIND, MS_PRIVATE, MS_NOSUID, MS_NODEV, MNT_DETACH = 0x4000, 0x1000, 1 << 18, 2, 4, 2
MOUNT_READ_ONLY = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # read only, no set-uid, no devices
AT_RECURSIVE = 0x8000
CLONE_THREAD = 0x10000
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
INSIDE_ID = 1000  # who an ordinary user is inside


class Refused(OSError):
    """The kernel, or the container that this runs in, does not allow a protection."""


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> int:
    """A function of libc, or a system call by its name. Raises Refused with its errno."""
    if function in NUMBERS:
        number = NUMBERS[function][MACHINES[platform.machine()][0]]
        result = _libc().syscall(ctypes.c_long(number), *(_word(argument) for argument in arguments))
    else:
        result = getattr(_libc(), function)(*(_word(argument) for argument in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise Refused(code, f"{function}: {os.strerror(code)}")
    return result


def _word(argument: Any) -> Any:
    return ctypes.c_ulong(argument) if isinstance(argument, int) else argument


def can_filter() -> bool:
    """Whether system calls can be filtered here."""
    return sys.platform == "linux" and platform.machine() in MACHINES


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def hide() -> None:
    """Let no process of the same user open this one's descriptors or memory by way of /proc, nor its forks' ones.
    Landlock alone lets the programs write into the pipes of the tests.
    """
    if sys.platform == "linux":
        _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit(memory_bytes: int, cpu_s: int, *, threads: bool) -> None:
    """Limits on this process, none of which it can raise again. `threads`: where their number can be limited."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if threads:
        limits[resource.RLIMIT_NPROC] = THREADS
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except ValueError:
            if sys.platform != "darwin":  # which knows some limits by name only
                raise


def threads_countable() -> bool:
    """Whether the kernel counts a user's threads inside a user namespace by themselves (Linux 5.14)."""
    release = platform.release().split("-")[0].split(".")
    return tuple(int(part) for part in release[:2] if part.isdigit()) >= (5, 14)


def enter_namespaces(read_only: Sequence[str]) -> None:
    """Return in a child process that has namespaces of its own for users, files, processes, network and System V: it
    sees `read_only` and an empty FOLDER and nothing else. The process that called waits for it and ends as it does.

    Root needs no user namespace, and becomes a user that owns nothing. Raises Refused where it isn't allowed.
    """
    uid, gid, own = os.geteuid(), os.getegid(), os.getpid()
    others = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    as_root = uid == 0
    if as_root:
        try:
            _call("unshare", others)
        except Refused:
            as_root = False
    if not as_root:
        _call("unshare", others | NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INSIDE_ID} {uid} 1"),
            ("gid_map", f"{INSIDE_ID} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    _new_root(read_only)
    child = os.fork()
    if child:
        for descriptor in (0, 1):
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if as_root:
        nobody = 32768 + own % 32000  # one for each sandbox, so that their threads are counted apart
        with suppress(OSError):  # in a container that has no such user: then root without any capability
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
        _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # changing the user undid it


def _new_root(read_only: Sequence[str]) -> None:
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    at = b"/tmp" if os.path.isdir("/tmp") else b"/mnt"
    _call("mount", b"tmpfs", at, b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir(at + b"/old")
    _call("pivot_root", at, at + b"/old")
    os.chdir("/")
    os.mkdir(FOLDER)
    options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=777".encode()
    _call("mount", b"tmpfs", FOLDER.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in (*read_only, *DEVICES):
        old = "/old" + path
        if os.path.islink(old):
            os.symlink(os.readlink(old), path)
        elif os.path.isdir(old):
            os.makedirs(path, exist_ok=True)
            _bind(old, path)
        elif os.path.exists(old):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "xb").close()
            _bind(old, path)
    _call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    _call("mount_setattr", -1 & 0xFFFFFFFF, b"/", 0, MOUNT_READ_ONLY, len(MOUNT_READ_ONLY))
    os.chdir(FOLDER)


def _bind(old: str, path: str) -> None:
    _call("mount", old.encode(), path.encode(), None, MS_BIND | MS_REC, None)
    if path not in DEVICES:
        _call("mount_setattr", -1 & 0xFFFFFFFF, path.encode(), AT_RECURSIVE, MOUNT_READ_ONLY, len(MOUNT_READ_ONLY))


def drop_capabilities() -> None:
    """Give up every capability, and the hope of gaining one by running a program."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version_3 = 0x20080522
    _call("capset", struct.pack("Ii", version_3, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0))


def landlock(read_only: Iterable[str]) -> None:
    """From now on this process and its children may read what lies beneath `read_only`, and open no other file.

    Raises Refused where the kernel has no Landlock (Linux 5.13).
    """
    read_file, read_dir, write_file = 4, 8, 2
    abi = _call("landlock_create_ruleset", None, 0, 1)
    kinds = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # kinds of access that this kernel knows
    ruleset = _call("landlock_create_ruleset", struct.pack("Q", (1 << kinds) - 1), 8, 0)
    rights = dict.fromkeys(read_only, read_file | read_dir) | dict.fromkeys(DEVICES, read_file | write_file)
    for path, right in rights.items():
        if not os.path.exists(path):
            continue
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)  # type: ignore[attr-defined]
        right = right if os.path.isdir(path) or path in DEVICES else read_file
        _call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", right, beneath), 0)
        os.close(beneath)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# (argument, mask, values): the call is allowed where the argument, masked, is one of the values.
Condition = tuple[int, int, tuple[int, ...]]


def conditions(pid: int) -> dict[str, tuple[Condition, ...]]:
    """The calls that the process `pid` may make with some arguments only."""
    every = 0xFFFFFFFF
    return {
        "clone": ((0, CLONE_THREAD, (CLONE_THREAD,)),),  # threads, no processes
        "kill": ((0, every, (pid,)),),
        "tgkill": ((0, every, (pid,)),),
        "prlimit64": ((0, every, (0, pid)),),
        "prctl": ((0, every, (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)),),
        # A stream between two of its own descriptors; a datagram could be sent to any socket of the machine.
        "socketpair": ((0, every, (1,)), (1, 0xF, (1,))),
        # Not F_SETOWN, by which the kernel sends signals to others.
        "fcntl": ((1, every, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)),),
        # Asking for a terminal's or a pipe's state, close-on-exec, non-blocking.
        "ioctl": ((1, every, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    }


def filter_program(pid: int, machine: str) -> bytes:
    """The BPF program that allows what ALLOWED and `conditions` say and answers ENOSYS to everything else."""
    column, audit = MACHINES[machine]
    load, equal, masked, give = 0x20, 0x15, 0x54, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x80000000
    code: list[tuple[int, int, int, int]] = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    for calls in ALLOWED.values():
        for call in calls.split(","):
            number = call.split()[1 + column]
            if number != "-":
                code += [(equal, 0, 1, int(number)), (give, 0, 0, allow)]
    for name, asked in conditions(pid).items():
        body: list[tuple[int, int, int, int]] = []
        for argument, mask, values in asked:
            body += [(load, 0, 0, 16 + 8 * argument), (masked, 0, 0, mask)]
            body += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
            body.append((give, 0, 0, deny))
        body.append((give, 0, 0, allow))
        code += [(equal, 0, len(body), NUMBERS[name][column]), *body]
    code.append((give, 0, 0, deny))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def filter_calls() -> None:
    """From now on, only the system calls above. Raises Refused where the kernel has no filters."""
    program = ctypes.create_string_buffer(filter_program(os.getpid(), platform.machine()))
    header = struct.pack("HxxxxxxP", (len(program) - 1) // 8, ctypes.addressof(program))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)
