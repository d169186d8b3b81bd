"""Programs that try to get out of the sandbox, or to pass without being right.

A script prints THROUGH where it succeeds. ``{secret}``, ``{folder}``, ``{port}``, ``{socket}``, ``{abstract}``,
``{datagrams}``, ``{pid}``, ``{memory}`` and ``{shared}`` stand for what the test holds outside."""

from __future__ import annotations

from dataclasses import dataclass

SYSCALL = (
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def call(number, *a):\n"
    "    return libc.syscall(number, *[ctypes.c_long(x) if isinstance(x, int) else x for x in a])\n"
)


@dataclass(frozen=True)
class Attack:
    """status: what the result must say; None: whatever it says, nothing may get through."""

    source: str
    status: str | None = "failed"


def attempt(body: str) -> Attack:
    """A program that must fail by an exception before its end."""
    return Attack(body + "\nprint('THROUGH')")


def calls(*lines: str) -> Attack:
    """System calls by their numbers on x86_64, each of which must fail."""
    return Attack(
        SYSCALL + ("\n").join(f"if call({line}) >= 0: print('THROUGH', {line!r})" for line in lines), "passed"
    )


FILES = {
    "read /etc/passwd": attempt("open('/etc/passwd').read()"),
    "read a file of the user": attempt("open({secret!r}).read()"),
    "list a folder of the user": attempt("import os; os.listdir({folder!r})"),
    "list the home folder": attempt("import os, pwd; assert os.listdir(os.path.expanduser('~'))"),
    "write a file of the user": attempt("open({secret!r}, 'w').write('x')"),
    "make a file in a folder of the user": attempt("open({folder!r} + '/made', 'w').write('x')"),
    "truncate a file of the user": attempt("import os; os.truncate({secret!r}, 0)"),
    "remove a file of the user": attempt("import os; os.unlink({secret!r})"),
    "rename a file of the user": attempt("import os; os.rename({secret!r}, {secret!r} + '2')"),
    "chmod a file of the user": attempt("import os; os.chmod({secret!r}, 0o777)"),
    "change the times of a file of the user": attempt("import os; os.utime({secret!r}, (1, 1))"),
    "symbolic link to a file of the user": attempt(
        "import os; os.chdir('/tmp'); os.symlink({secret!r}, 'link'); open('link').read()"
    ),
    "hard link to a file of the user": attempt("import os; os.link({secret!r}, '/tmp/hard'); open('/tmp/hard').read()"),
    "hard link to the library": attempt("import os; os.link(os.__file__, '/tmp/hard')"),
    "write the library": attempt("import os; open(os.__file__, 'a').write('#')"),
    "write beside the library": attempt("import os; open(os.path.dirname(os.__file__) + '/new.py', 'w')"),
    "write into the root folder": attempt("open('/new', 'w')"),
    "write shared memory": attempt("open('/dev/shm/new', 'w')"),
    "read shared memory": attempt("open('/dev/shm/' + {memory!r}, 'rb').read(1)"),
    "open the disk": attempt("open('/dev/vda', 'rb').read(1)"),
    "open the terminal": attempt("open('/dev/tty')"),
    "make a device": attempt("import os; os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0)); open('/tmp/disk', 'rb')"),
    "read /sys": attempt("import os; os.listdir('/sys/class')"),
    "open a file by its handle": calls("304, -100, 0, 0", "303, -100, 0, 0, 0, 0"),
    "huge file names": attempt("open('/tmp/' + 'x' * 5000, 'w')"),
    "folders in folders": Attack("import os\nos.chdir('/tmp')\nwhile True:\n    os.mkdir('d'); os.chdir('d')", None),
    "fill the disk by one file": attempt(
        "with open('/tmp/big', 'wb') as f:\n    for _ in range(200): f.write(bytes(1 << 20))"
    ),
    "fill the disk by several files": attempt(
        "for n in range(50):\n    with open(f'/tmp/big{{n}}', 'wb') as f: f.write(bytes(1 << 20))"
    ),
    "fill memory by memfd": attempt("import os; os.memfd_create('x')"),
}

NETWORK = {
    "connect to loopback": attempt("import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
    "connect outside": attempt("import socket; socket.create_connection(('192.0.2.1', 80), 1)"),
    "ask for a name": attempt("import socket; assert socket.getaddrinfo('example.org', 80)"),
    "listen": attempt("import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"),
    "connect to a socket in a folder": attempt("import socket; socket.socket(socket.AF_UNIX).connect({socket!r})"),
    "connect to an abstract socket": attempt(
        "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + {abstract!r})"
    ),
    "datagram to an abstract socket": attempt(
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', chr(0) + {datagrams!r})"
    ),
    "stream sent to a name": attempt(
        "import socket\na, b = socket.socketpair()\na.sendto(b'x', chr(0) + {datagrams!r})"
    ),
    "raw socket": attempt("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink socket": attempt("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "io_uring": calls("425, 8, 0", "426, 0, 0, 0, 0, 0, 0"),
}

PROCESSES = {
    "fork bomb": attempt("import os\nwhile True: os.fork()"),
    "vfork and clone": calls("58", "56, 17, 0, 0, 0, 0", "435, 0, 88", "57"),
    "start a shell": attempt("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])"),
    "become another program": attempt("import os, sys; os.execv('/bin/sh', ['sh'])"),
    "a child in a session of its own": attempt("import os\nif os.fork() == 0:\n    os.setsid()"),
    "a process of multiprocessing": attempt(
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start(); p.join()"
    ),
    # Either no thread is started any more, or Python waits for one that could not begin, until the time is over.
    "thread bomb": Attack(
        "import threading, time\nthreading.stack_size(32768)\n"
        "for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('THROUGH')",
        None,
    ),
    "kill the parent": attempt("import os; os.kill(os.getppid(), 9)"),
    "kill everybody": attempt("import os; os.kill(-1, 9)"),
    "kill its group": attempt("import os; os.killpg(0, 9)"),
    "kill a bystander": attempt("import os; os.kill({pid}, 9)"),
    "signal by descriptor": attempt("import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)"),
    "signal by an owner of a descriptor": attempt(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, os.getppid())\nfcntl.fcntl(r, 10, 9)"
    ),
    "queue a signal": calls("129, {pid}, 9, 0", "200, {pid}, 9", "234, {pid}, {pid}, 9"),
    "ptrace": calls("101, 16, {pid}, 0, 0", "101, 0x4206, {pid}, 0, 0", "101, 0, 0, 0, 0"),
    "read another process's memory": calls("310, {pid}, 0, 0, 0, 0, 0", "311, {pid}, 0, 0, 0, 0, 0", "438, 3, 0, 0"),
    "see other processes": attempt("import os; os.listdir('/proc')"),
    "read another process's environment": attempt("import os; open('/proc/%d/environ' % os.getppid()).read()"),
    "read its own memory by /proc": attempt("open('/proc/self/mem', 'rb').read(1)"),
    "limits of another process": attempt("import os, resource; resource.prlimit(os.getppid(), 7)"),
    "become root": attempt("import os; os.setuid(0); os.setgroups([0])"),
    "another user": attempt("import os; os.setresuid(1, 1, 1)"),
    "mount": calls("165, b'x', b'/tmp', b'tmpfs', 0, 0", "428, -100, b'/', 1", "430, b'tmpfs', 0", "166, b'/tmp', 2"),
    "namespaces": calls("272, 0x10000000", "272, 0x20000", "308, 0, 0"),
    "chroot": attempt("import os; os.chroot('/tmp')"),
    "take a filter back": calls("157, 38, 0, 0, 0, 0", "157, 22, 0, 0, 0, 0", "157, 4, 1, 0, 0, 0", "317, 0, 0, 0"),
    "other calls of the kernel": calls(
        "321, 0, 0, 0",
        "298, 0, 0, -1, -1, 0",
        "250, 0, 0",
        "248, 0, 0, 0, 0, -2",
        "323, 0",
        "169, 0, 0, 0",
        "135, 8",
        "175, 0, 0, 0",
        "246, 0, 0, 0, 0",
        "163, 0",
        "142, 0, 0",
        "203, 0, 8, 0",
        "141, 0, 0, -20",
    ),
    "numbers of 32 bits": calls("0x40000000 + 39", "0x40000000 + 57"),
    "priority": attempt("import os; os.nice(-5)"),
    "System V shared memory": calls("29, {shared}, 0, 0", "29, 0, 4096, 0o1777", "64, 0, 1, 0o1777", "68, 0, 0o1777"),
    "POSIX message queue": calls("240, b'queue', 0o102, 0o600, 0"),
    "environment": attempt("import os; assert os.environ.keys() - {{'PWD', 'LC_CTYPE'}}"),
    "inherited descriptors": attempt(
        "import os\n"
        "open_ones = []\n"
        "for d in range(3, 1024):\n"
        "    try: os.fstat(d)\n"
        "    except OSError: continue\n"
        "    open_ones.append(d)\n"
        "assert open_ones"
    ),
}

USE = {
    "memory": Attack("x = bytearray(3 << 30)", "memory"),
    "memory by pieces": Attack("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "memory of maps": attempt("import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(4)]"),
    "segmentation fault": Attack("import ctypes; ctypes.string_at(0)", "crashed"),
    "abort": Attack("import os; os.abort()", "crashed"),
    "recursion": attempt("def f(): f()\nf()"),
    "recursion without Python's limit": Attack(
        "import sys, threading\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(lambda: x)()\nf(0)", None
    ),
    "output": Attack("while True: print('x' * 10000)", "output"),
    "messages": Attack("import sys\nwhile True: sys.stderr.write('x' * 10000)", "output"),
    "files by the million": Attack(
        ("import os\nfor n in range(10 ** 9):\n    os.close(os.open('/tmp/%d' % n, os.O_CREAT | os.O_WRONLY))"),
        None,
    ),
    "core file": Attack(
        ("import os, resource\nresource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))"), "failed"
    ),
    "more descriptors": attempt("import os\nx = [os.dup(0) for _ in range(1000)]"),
    "higher limits": attempt("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"),
    "an end hook that fails": Attack("import atexit\natexit.register(lambda: 1 / 0)\n", "passed"),
}

SLOW = {
    "processor time": Attack("while True: pass", "timeout"),
    "processor time, signals caught": Attack(
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "a thread that lives on": Attack(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()", "timeout"
    ),
    "sleep": Attack("import time; time.sleep(600)", "timeout"),
    "an end hook that waits": Attack("import atexit, time\natexit.register(time.sleep, 600)", "timeout"),
}

TESTS = "assert f(2) == 4\nassert f(3) == 9"

CHEATS = {
    "os._exit(0)": "import os; os._exit(0)",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "exit in the function": "def f(x):\n    import os; os._exit(0)",
    "no such function": "x = 1",
    "no Python": "def f(x: return x",
    "equal to everything": (
        "class Same:\n"
        "    __eq__ = lambda s, o: True\n"
        "    __ne__ = lambda s, o: False\n"
        "    __hash__ = object.__hash__\n"
        "def f(x): return Same()"
    ),
    "a number equal to everything": (
        "class Same(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return Same(5)"
    ),
    "a text equal to everything": (
        "class Same(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(x): return Same('')"
    ),
    "a list equal to everything": "class Same(list):\n    __eq__ = lambda s, o: True\ndef f(x): return Same()",
    "another comparison": (
        "import operator, builtins\n"
        "operator.eq = lambda a, b: True\n"
        "builtins.AssertionError = type('Quiet', (BaseException,), {})\n"
        "def f(x): return 0"
    ),
    "other builtins": (
        "import builtins\n"
        "builtins.__dict__['isinstance'] = lambda *a: True\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\n"
        "def f(x): return 0"
    ),
    "writes a verdict everywhere": (
        "import os\n"
        "for d in range(3, 64):\n"
        '    try: os.write(d, b\'{"ok": true}\\n{"ok": true}\\n{"done": true}\\n\')\n'
        "    except OSError: pass\n"
        "def f(x): return 0"
    ),
    "answers before it is asked": (
        "import json, os, struct, sys\n"
        "for d in range(3, 64):\n"
        "    for m in (['return', None, []], ['return', {'dict': [['f', {'mine': 0}]]}, []], ['return', True, []]):\n"
        "        t = json.dumps(m).encode()\n"
        "        try: os.write(d, struct.pack('<Q', len(t)) + t)\n"
        "        except OSError: pass\n"
        "import os; os._exit(0)"
    ),
    "changes the library of the tests": (
        "import llm_parallel.tasks.sandbox_calls as c, llm_parallel.tasks.sandbox_inside as i\n"
        "c.Peer._encode = lambda s, v, d=0: True\n"
        "i.Outcomes.failed = lambda s, e: None\n"
        "def f(x): return 0"
    ),
    "looks for the tests": (
        "import gc, sys\n"
        "found = [o for o in gc.get_objects() if isinstance(o, str) and chr(61) * 2 + ' 9' in o]\n"
        "frame = sys._getframe()\n"
        "text = ''\n"
        "while frame:\n"
        "    text += repr(frame.f_locals); frame = frame.f_back\n"
        "known = chr(61) * 2 + ' 9' in text or bool(found)\n"
        "def f(x): return x * x if known else 0"
    ),
    "an end hook": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "raises what ends tests": "def f(x): raise KeyboardInterrupt",
    "raises a base exception": "class E(BaseException): pass\ndef f(x): raise E",
    "an exception that will not speak": "class E(Exception):\n    def __str__(self): raise E\ndef f(x): raise E",
    "an attribute that lies": (
        "class Lie:\n    def __getattr__(self, name): return lambda *a: True\ndef f(x): return Lie()"
    ),
    "the right value of another type": "def f(x): return str(x * x)",
    "deep value": "def f(x):\n    v = []\n    for _ in range(100000): v = [v]\n    return v",
    "huge value": "def f(x): return [0] * 10 ** 8",
    "endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "kills its tests": (
        "import os, signal\n"
        "def f(x):\n"
        "    for p in range(1, 50):\n"
        "        try: os.kill(p, 9)\n"
        "        except OSError: pass\n"
        "    return 0"
    ),
}
