"""A forked program does what an interpreter would."""

import os
import signal
import subprocess

import pytest

SCRIPTS = {
    "import sys; sys.exit(3)": (3, "", ""),
    "import sys; sys.exit('no')": (1, "", "no\n"),
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (137, "", ""),
    "import os; print(os.getcwd(), os.environ['HOME'])": (0, "{folder} {folder}\n", ""),
    "import sys; print(__name__, *sys.argv, sys.stdin.read())": (0, "__main__ a.py b in\n", ""),
    "import b; print(b.__file__)": (0, "{folder}/b.py\n", ""),
    "import warnings; warnings.warn('old')": (1, "", "UserWarning: old\n"),
}


@pytest.mark.parametrize(("script", "ended"), SCRIPTS.items())
def test_a_script(programs, tmp_path, script, ended):
    (tmp_path / "a.py").write_text(script)
    (tmp_path / "b.py").touch()
    done = subprocess.run(
        [programs / "python", "a.py", "b"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "PYTHONWARNINGS": "error"},
        input="in",
        capture_output=True,
        text=True,
        timeout=60,
    )
    status, out, err = ended
    assert (done.returncode, done.stdout) == (status, out.format(folder=tmp_path))
    assert done.stderr.endswith(err)


def test_signals_are_passed_on(programs, tmp_path):
    script = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: exit(5))
print("on", flush=True)
while True:
    time.sleep(0.01)
"""
    (tmp_path / "a.py").write_text(script)
    command = [programs / "python", tmp_path / "a.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "on\n"
        started.send_signal(signal.SIGUSR1)
        assert started.wait(20) == 5
