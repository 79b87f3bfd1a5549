"""Rules of the house that no linter knows: names, requirement files, and what may be committed."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("idem", "pipelines", "train", "index", "serve")
MAX_BYTES = 1_500_000
# In pieces, so that this file does not hold what it looks for.
FORBIDDEN = tuple(
    "".join(pieces)
    for pieces in (
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("download.", "pytorch.org"),
        ("--index", "-url"),
        ("--extra-index", "-url"),
        ("--find", "-links"),
        ("--trusted", "-host"),
        ("file:", "///"),
        ("/ro", "ot/"),
        ("/ho", "me/"),
        ("/wo", "rk/"),
        ("/tm", "p/"),
    )
)
PICKLES = re.compile(
    r"^\s*(import|from) (pickle|dill|shelve|joblib|cloudpickle)\b|\b(pickle|joblib)\.loads?\(|allow_pickle=True|weights_only=False", re.M
)
TORCH_LOAD = re.compile(r"torch\.load\((?!.*weights_only=True)")


def tracked() -> list[str]:
    """Paths of all files that are committed or about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for path in listed.stdout.split("\0") if path and ((ROOT / path).is_symlink() or (ROOT / path).exists())]


def text(path: str) -> str:
    """A file's text, "" for a binary one."""
    data = (ROOT / path).read_bytes()
    return "" if b"\0" in data[:8192] else data.decode(errors="replace")


def pins(name: str) -> dict[str, Requirement]:
    """The lines of a requirement file by canonical name; asserts that each is one exact pin and nothing else."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
        elif line:
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*+,]+", str(requirement.specifier)), f"{name}: {line} is not one exact pin of a public version"
            assert not requirement.url, f"{name}: {line} holds an address"
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pinned_version(requirement: Requirement) -> str:
    return str(requirement.specifier).removeprefix("==")


def needs(requirement: Requirement) -> list[Requirement]:
    """What the installed distribution asks for, with the extras of `requirement`; [] where another version is installed."""
    try:
        if version(requirement.name).split("+")[0] != pinned_version(requirement):
            return []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in requires(requirement.name) or ()]
    extras = ["", *requirement.extras]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_no_installed_distribution_owns_our_names() -> None:
    owned = packages_distributions()
    assert {name: owned[name] for name in PACKAGES if name in owned} == {}


def test_tests_are_no_packages() -> None:
    assert [path for path in tracked() if path.startswith("tests/") and path.endswith("__init__.py")] == []


def test_nothing_committed_names_a_machine_or_a_registry() -> None:
    found = [f"{path}: {word}" for path in tracked() if not (ROOT / path).is_symlink() for word in FORBIDDEN if word in text(path)]
    assert found == []


def test_no_link_is_committed() -> None:
    assert [path for path in tracked() if (ROOT / path).is_symlink()] == []


def test_nothing_large_is_committed() -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in tracked() if not (ROOT / path).is_symlink()}
    assert {path: size for path, size in sizes.items() if size > MAX_BYTES} == {}


def test_nothing_loads_a_pickle() -> None:
    code = [path for path in tracked() if path.endswith(".py") and path.split("/")[0] in (*PACKAGES, "benchmarks")]
    assert code
    assert [path for path in code if PICKLES.search(text(path)) or TORCH_LOAD.search(text(path))] == []


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_requirement_files_pin_what_the_project_asks_for(hardware: str) -> None:
    pinned = pins(f"requirements-{hardware}.txt")
    for line in [*project()["dependencies"], *project()["optional-dependencies"][hardware]]:
        asked = Requirement(line)
        name = canonicalize_name(asked.name)
        assert name in pinned, f"{line} of pyproject.toml is not in requirements-{hardware}.txt"
        assert asked.specifier.contains(pinned_version(pinned[name])), f"{pinned[name]} is pinned, pyproject.toml asks for {line}"
        assert asked.extras == pinned[name].extras
    assert {"faiss-cpu", "faiss-gpu"} & set(pinned) == {f"faiss-{hardware}"}, "both own the module faiss: an environment takes one"


def test_development_requirements_pin_what_the_project_asks_for() -> None:
    pinned = pins("requirements-cpu.txt") | pins("requirements-dev.txt")
    assert {canonicalize_name(Requirement(line).name) for line in project()["optional-dependencies"]["dev"]} - set(pinned) == set()


def test_pins_are_complete() -> None:
    """What a pinned distribution needs is pinned as well; torch pins its own needs, which differ between its builds."""
    pinned = pins("requirements-cpu.txt") | pins("requirements-dev.txt")
    needed = {name: needs(requirement) for name, requirement in pinned.items() if name != "torch"}
    assert sum(map(len, needed.values())) > 100, "hardly anything pinned is installed: nothing would be checked here"
    assert {f"{name} needs {r.name}" for name, found in needed.items() for r in found if canonicalize_name(r.name) not in pinned} == set()
