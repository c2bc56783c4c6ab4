"""What the owner of a device decides, whatever the server asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client_app.data import job_examples, read_share
from client_app.handler import handle
from client_app.site import NOWHERE, Site, SiteError
from client_app.store import ClientStore
from fleet.data import DataError
from wire.message import DataConfig, Instruction, Job, ModelConfig, TrainConfig
from zoo import get_model

JOB = Job(
    ModelConfig("mlp"),
    DataConfig("npz:/server/data/faces.npz"),
    TrainConfig(),
    4,
    2,
    0,
    store_dir="/server/run/clients",
)
JOB = replace(JOB, lineage="aa11,bb22", num_classes=3, mean="0.5", std="0.25")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "data").mkdir()
    return Site(str(tmp_path / "data"), str(tmp_path / "memory"))


def with_data(**changes) -> Job:
    return replace(JOB, data=replace(JOB.data, **changes))


def test_a_simulated_client_takes_the_job_as_it_is():
    assert NOWHERE.localized(JOB) is JOB


def test_paths_of_the_server_become_paths_of_the_device(site):
    job = site.localized(JOB)
    assert job.data.name == f"npz:{site.data}/faces.npz"
    assert job.data.dir == site.data
    assert job.store_dir == f"{site.state_dir}/aa11"


@pytest.mark.parametrize(
    "name", ["npz:../secret.npz", "folder:..", "npz:a/../../../etc/passwd", "folder:/..", "npz:/a/.."]
)
def test_no_path_of_a_server_leads_out_of_the_owners_folder(site, name):
    with pytest.raises(SiteError, match=r"outside the folder|not a file"):
        site.localized(with_data(name=name))


def test_a_link_in_the_folder_does_not_lead_out_of_it(site, tmp_path):
    (tmp_path / "secret.npz").touch()
    (Path(site.data) / "faces.npz").symlink_to(tmp_path / "secret.npz")
    with pytest.raises(SiteError, match="outside the folder"):
        site.localized(JOB)


@pytest.mark.parametrize("name", ["os:listdir", "hub:whatever"])
def test_a_device_reads_files_only(site, name):
    with pytest.raises(SiteError, match="is not a file"):
        site.localized(with_data(name=name))


def test_a_device_never_downloads(site):
    assert not site.localized(with_data(name="cifar10", download=True)).data.download


@pytest.mark.parametrize("lineage", ["", "../../etc", "a/b", ".", "x" * 65])
def test_the_name_of_a_run_cannot_lead_out_of_the_nodes_own_folder(site, lineage):
    with pytest.raises(SiteError, match="no name under which"):
        site.localized(replace(JOB, lineage=lineage))


def test_a_run_of_own_shares_and_a_device_without_one_do_not_meet_nor_the_other_way_round(site, tmp_path):
    with pytest.raises(SiteError, match=r"set PRUNUS_DATA to an \.npz file"):
        site.localized(with_data(partition="own"))
    own = replace(site, data=str(tmp_path / "mine.npz"))
    with pytest.raises(SiteError, match=r"data\.partition=own"):
        own.localized(JOB)
    assert own.localized(with_data(partition="own")).data.name == f"npz:{tmp_path}/mine.npz"


def test_what_a_run_that_is_continued_remembered_is_found_under_its_name(tmp_path):
    ClientStore(str(tmp_path / "old"), 3).save(7, -1, {"gate": torch.ones(2)})
    resumed = ClientStore(str(tmp_path / "new"), 3, ["older", "old"])
    assert torch.equal(resumed.load(7)["gate"], torch.ones(2))
    resumed.save(8, 7, {"gate": torch.zeros(2)})
    assert torch.equal(resumed.load(8)["gate"], torch.zeros(2))
    assert (tmp_path / "old").exists()


def share(path: Path, num_examples: int = 40, classes=(0, 2)) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (num_examples, 8, 8), dtype=np.uint8)
    np.savez(path, x=x, y=np.resize(classes, num_examples))
    return path


def test_a_devices_own_share_is_trained_on_with_the_runs_classes_and_normalisation(site, tmp_path):
    job = with_data(partition="own", name=f"npz:{share(tmp_path / 'mine.npz')}")
    train, test, num_classes = job_examples(job, 0)
    assert (len(train) + len(test), num_classes) == (40, 3)
    assert (float(train.mean), float(train.std)) == (0.5, 0.25)
    model, _ = get_model("mlp", 3, 1, 8)
    own = replace(site, data=str(tmp_path / "mine.npz"))
    report = handle(Instruction("train", 0, 0, 1, 0, with_data(partition="own"), model.state_dict()), own)
    assert report.num_examples == len(train)
    assert report.label_counts[1] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros((3, 8, 8))}, "no .npz file with x"),
        ({"x": np.zeros((3, 8, 8)), "y": np.zeros(2, int)}, "expected images and whole labels"),
        ({"x": np.zeros((3, 8, 8)), "y": np.array([0, 1, 3])}, "labels 0 to 3, the run's are 0 to 2"),
        ({"x": np.zeros((1, 8, 8)), "y": np.array([None])}, "no .npz file with x"),
    ],
)
def test_a_share_that_is_no_data_is_an_error_that_says_what_it_is(tmp_path, content, message):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(DataError, match=message):
        read_share(str(tmp_path / "bad.npz"), 3)


@pytest.mark.parametrize("is_partial", [False, True], ids=["", "though some of its entries stay on the client"])
def test_a_sub_model_that_does_not_fit_the_owners_memory_is_refused_before_training(is_partial, site, tmp_path):
    small = replace(site, data=str(share(tmp_path / "mine.npz")), memory_bytes=10_000)
    model, _ = get_model("mlp", 3, 1, 8)
    asked = Instruction("train", 0, 0, 1, 0, with_data(partition="own"), model.state_dict(), is_partial=is_partial)
    with pytest.raises(SiteError, match="owner allows 10000"):
        handle(asked, small)
