"""Take from this process, and from all that it starts, what code of a model must not have. Linux only.

    deny_network()                       # seccomp: no socket but a local one
    confine_writes([Path("/tmp/mine")])  # Landlock: files are made, changed and removed only below these

Both need no privilege, cannot be undone, and are inherited. Reading is left alone. Sources: the kernel's
Documentation/userspace-api/{seccomp_filter,landlock}.rst.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from pathlib import Path

from treepo_mega.errors import TreepoError

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
SECCOMP_MODE_FILTER = 2

# seccomp's answers.
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | 1  # errno EPERM
KILL = 0x80000000

# (architecture of the audit interface, number of socket()); io_uring_setup has one number everywhere.
SYSTEM_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
IO_URING_SETUP = 425
X32_BIT = 0x40000000

# Classic BPF: load a word at an offset, compare, return.
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_FIRST_ARGUMENT = 0, 4, 16
AF_UNIX = 1

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION_FLAG = 1
LANDLOCK_RULE_PATH_BENEATH = 1
WRITE_FILE = 1 << 1
# Removing (4, 5) and making files of every kind (6 to 12).
CHANGE_FOLDERS = sum(1 << bit for bit in range(4, 13))
REFER, TRUNCATE = 1 << 13, 1 << 14
REFER_SINCE, TRUNCATE_SINCE, SCOPES_SINCE = 2, 3, 6
SCOPE_SIGNALS_AND_ABSTRACT_SOCKETS = 0b11


class SandboxError(TreepoError):
    """The kernel does not offer what was asked for; the message says what to do instead."""


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children, so that they can be counted and killed."""
    _checked(_library().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "become the reaper of its descendants")


def deny_network() -> None:
    """Refuse socket() for all but local (AF_UNIX) sockets, with EPERM, from now on.

    Raises SandboxError on a machine whose system calls are not known here, and where the kernel refuses the filter.
    """
    machine = platform.machine()
    if machine not in SYSTEM_CALLS:
        raise SandboxError(
            f"cannot deny network access on a {machine} machine; expected one of {', '.join(SYSTEM_CALLS)}: allow it "
            "(network=True), and fence the job in from outside"
        )
    architecture, socket_call = SYSTEM_CALLS[machine]
    program = [
        (LOAD, 0, 0, OFFSET_ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, OFFSET_NUMBER),
        # x86-64 has a second set of numbers for the same calls.
        (AT_LEAST, 4, 0, X32_BIT),
        # io_uring makes sockets without the call that is filtered below.
        (EQUAL, 3, 0, IO_URING_SETUP),
        (EQUAL, 0, 3, socket_call),
        (LOAD, 0, 0, OFFSET_FIRST_ARGUMENT),
        (EQUAL, 1, 0, AF_UNIX),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, padding, and a pointer.
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    library = _library()
    _no_new_privileges(library)
    _checked(library.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "deny network access (seccomp)")


def confine_writes(folders: Sequence[Path]) -> None:
    """Files are made, changed and removed only below `folders`, and in /dev/null, from now on.

    From kernel 6.12 on, signals reach only processes of this sandbox, too. Raises SandboxError for a kernel without
    Landlock (before 5.13, or switched off).
    """
    library = _library()
    version = library.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION_FLAG)
    if version < 1:
        raise SandboxError(
            "cannot confine what is written: this kernel has no Landlock (Linux 5.13 or newer, with landlock among the "
            "security modules); let it write anywhere (writes_anywhere=True), and fence the job in from outside"
        )
    handled = WRITE_FILE | CHANGE_FOLDERS
    handled |= REFER if version >= REFER_SINCE else 0
    handled |= TRUNCATE if version >= TRUNCATE_SINCE else 0
    attributes = struct.pack("QQ", handled, 0)
    if version >= SCOPES_SINCE:
        attributes += struct.pack("Q", SCOPE_SIGNALS_AND_ABSTRACT_SOCKETS)
    rules = _checked(
        library.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "make a Landlock ruleset"
    )
    try:
        for folder in folders:
            _allow(library, rules, folder, handled)
        _allow(library, rules, Path(os.devnull), WRITE_FILE)
        _no_new_privileges(library)
        _checked(library.syscall(LANDLOCK_RESTRICT_SELF, rules, 0), "confine what is written (Landlock)")
    finally:
        os.close(rules)


def _allow(library: ctypes.CDLL, rules: int, path: Path, access: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # A packed struct: no padding after the descriptor.
        rule = struct.pack("<Qi", access, opened)
        added = library.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        _checked(added, f"allow writing below {path}")
    finally:
        os.close(opened)


def _no_new_privileges(library: ctypes.CDLL) -> None:
    _checked(library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up new privileges")


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(returned: int, what: str) -> int:
    if returned < 0:
        raise SandboxError(f"this process cannot {what}: {os.strerror(ctypes.get_errno())}")
    return returned
