"""Protects which ranks work together, against hand-made lists for Megatron's and MindFormers' order of ranks."""

import numpy as np
import pytest

from msft.backend.mesh import Mesh


def test_the_ranks_of_a_model_are_numbered_one_after_another():
    mesh = Mesh(data=3, tensor=2, rank=3)
    assert (mesh.data_rank, mesh.tensor_rank) == (1, 1)
    assert mesh.tensor_groups == [[0, 1], [2, 3], [4, 5]]
    assert mesh.replica_groups == [[0, 2, 4], [1, 3, 5]]


def test_stages_are_outermost_and_parts_of_rows_within_the_replicas():
    """2 stages x 2 shares of the rows x 2 parts of these x slices in 2: rank 13 = 8 + 4 + 0 + 1."""
    mesh = Mesh(data=2, tensor=2, rank=13, context=2, pipeline=2)
    places = mesh.stage, mesh.data_rank, mesh.context_rank, mesh.tensor_rank
    assert places == (1, 1, 0, 1)
    assert (mesh.replicas, mesh.replica_rank, mesh.parts) == (4, 2, 4)
    assert mesh.tensor_groups == [[first, first + 1] for first in range(0, 16, 2)]
    assert mesh.context_groups == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert mesh.replica_groups == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert mesh.pipeline_groups == [[first, first + 8] for first in range(8)]


@pytest.mark.parametrize("rank", range(8))
def test_every_rank_is_in_one_group_of_each_kind_at_its_place(rank):
    mesh = Mesh(data=2, tensor=2, rank=rank, pipeline=2)
    kinds = ((mesh.tensor_groups, mesh.tensor_rank), (mesh.replica_groups, mesh.replica_rank))
    for groups, place in (*kinds, (mesh.pipeline_groups, mesh.stage)):
        (own,) = [group for group in groups if rank in group]
        assert own[place] == rank


def test_numbers_count_once_for_each_model():
    mesh = Mesh(data=2, tensor=2, rank=2)
    gathered = np.array([[3.0, 0.0], [3.0, 1.0], [4.0, 0.0], [4.0, 0.0]])
    assert mesh.sum_over_replicas(gathered).tolist() == [7.0, 1.0]
    assert mesh.sum_over_parts(gathered).tolist() == [8.0, 0.0]


def test_what_the_last_stage_knows_counts_and_parts_of_stages_add_up():
    """2 stages x 2 shares of the rows: losses 5 and 6 on the last stage."""
    mesh = Mesh(data=2, rank=3, pipeline=2)
    gathered = np.array([[0.0], [0.0], [5.0], [6.0]])
    assert mesh.sum_over_replicas(gathered).tolist() == [11.0]
    assert mesh.sum_over_parts(np.array([[1.0], [2.0], [3.0], [4.0]])).tolist() == [6.0]


def test_ranks_of_a_model_share_tokens_and_losses():
    meshes = [Mesh(data=2, tensor=4, rank=4 + rank, sequence=True) for rank in range(4)]
    assert [list(range(8))[mesh.own_tokens(8)] for mesh in meshes] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # There may be fewer losses than ranks.
    assert [list(range(3))[mesh.own_losses(3)] for mesh in meshes] == [[], [0], [1], [2]]
    plain, vocabulary = Mesh(tensor=4, rank=2), Mesh(tensor=4, rank=2, vocabulary=True)
    assert (plain.own_tokens(8), plain.own_losses(8)) == (slice(0, 8), slice(4, 6))
    # Each rank has its part of all the logits.
    assert vocabulary.own_losses(8) == slice(0, 8)
    whole = Mesh(data=4, rank=2, sequence=True, vocabulary=True)
    assert (whole.own_tokens(8), whole.own_losses(8)) == (slice(0, 8), slice(0, 8))
