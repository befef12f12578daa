"""Hostfiles and Slurm allocations become the layout that the same words as flags would give."""

import socket

import pytest

from msft.errors import InputError
from msft.launch.cluster import Cluster, Given, arrange, read_hostfile
from msft.launch.slurm import expand, from_slurm

TWO = Cluster(("a", "b"), 8, 1, "hosts")


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def named(monkeypatch):
    """This machine has the name `node2.cluster`, and no other of the names leads to it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "node2.cluster")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node2.cluster")
    monkeypatch.setattr("msft.launch.cluster._is_here", lambda host: False)


@pytest.mark.parametrize("own", ["node2", "node2.cluster"])
def test_a_hostfile_of_deepspeed_or_open_mpi(hostfile, named, own):
    path = hostfile(f"# our machines\nnode1 slots=8\n\n{own}\tslots = 8   # the second\nnode3 slots=8\n")
    assert read_hostfile(path) == Cluster(("node1", own, "node3"), 8, 1, str(path))


def test_this_machine_is_found_by_an_address_that_it_has(hostfile):
    """198.51.100.0/24 is reserved for documentation: no machine has such an address."""
    path = hostfile("198.51.100.7 slots=2\n127.0.0.1 slots=2\nno-such-host.invalid slots=2\n")
    assert read_hostfile(path).own == 1
    assert read_hostfile(hostfile("198.51.100.7 slots=2\n198.51.100.8 slots=2\n")).own is None


def test_two_entries_for_this_machine_are_refused(hostfile):
    with pytest.raises(InputError, match="127.0.0.1 and 127.0.0.2 are both this machine"):
        read_hostfile(hostfile("127.0.0.1 slots=1\n127.0.0.2 slots=1\n"))


def test_everything_wrong_with_a_hostfile_is_told_with_its_line(hostfile):
    path = hostfile("a slots=2\nb\nc slots=0\na slots=2\nd slots=two\ne slots=2 f slots=2\n")
    with pytest.raises(InputError) as error:
        read_hostfile(path)
    assert error.value.problems == (
        f"{path}:2: 'b' is not of the form 'host slots=8'",
        f"{path}:3: 'c slots=0' is not of the form 'host slots=8'",
        f"{path}:4: a is named twice",
        f"{path}:5: 'd slots=two' is not of the form 'host slots=8'",
        f"{path}:6: 'e slots=2 f slots=2' is not of the form 'host slots=8'",
    )
    with pytest.raises(InputError, match="names no machine"):
        read_hostfile(hostfile("# nothing\n"))
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        read_hostfile(path.with_name("nowhere"))


def test_unequal_slots_are_refused_with_the_reason(hostfile):
    with pytest.raises(InputError, match=r"unequal slots \(a 8, b 4\): msrun and torchrun deal the ranks out in equal"):
        read_hostfile(hostfile("a slots=8\nb slots=4\n"))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (Given(), Given(2, 8, 1, "a")),
        (Given(nproc_per_node=4), Given(2, 4, 1, "a")),
        (Given(master_addr="10.0.0.1"), Given(2, 8, 1, "10.0.0.1")),
        (Given(2, 8, 1, "a"), Given(2, 8, 1, "a")),
    ],
)
def test_flags_win(given, found):
    assert arrange(TWO, given) == found


def test_fewer_machines_than_there_are_take_the_first_ones():
    three = Cluster(("a", "b", "c"), None, 0, "hosts")
    assert arrange(three, Given(nnodes=2)) == Given(2, None, 0, "a")
    assert arrange(three, Given(nnodes=1)) == Given(1, None, 0, "127.0.0.1")
    unknown = Cluster(("a", "b"), 8, None, "hosts")
    assert arrange(unknown, Given(node_rank=1)) == Given(2, 8, 1, "a")


@pytest.mark.parametrize(
    ("cluster", "given", "problem"),
    [
        (TWO, Given(nnodes=3), "--nnodes 3: hosts names 2: a, b"),
        (TWO, Given(nproc_per_node=9), "--nproc_per_node 9: hosts has 8 on each machine"),
        (TWO, Given(node_rank=0), r"--node_rank 0: this machine is number 1 \(b\) of hosts, counted from 0"),
        (TWO, Given(nnodes=1), "--nnodes 1: this machine is number 1 of hosts, counted from 0"),
        (
            Cluster(("a",), 8, None, "hosts"),
            Given(),
            r"hosts: this machine \(.*\) is none of a: name it, or give --node",
        ),
        (Cluster(("a", "b"), 8, None, "Slurm (X)"), Given(), "SLURM_NODEID is not set.*srun --ntasks-per-node=1 msft"),
    ],
)
def test_contradictions_are_refused_in_a_line_each(cluster, given, problem):
    with pytest.raises(InputError, match=problem) as error:
        arrange(cluster, given)
    assert len(error.value.problems) == 1


# As `scontrol show hostnames` writes them out (slurm.schedmd.com, "Node naming").
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[01-03,07]", "node01 node02 node03 node07"),
        ("node[1-3],gpu-a100-[08-10],login", "node1 node2 node3 gpu-a100-08 gpu-a100-09 gpu-a100-10 login"),
        ("lx[15,18,32-33]", "lx15 lx18 lx32 lx33"),
        ("node[098-101]", "node098 node099 node100 node101"),
        ("rack[1-2]n[3-4]", "rack1n3 rack1n4 rack2n3 rack2n4"),
        ("a[1-2].cluster.local,b", "a1.cluster.local a2.cluster.local b"),
    ],
)
def test_node_lists(text, hosts):
    assert expand(text, "X") == hosts.split()


@pytest.mark.parametrize(
    "text", ["node[", "node[]", "node[3-1]", "a,,b", "node[1-]", "node[x]", "a b", "a,a", "n[1-999999]"]
)
def test_what_is_no_node_list(text):
    with pytest.raises(InputError, match="^Slurm: X"):
        expand(text, "X")


JOB = {"SLURM_JOB_NODELIST": "node[01-02]", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("more", "slots"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"SLURM_TASKS_PER_NODE": "4,4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_TASKS_PER_NODE": "1(x2)"}, None),
        ({"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({}, None),
    ],
)
def test_a_slurm_job(more, slots):
    assert from_slurm(JOB | more) == Cluster(("node01", "node02"), slots, 1, "Slurm (SLURM_JOB_NODELIST)")


def test_a_step_on_a_part_of_the_job():
    step = {"SLURM_STEP_NODELIST": "node02", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
    assert from_slurm(JOB | step) == Cluster(("node02",), None, 0, "Slurm (SLURM_STEP_NODELIST)")


def test_a_shell_in_an_allocation_knows_its_number_only_when_it_is_alone():
    assert from_slurm({"SLURM_JOB_NODELIST": "node7"}).own == 0
    assert from_slurm({"SLURM_JOB_NODELIST": "node[7-8]"}).own is None


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"SLURM_NNODES": "3"}, r"there are 3 machines, but SLURM_JOB_NODELIST=node\[01-02\] names 2"),
        ({"SLURM_NODEID": "2"}, r"SLURM_NODEID is 2, but SLURM_JOB_NODELIST=node\[01-02\] names 2 machines"),
        (
            {"SLURM_LOCALID": "3"},
            "this is task 3 of its machine: start one launcher on each machine: srun --ntasks-per-node=1",
        ),
        ({"SLURM_TASKS_PER_NODE": "8,4"}, r"unequal slots \(node01 8, node02 4\): msrun and torchrun"),
        ({"SLURM_TASKS_PER_NODE": "8(x3)"}, r"SLURM_TASKS_PER_NODE=8\(x3\) does not fit 2 machines"),
        ({"SLURM_TASKS_PER_NODE": "8"}, "SLURM_TASKS_PER_NODE=8 does not fit 2 machines"),
        ({"SLURM_TASKS_PER_NODE": "eight"}, "SLURM_TASKS_PER_NODE=eight does not fit"),
        ({"SLURM_NODEID": "-1"}, "SLURM_NODEID=-1 is not a number"),
    ],
)
def test_slurm_variables_that_do_not_fit_together(more, problem):
    with pytest.raises(InputError, match=problem):
        from_slurm(JOB | more)
