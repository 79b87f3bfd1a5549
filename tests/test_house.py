"""Rules of the house that no linter knows: names, requirement files, and what may be committed."""

import ast
import importlib.util
import re
import subprocess
import sys
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
# Targets of links and pictures in Markdown, and of pictures in the HTML within.
LINKS = re.compile(r"\]\(\s*<?([^)>\s]+)|\bsrc=[\"']([^\"']+)")
PLACEHOLDER = re.compile(r"\b[A-Z]+_(?:OUTPUT|MINUTES)\b")
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


def imported(path: str) -> set[str]:
    """The top-level modules that a Python file imports anywhere, relative imports aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text(path), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def declared(*extras: str) -> set[str]:
    """Canonical names of the distributions that pyproject.toml asks for, with those of `extras`."""
    lines = [*project()["dependencies"], *(line for extra in extras for line in project()["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


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


@pytest.mark.parametrize(("folders", "extras"), [((*PACKAGES, "benchmarks"), ("cpu", "gpu", "bench")), (("tests",), ("cpu", "gpu", "dev"))])
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    owners, asked = packages_distributions(), declared(*extras)
    own = {*PACKAGES, "benchmarks", "tests", *sys.stdlib_module_names}
    files = [path for path in tracked() if path.endswith(".py") and path.split("/")[0] in folders]
    foreign = {(path, module) for path in files for module in imported(path) - own}
    assert {"numpy", "pyarrow"} <= {module for _, module in foreign}
    undeclared = [f"{path}: {m}" for path, m in sorted(foreign) if not {canonicalize_name(d) for d in owners.get(m, (m,))} & asked]
    assert undeclared == []


def test_links_in_the_documents_lead_somewhere() -> None:
    paths = {ROOT / path for path in tracked()}
    there = paths | {folder for path in paths for folder in path.parents}
    documents = [
        path for path in tracked() if path in ("README.md", "CONTRIBUTING.md") or (path.startswith("docs/") and path.endswith(".md"))
    ]
    links = [(path, link) for path in documents for groups in LINKS.findall(text(path)) for link in groups if link]
    relative = [(path, link.split("#")[0]) for path, link in links if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert relative
    assert [f"{path}: {link}" for path, link in relative if ((ROOT / path).parent / link).resolve() not in there] == []


@pytest.mark.parametrize(
    ("package", "readers"),
    [("pipelines", {"items"}), ("train", {"embedder", "neighbours", "reranker"}), ("index", {"merge", "release", "searcher"})],
)
def test_every_module_but_the_readers_is_closed_to_later_stages(package: str, readers: set[str]) -> None:
    """A new module that the import contract does not name would be a reader unnoticed."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    closed = next(c["forbidden_modules"] for c in contracts if c["name"] == f"Stages meet at their readers alone: {package}")
    there = {path.name.removesuffix(".py") for path in (ROOT / package).iterdir() if path.name[0] not in "._"}
    assert {name.removeprefix(f"{package}.") for name in closed} == there - readers


def test_the_readme_is_filled_in() -> None:
    assert PLACEHOLDER.findall(text("README.md")) == []


@pytest.mark.parametrize(
    ("made", "gone"),
    [("cpu-2", {"cpu-1", "gpu-1"}), ("gpu-1", {"cpu-1", "gpu-1"}), ("gpu-2", {"cpu-1", "gpu-1"}), ("dev-2", {"dev-1"})],
)
def test_an_installation_takes_the_stamps_that_it_makes_untrue(
    made: str, gone: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / ".ci" / "setup.py")
    assert spec
    assert spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    monkeypatch.chdir(tmp_path)
    before = {"cpu-1", "gpu-1", "dev-1"}
    seen: list[set[str]] = []
    stamps = lambda: {path.name.removeprefix(".installed-") for path in Path(".venv").iterdir()}  # noqa: E731
    Path(".venv").mkdir()
    for name in before:
        Path(".venv", f".installed-{name}").touch()
    monkeypatch.setattr(setup, "make_environment", lambda: None)
    monkeypatch.setattr(setup, "install", lambda files: seen.append(stamps()))
    setup.main(f".venv/.installed-{made}", "requirements.txt")
    assert seen == [before - gone]  # an installation that stops half-way leaves none of them
    assert stamps() == before - gone | {made}
