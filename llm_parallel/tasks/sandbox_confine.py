"""Landlock and seccomp, through ctypes: what a process gives up before it runs a program that nobody trusts.

Only the standard library is imported: the text of this file also runs inside the sandbox. Landlock (Linux 5.13) leaves
a process the files below given folders. A seccomp filter leaves it a list of system calls, and everything else fails
with EPERM: no socket, no new process, no signal to another process. Neither needs a privilege, and neither can be taken
back."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Mapping, Sequence

WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""System calls that have the same number on every architecture."""
ACCESS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16}
"""How many kinds of access to files each version of Landlock knows."""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, GREATER_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06

# name: (number on x86_64, number on aarch64), None where the architecture has no such call.
PLAIN: Mapping[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "openat": (257, 56),
    "close": (3, 57),
    "close_range": (436, 436),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "umask": (95, 166),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
}
# Where there is a private folder: these act on paths, which Landlock leaves alone.
FILES: Mapping[str, tuple[int | None, int | None]] = {
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "creat": (85, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
}
# Calls that are allowed for some arguments only: the numbers, and (argument, the values that it may have).
SELF = -1
CONDITIONAL: Mapping[str, tuple[tuple[int, int], Sequence[tuple[int, Sequence[int]]]]] = {
    # A thread as glibc and musl start one; a process never.
    "clone": ((56, 220), [(0, [0x3D0F00, 0x7D0F00])]),
    "kill": ((62, 129), [(0, [SELF])]),
    "tgkill": ((234, 131), [(0, [SELF])]),
    "prlimit64": ((302, 261), [(0, [0, SELF])]),
    # Names of threads and of memory.
    "prctl": ((157, 167), [(0, [15, 16, 0x53564D41])]),
    # Whether it is a terminal and how wide, what is there to read, blocking, close on exec.
    "ioctl": ((16, 29), [(1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])]),
    # All but what sends signals to an owner.
    "fcntl": ((72, 25), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032])]),
    # Streams between its own ends, which asyncio needs; a datagram could be sent to another socket's name.
    "socketpair": ((53, 199), [(0, [1]), (1, [1, 1 | 0x800, 1 | 0x80000, 1 | 0x80800])]),
    "sendto": ((44, 206), [(4, [0])]),
}
CLONE3 = (435, 435)


def column() -> int:
    """The column of the tables for this machine. Raises OSError on one that they do not cover."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH or struct.calcsize("P") != 8:
        raise OSError(f"no seccomp filter is written for {machine}; x86_64 and aarch64 have one")
    return list(AUDIT_ARCH).index(machine)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def filter_program(own_pid: int, files: bool, machine: int) -> bytes:
    """The filter as instructions of classic BPF, 8 bytes each. own_pid: the process that signals may reach; files:
    whether calls that change paths are allowed; machine: the column of the tables."""
    calls = {**PLAIN, **FILES} if files else dict(PLAIN)
    program = [
        _op(LOAD, 4),
        _op(EQUAL, list(AUDIT_ARCH.values())[machine], 1, 0),
        _op(RETURN, KILL),
        _op(LOAD, 0),
        _op(GREATER_EQUAL, 0x40000000, 0, 1),  # x32's numbers
        _op(RETURN, ERRNO | errno.EPERM),
        _op(EQUAL, CLONE3[machine], 0, 1),  # its flags lie in memory; after ENOSYS the C library takes clone
        _op(RETURN, ERRNO | errno.ENOSYS),
    ]
    for numbers in calls.values():
        if (number := numbers[machine]) is not None:
            program += [_op(EQUAL, number, 0, 1), _op(RETURN, ALLOW)]
    for numbers, conditions in CONDITIONAL.values():
        block: list[bytes] = []
        for argument, allowed in conditions:
            values = [own_pid if value == SELF else value for value in allowed]
            block.append(_op(LOAD, 16 + 8 * argument))
            block += [_op(EQUAL, value, len(values) - place) for place, value in enumerate(values)]
            block.append(_op(RETURN, ERRNO | errno.EPERM))
            if argument == 4:  # a pointer, of which the upper half counts too
                block += [_op(LOAD, 20 + 8 * argument), _op(EQUAL, 0, 1, 0), _op(RETURN, ERRNO | errno.EPERM)]
        block.append(_op(RETURN, ALLOW))
        program += [_op(EQUAL, numbers[machine], 0, len(block)), *block]
    return b"".join([*program, _op(RETURN, ERRNO | errno.EPERM)])


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *values: int) -> None:
    """prctl(2). Raises OSError."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _libc().prctl(option, *padded):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def no_new_privileges() -> None:
    """Nothing that this process starts gains privileges; Landlock and seccomp want it. Raises OSError."""
    prctl(38, 1)


def install_filter(files: bool) -> None:
    """Puts this process under the filter. Raises OSError."""
    program = ctypes.create_string_buffer(filter_program(os.getpid(), files, column()))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", (len(program) - 1) // 8, ctypes.addressof(program)))
    prctl(22, 2, ctypes.addressof(head))


def landlock_version() -> int:
    """The version of Landlock that this kernel has; 0 if none."""
    return max(_libc().syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), 0)


def install_landlock(readable: Sequence[str]) -> None:
    """Leaves this process what lies in the folders ``readable``, or is one of these files, for reading, and /dev/null
    for writing if it is among them. Raises OSError."""
    version = min(landlock_version(), max(ACCESS_BITS))
    if version < 1:
        raise OSError("this kernel has no Landlock, or it is not switched on; it came with Linux 5.13")
    libc = _libc()
    handled = (1 << ACCESS_BITS[version]) - 1
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", handled, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "Landlock refuses a set of rules")
    try:
        for path in readable:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                allowed = READ_FILE | READ_DIR if stat.S_ISDIR(os.fstat(handle).st_mode) else READ_FILE
                if path == os.devnull:
                    allowed |= (WRITE_FILE | TRUNCATE) & handled
                if libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, handle), 0):
                    raise OSError(ctypes.get_errno(), f"Landlock refuses a rule for {path}")
            finally:
                os.close(handle)
        if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
            raise OSError(ctypes.get_errno(), "Landlock refuses to restrict this process")
    finally:
        os.close(ruleset)


def become(uid: int, keep_reading: bool) -> None:
    """Root becomes the user ``uid``, of whom there is no other process: limits on processes do not hold for root.
    keep_reading: the capability to read every file is kept, for an interpreter in a folder that is root's own; what can
    be read, Landlock says. Raises OSError."""
    if keep_reading:
        prctl(8, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if keep_reading:
        header = struct.pack("Ii", 0x20080522, 0)
        for capability in (2, 1):  # to read all; to read and write all
            data = struct.pack("IIIIII", 1 << capability, 1 << capability, 0, 0, 0, 0)
            if _libc().capset(header, data) == 0:
                return
        raise OSError("root may not keep the right to read the interpreter's files")
