"""Programs of the model: what passes, and what hostile ones cannot do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vespo.config.load import ConfigError
from megatron_vespo.rewards import code
from megatron_vespo.rewards.code import read_tests
from megatron_vespo.rewards.grader import Grader, Part
from megatron_vespo.rewards.sandbox import Limits, Outcome, Program, run_programs
from megatron_vespo.rewards.worker import RewardWorkers

SYSTEM_PYTHON = "/usr/bin/python3"
NO_SANDBOX = code.sandbox_fault("isolated", code.path_of(""))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_SANDBOX is not None, reason=f"no namespaces here: {NO_SANDBOX}")]
# LC_CTYPE is Python's own doing: it sets it where there is no locale.
SHOW_ENVIRONMENT = "import os; print({k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})"
LIMITS = Limits(seconds=2, total_seconds=6, memory_mb=256, processes=4, file_mb=4, open_files=32)


def run(source: str, limits: Limits = LIMITS) -> Outcome:
    program = Program(("program.py",), (("program.py", textwrap.dedent(source)),))
    (outcome,) = run_programs([program], limits, "isolated", code.path_of(""))
    return outcome


def response(source: str) -> str:
    return f"First try:\n```python\nprint('no')\n```\nNow:\n```python\n{textwrap.dedent(source)}\n```\nDone."


def programs_alive() -> set[str]:
    """Of anyone: what a program leaves behind is no child of ours."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and b"-I\0-S\0-X\0utf8\0" in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before, folders = programs_alive(), set(Path("/tmp").glob("vespo-code-*"))
    yield
    left = programs_alive() - before
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left and set(Path("/tmp").glob("vespo-code-*")) <= folders


ADD = "def add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))"
TESTS = json.dumps(
    [{"input": "1 2\n", "output": "3\n"}, {"input": "5 -5", "output": "0"}, {"assert": "assert add(2, 2) == 4"}]
)


def test_fraction_and_all_or_nothing() -> None:
    assert code.grade(response(ADD), TESTS) == 1.0
    broken = ADD.replace("a + b", "abs(a + b) or 1")
    assert code.grade(response(broken), TESTS) == pytest.approx(2 / 3)
    assert code.grade(response(broken), TESTS, score="all") == 0.0
    assert code.grade(response(ADD), TESTS, score="all") == 1.0
    assert code.grade("no program, only print(3)", TESTS) == 0.0
    assert code.grade("```python\nprint(3)", TESTS) == 0.0  # never closed
    published = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "8"]})
    assert code.grade(response(ADD), published) == 0.5


def test_leaving_early_is_not_passing() -> None:
    asserts = json.dumps([{"assert": "assert False"}])
    for source in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert code.grade(response(source), asserts) == 0.0
    printed = json.dumps([{"input": "", "output": "3"}])
    assert code.grade(response("print(3)"), printed) == 1.0
    assert code.grade(response("print(3); raise SystemExit(1)"), printed) == 0.0


def test_output_is_compared_by_lines() -> None:
    wanted = json.dumps([{"input": "", "output": "1 2\n3"}])
    assert code.grade(response("print('1 2  \\n3\\n\\n')"), wanted) == 1.0
    assert code.grade(response("print('1\\n2 3')"), wanted) == 0.0


@pytest.mark.parametrize("answer", ["7", "[]", "{}", '[{"input": "x"}]', '[{"assert": 3}]', "no json"])
def test_an_answer_without_tests_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match=r"write them as|write the tests as"):
        read_tests(answer)


def test_an_infinite_loop_is_ended() -> None:
    started = time.monotonic()
    assert run("while True: pass").timed_out
    assert run("import time; time.sleep(1000)").timed_out
    assert time.monotonic() - started < 10


def test_all_programs_together_have_a_time_limit() -> None:
    tests = json.dumps([{"input": "", "output": "1"}] * 30)
    started = time.monotonic()
    assert code.grade(response("while True: pass"), tests, seconds=1, total_seconds=2) == 0.0
    assert time.monotonic() - started < 8


def test_a_fork_bomb_stays_small_and_is_ended() -> None:
    started = time.monotonic()
    outcome = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert outcome.timed_out and time.monotonic() - started < 10
    counted = run(
        """
        import os, time
        made = 0
        try:
            while made < 50:
                if os.fork() == 0: time.sleep(60); os._exit(0)
                made += 1
        except BlockingIOError: print(made)
        """
    )
    assert 0 < int(counted.stdout) <= LIMITS.processes


def test_a_memory_bomb_ends_in_an_error() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)").stderr
    grown = run("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert not grown.timed_out and "MemoryError" in grown.stderr


def test_infinite_output_is_cut() -> None:
    outcome = run("while True: print('x' * 10000)")
    assert not outcome.timed_out and outcome.exit_code != 0
    assert len(outcome.stdout) <= LIMITS.file_mb << 20


def test_huge_files_and_many_are_refused() -> None:
    assert "File too large" in run("open('f', 'wb').write(bytes(1 << 23))").stderr
    many = run("for i in range(10): open(str(i), 'wb').write(bytes(3 << 20))")
    assert "No space left" in many.stderr
    assert "Too many open files" in run("x = [open('f', 'w') for i in range(1000)]").stderr


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # it does listen
            server.accept()[0].close()
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        assert "OSError" in outcome.stderr and outcome.exit_code == 1
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_is_empty_and_no_secret_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run(SHOW_ENVIRONMENT).stdout == "{}\n"
    for path in ("/proc/1/environ", "/etc/passwd", str(Path(__file__)), str(Path.home() / ".ssh")):
        assert "No such file" in run(f"import os; os.stat({path!r})").stderr
    top = run("import os; print(sorted(os.listdir('/')))").stdout
    assert "outside" not in top and "home" not in top and "work" in top
    # The supervisor's memory is a copy of this process's.
    read = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())
        """
    assert run(read).stdout == "-1 1\n"  # PTRACE_ATTACH of process 1: not permitted


def test_only_the_folder_of_its_own_can_be_written() -> None:
    outcome = run(
        """
        import os, sys
        open('mine', 'w').write('x')
        import tempfile; tempfile.mkdtemp()
        places = ['/', '/usr', '/usr/lib', '/dev', sys.base_prefix, os.path.dirname(os.__file__)]
        for place in places:
            try: open(place + '/vespo-was-here', 'w'); print('wrote', place)
            except OSError as error: print(error.errno)
        """
    )
    assert "wrote" not in outcome.stdout and len(outcome.stdout.split()) == 6, outcome
    read_only = "import os, sys; print([os.statvfs(p).f_flag & 1 for p in ('/', '/usr', sys.base_prefix)])"
    assert run(read_only).stdout == "[1, 1, 1]\n"  # and not only the files' owner in the way


def test_a_program_has_no_privileges() -> None:
    outcome = run(
        """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(os.getuid() != 0, libc.mount(b'x', b'/work', b'tmpfs', 0, None), libc.prctl(39, 0, 0, 0, 0))
        """
    )
    assert outcome.stdout == "True -1 1\n"  # 39: PR_GET_NO_NEW_PRIVS


def test_killing_everyone_in_sight_ends_nobody_else() -> None:
    outcome = run(
        f"""
        import os, signal
        for pid in (os.getppid(), 1, {os.getpid()}, {os.getppid()}):
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
                try: os.kill(pid, number)
                except OSError as error: print(error.errno)
        print('end')
        """
    )
    assert outcome.stdout.endswith("end\n") and outcome.exit_code == 0


def test_a_daemon_left_behind_is_ended(tmp_path: Path) -> None:
    source = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(3): os.close(fd)
                time.sleep(1000)
            os._exit(0)
        print('done')
        """
    assert run(source).stdout == "done\n"  # and the fixture finds nobody


def test_one_test_leaves_nothing_to_the_next() -> None:
    source = "import os\nprint([os.path.exists(f'/work/{i}/left') for i in range(3)])\nopen('left', 'w').write('x')"
    tests = json.dumps([{"input": "", "output": "[False, False, False]"}] * 3)
    assert code.grade(response(source), tests) == 1.0


@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason=f"no {SYSTEM_PYTHON}")
def test_limits_alone_still_end_daemons_and_loops_and_empty_the_environment() -> None:
    def grade(source: str, wanted: str) -> float:
        tests = json.dumps([{"input": "", "output": wanted}])
        return code.grade(response(source), tests, sandbox="rlimits-only", interpreter=SYSTEM_PYTHON, seconds=2)

    assert grade(SHOW_ENVIRONMENT, "{}") == 1.0
    assert grade("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(1000)\nprint(1)", "1") == 1.0
    assert grade("while True: pass", "") == 0.0
    assert grade("x = bytearray(1 << 31); print(1)", "1") == 0.0
    assert grade("import os; os.killpg(0, 9)", "") == 0.0


def test_a_worker_grades_code_and_survives_what_it_runs() -> None:
    params = {"seconds": 1, "total_seconds": 1}
    grader = Grader(
        (Part("code", "megatron_vespo.rewards.code:grade", code.grade, params=params, arguments=params),), "code"
    )
    answer = json.dumps([{"input": "1 2", "output": "3"}])
    sources = [ADD, "while True: pass", "import os; os.kill(os.getppid(), 9)", ADD]
    with RewardWorkers(grader, workers=2, timeout_s=20) as workers:
        scored = workers.score([(response(source), answer) for source in sources] + [(response(ADD), "no tests")])
        assert [s.reward for s in scored] == [1.0, 0.0, 0.0, 1.0, 0.0]
        assert "not JSON" in str(scored[-1].error) and workers.counts.errors == 1
        assert workers.counts.crashes == workers.counts.timeouts == 0


def test_a_grader_that_hangs_in_a_program_takes_the_program_along() -> None:
    """reward.timeout_s shorter than the program's own time: the worker is killed, and nothing of it stays."""
    grader = Grader.of(code.grade)
    with RewardWorkers(grader, workers=1, timeout_s=1) as workers:
        (scored,) = workers.score([(response("while True: pass"), json.dumps([{"input": "", "output": ""}]))])
        assert (scored.reward, workers.counts.timeouts) == (0.0, 1)
        time.sleep(0.5)  # less than the program's own time; the fixture looks for it


def test_what_cannot_be_protected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ISOLATED" in str(code.check("reward.params", {}, 30))
    with pytest.raises(ConfigError, match=r"reward.params.total_seconds .* more than reward.timeout_s = 20"):
        code.check("reward.params", {}, 20)
    monkeypatch.setattr(code, "sandbox_fault", lambda protection, interpreter: "unshare: Operation not permitted")
    with pytest.raises(ConfigError, match=r"cannot be kept from network .* Operation not permitted.*rlimits-only"):
        code.check("reward.params", {}, 30)
    monkeypatch.setattr(code, "sandbox_fault", lambda protection, interpreter: None)
    assert "NETWORK" in str(code.check("reward.params", {"sandbox": "rlimits-only"}, 30))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root alone can")
@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason=f"no {SYSTEM_PYTHON}")
def test_an_ordinary_user_has_the_same_protection() -> None:
    """Through a user namespace. The package's files are read as root; the interpreter must be the system's."""
    script = textwrap.dedent(
        f"""
        import os, sys
        from megatron_vespo.rewards import isolation
        from megatron_vespo.rewards.sandbox import Limits, Program, run_programs
        os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65533, 65533, 65533)
        isolation.prctl(isolation.PR_SET_DUMPABLE, 1)  # as a process is that was this user's from the start
        source = "import os, socket; print(os.getuid(), dict(os.environ), os.listdir('/'))\\n" \\
                 "import ctypes; print(ctypes.CDLL(None).mount(b'x', b'/work', b'tmpfs', 0, None))\\n" \\
                 "print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))\\n" \\
                 "socket.create_connection(('127.0.0.1', 9), timeout=1)"
        program = Program(("p.py",), (("p.py", source),))
        try:
            (outcome,) = run_programs([program], Limits(), "isolated", "{SYSTEM_PYTHON}")
        except OSError as error:
            sys.exit(f"skip: {{error}}")
        print(outcome.stdout, outcome.stderr)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if "skip:" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert done.stdout.startswith("65534 {'LC_CTYPE': 'C.UTF-8'} ["), done
    assert "\n-1\n-1\n" in done.stdout and "Network is unreachable" in done.stdout
    assert "'root'" not in done.stdout and "'work'" in done.stdout
