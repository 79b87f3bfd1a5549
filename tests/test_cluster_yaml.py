"""cluster.yaml against the schema and the checks that ray itself ships, and what it promises beyond them."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def workers(config: dict) -> dict[str, dict]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


def spot(node: dict) -> bool:
    return node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"


def test_it_fits_the_schema_that_ray_ships(config: dict) -> None:
    spec = find_spec("ray.autoscaler")
    assert spec
    assert spec.origin
    schema = json.loads((Path(spec.origin).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse what it does not know
        jsonschema.validate({**config, "idle_timeout": 5}, schema)


def test_it_passes_the_checks_of_ray_up(config: dict) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    assert prepared["setup_commands"] == config["setup_commands"], "ray's default would install a nightly ray"


def test_every_node_mounts_the_shared_root_at_one_path(config: dict) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    (mount,) = [command for command in config["initialization_commands"] if "sudo mount " in command]
    assert re.search(r" -t nfs4 -o \S*\bhard\b\S* \S+:/ /mnt/idem$", mount)
    assert config["initialization_commands"][-1].startswith("mountpoint -q /mnt/idem &&"), "a node without it must not start"
    # A node type with a list of its own would go without the mount.
    assert [name for name, node in config["available_node_types"].items() if "initialization_commands" in node] == []
    assert f"efs.{config['provider']['region']}." in mount
    assert re.findall(r"--set root=(\S+)", text) == ["/mnt/idem/x"]


def test_the_head_takes_no_work(config: dict) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0


def test_every_worker_scales_from_zero_to_a_limit(config: dict, workers: dict[str, dict]) -> None:
    assert all(node["min_workers"] == 0 and node["max_workers"] > 0 for node in workers.values())
    assert config["max_workers"] == sum(node["max_workers"] for node in workers.values())
    assert config["idle_timeout_minutes"] > 0


def test_there_are_cpu_workers_on_spot_and_gpu_workers_on_demand(workers: dict[str, dict]) -> None:
    by_role = {node["labels"]["idem/role"]: node for node in workers.values()}
    assert sorted(by_role) == ["ingest", "serve", "train"]
    assert "GPU" not in by_role["ingest"]["resources"]
    assert spot(by_role["ingest"])
    for role in ("train", "serve"):
        assert by_role[role]["resources"]["GPU"] > 0
        assert not spot(by_role[role])


def test_each_kind_of_node_installs_its_own_pinned_requirements(config: dict, workers: dict[str, dict]) -> None:
    for node in workers.values():
        commands = " ".join(node.get("worker_setup_commands", config["setup_commands"]))
        wanted, other = ("gpu", "cpu") if node["resources"].get("GPU") else ("cpu", "gpu")
        assert f"requirements-{wanted}.txt" in commands
        assert f"requirements-{other}.txt" not in commands
    assert all((ROOT / local).is_file() for local in config["file_mounts"].values())
    assert {Path(remote).name for remote in config["file_mounts"]} == set(config["file_mounts"].values())
