from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from archsearch.cli import build_parser
from archsearch.cli.search_options import search_values
from archsearch.search.storage import VARIABLE

CLUSTER = Path(__file__).parent.parent / "scripts" / "cluster"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def container() -> dict[str, Any]:
    (job,) = [each for each in documents("kubernetes.yaml") if each["kind"] == "Job"]
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each command line of archsearch in the examples, without its first word."""
    yield "kubernetes.yaml", container()["command"][1:]
    batch = (CLUSTER / "slurm.sbatch").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^archsearch (.*?) &$", batch, re.MULTILINE)
    yield "slurm.sbatch", shlex.split(line)
    comment = re.sub(r"^# ?", "", (CLUSTER / "ray.yaml").read_text(), flags=re.MULTILINE)
    (line,) = re.findall(r"'archsearch (.*?)'$", comment, re.MULTILINE | re.DOTALL)
    yield "ray.yaml", shlex.split(line)


@pytest.mark.parametrize(("name", "words"), list(commands()), ids=[name for name, _ in commands()])
def test_every_command_of_the_examples_is_one_of_ours(name: str, words: list[str]) -> None:
    options = build_parser().parse_args(words)
    assert options.command == "search"
    assert search_values(options)["trials"] == 100
    assert options.device == "cuda"
    for place in (options.store, options.out, options.data_dir):
        assert str(place).startswith(("/shared/", "$shared/")), (
            "what all nodes must see is on what they share"
        )


def test_the_batch_script_is_one_that_bash_can_read() -> None:
    done = subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_the_kubernetes_example_is_complete_and_keeps_the_password_in_its_secret() -> None:
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents("kubernetes.yaml")}
    claim = found["PersistentVolumeClaim", "archsearch-shared"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = found["Job", "archsearch"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "archsearch-shared"
    (variable,) = container()["env"]
    assert variable["name"] == VARIABLE
    assert "value" not in variable
    server = found["StatefulSet", "archsearch-postgres"]["spec"]
    labels = server["template"]["metadata"]["labels"]
    assert labels == server["selector"]["matchLabels"]
    assert labels == found["Service", "archsearch-postgres"]["spec"]["selector"]


def test_each_driver_of_the_kubernetes_example_has_a_run_directory_of_its_own() -> None:
    (out,) = [word for word in container()["command"] if word.startswith("--out=")]
    assert out.endswith("$(JOB_COMPLETION_INDEX)")
    (job,) = [each for each in documents("kubernetes.yaml") if each["kind"] == "Job"]
    assert job["spec"]["completionMode"] == "Indexed"


def test_the_ray_example_starts_a_head_and_workers_that_find_it() -> None:
    (cluster,) = documents("ray.yaml")
    head, worker = cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]
    port = re.search(r"--port=(\d+)", " ".join(head))
    assert port is not None
    assert f"--address=$RAY_HEAD_IP:{port[1]}" in " ".join(worker)
    assert len(cluster["provider"]["worker_ips"]) == cluster["max_workers"]
