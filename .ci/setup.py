"""Make the virtual environment .venv and install pinned requirements into it: `python .ci/setup.py STAMP FILE...`.

The Makefile calls it with whatever Python it found, so it needs the standard library alone. STAMP is touched once all
FILEs are installed; its name carries their checksum, so an environment that is up to date costs nothing. The stamps that
it makes untrue go first. Progress is one line on standard error; pip's whole log stays in .venv/install.log. An
environment that exists is added to, never removed.
"""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
CLEAR_LINE = "\r\033[K" if sys.stderr.isatty() else ""
LOG = VENV / "install.log"
HARDWARE = {"cpu", "gpu"}  # an environment is for one of them
EXCLUSIVE = {"requirements-cpu.txt": "faiss-gpu", "requirements-gpu.txt": "faiss-cpu"}


def say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def usable() -> bool:
    """Whether .venv has a Python with pip: false for none, and for one whose making was interrupted."""
    return PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_environment() -> None:
    if usable():
        return
    if VENV.is_symlink() and not VENV.exists():
        sys.exit(f".venv is a link to {VENV.readlink()}, which does not exist; remove it (rm .venv) and try again")
    say(f"Making .venv with Python {sys.version.split()[0]}\n")
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)


def watch(process: subprocess.Popen[str], what: str) -> None:
    """Show one line until `process` ends: seconds passed and what pip says it is doing. Without a terminal, a line every 20 s."""
    started, said, quiet_since = time.monotonic(), "(the first time this takes minutes)", 0.0

    def read() -> None:
        nonlocal said
        assert process.stdout
        with LOG.open("w") as log:
            for line in process.stdout:
                log.write(line)
                if line.startswith("Installing collected packages"):
                    said = f"unpacking {line.count(',') + 1} packages"
                elif line.startswith("Collecting") or "Downloading" in line:
                    said = " ".join(line.split(" (from")[0].split())

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        time.sleep(0.5)
        passed = time.monotonic() - started
        line = f"{what}  {passed:3.0f} s  {said}"[: shutil.get_terminal_size().columns - 1]
        if CLEAR_LINE:
            say(CLEAR_LINE + line)
        elif passed - quiet_since >= 20:
            quiet_since = passed
            say(f"{line}\n")
    reader.join()
    done = "done" if process.returncode == 0 else "failed"
    say(f"{CLEAR_LINE}{what}  {done} after {time.monotonic() - started:.0f} s\n")


def install(files: Sequence[str]) -> None:
    for other in {EXCLUSIVE[file] for file in files if file in EXCLUSIVE}:
        # both provide the module faiss: the one that is not asked for has to go first, or its files are mixed up
        subprocess.run([PYTHON, "-m", "pip", "uninstall", "--yes", "--quiet", other], capture_output=True, check=True)
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    for file in files:
        command += ["--requirement", file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        watch(process, f"Installing {' and '.join(files)}")
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        say("\nstopped; the next call goes on from here\n")
        sys.exit(130)
    if process.returncode:
        tail = "".join(LOG.read_text().splitlines(keepends=True)[-15:])
        sys.exit(f"{tail}\npip could not install {', '.join(files)}: the end of its log is above, all of it in {LOG}")


def forget(stamp: str) -> None:
    """Remove the stamps of what an installation for `stamp` replaces: other pins of its kind, and the other hardware."""
    kind = Path(stamp).name.split("-")[1]  # .installed-KIND-CHECKSUM
    for old in VENV.glob(".installed-*"):
        if old.name.split("-")[1] in (HARDWARE if kind in HARDWARE else {kind}):
            old.unlink()


def main(stamp: str, *files: str) -> None:
    make_environment()
    forget(stamp)  # before, not after: an installation that stops half-way has already changed what they stand for
    install(files)
    Path(stamp).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
