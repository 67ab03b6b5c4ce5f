"""Makes a running process end by itself, from outside and in the same way for any program: by an exit code of our choice,
by a memory fault, or by taking more memory than there is. A SEGV from kill(1) would not do: who has a handler for it may take it for a mistake and live on.

It is stopped with ptrace(2) and its registers are changed. x86_64 only, and only where a descendant may be traced.
"""

import ctypes
import errno
import os
import platform

ATTACH, DETACH, POKETEXT, GETREGS, SETREGS = 16, 17, 4, 12, 13
EXIT_GROUP, MMAP = 231, 9
READ_WRITE = 3
PRIVATE_ANONYMOUS_POPULATED = 0x8022
SYSCALL = 0x050F
WALL = 0x40000000

# struct user_regs_struct of <sys/user.h>.
NAMES = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs"
).split()


class Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in NAMES]


def is_possible():
    return platform.machine() == "x86_64"


def exit_with(pid, code):
    """Its next instruction becomes `syscall`, and its registers say exit_group(code). Raises `OSError`, as `change` does."""

    def to_exit(registers, poke):
        poke(registers.rip, SYSCALL)
        registers.rax, registers.rdi = EXIT_GROUP, code

    change(pid, to_exit)


def fault(pid):
    """Its next instruction is at address 0, where there is none. Raises `OSError`, as `change` does."""

    def to_nowhere(registers, _poke):
        registers.rip = 0

    change(pid, to_nowhere)


def eat(pid, size):
    """Its next instruction takes so many bytes of memory, at once. Raises `OSError`, as `change` does."""

    def to_mmap(registers, poke):
        poke(registers.rip, SYSCALL)
        registers.rax, registers.rdi, registers.rsi, registers.rdx = MMAP, 0, size, READ_WRITE
        registers.r10, registers.r8, registers.r9 = PRIVATE_ANONYMOUS_POPULATED, 2**64 - 1, 0

    change(pid, to_mmap)


def change(pid, how):
    """Stops the process, lets `how` change its registers and memory, and lets it go on.

    Raises `OSError` when it may not be traced, or on another machine than x86_64.
    """
    if not is_possible():
        raise OSError(errno.ENOSYS, "x86_64 only")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long

    def trace(request, address, data):
        if libc.ptrace(request, pid, address, data) == -1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    registers = Registers()
    trace(ATTACH, None, None)
    os.waitpid(pid, WALL)
    try:
        trace(GETREGS, None, ctypes.byref(registers))
        how(registers, lambda address, word: trace(POKETEXT, address, word))
        # Else the kernel would restart the call that the stop interrupted, two bytes before.
        registers.orig_rax = 2**64 - 1
        trace(SETREGS, None, ctypes.byref(registers))
    finally:
        trace(DETACH, None, None)
