"""Sparse atoms against scikit-learn, the lasso's optimality conditions and the promises to stored files."""

import pytest
import torch
from sklearn.decomposition import dict_learning, sparse_encode

from atomdiff.atoms import sparse
from atomdiff.atoms.basis import svd_atoms
from atomdiff.atoms.sparse import sparse_atoms, sparse_coefficients, sparse_quality

SIZE, SPARSITY = 9, 1e-3
NUMBERS_OF_ATOMS = [4, SIZE, 14]


def weight_rows(blocks=300, std=0.02, seed=0, size=SIZE):
    """Like the kernels of a trained layer: neighbours correlated, some rows much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    distance = (torch.arange(size)[:, None] - torch.arange(size)[None, :]).abs()
    mix = torch.linalg.cholesky(torch.exp(-distance / 3.0))
    lengths = torch.exp(0.5 * torch.randn(blocks, 1, generator=generator))
    return std * lengths * (torch.randn(blocks, size, generator=generator) @ mix.T)


def some_atoms(num_atoms, seed=1):
    """Far from orthogonal, of norm 1."""
    noise = torch.randn(num_atoms, SIZE, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(torch.eye(num_atoms, SIZE) + 0.3 * noise)


def objective(rows, atoms, coefficients, sparsity):
    """Written out once more, in float64: the mean over rows."""
    rows, atoms, coefficients = rows.double(), torch.as_tensor(atoms).double(), torch.as_tensor(coefficients).double()
    return float(((rows - coefficients @ atoms) ** 2).sum() / 2 + sparsity * coefficients.abs().sum()) / len(rows)


@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_coefficients_are_as_good_as_scikit_learns(num_atoms, std):
    rows, atoms = weight_rows(std=std), some_atoms(num_atoms)
    sparsity = SPARSITY if std < 1 else 0.1
    theirs = sparse_encode(rows.double().numpy(), atoms.double().numpy(), algorithm="lasso_lars", alpha=sparsity)
    coefficients = sparse_coefficients(rows, atoms, sparsity)
    best = objective(rows, atoms, theirs, sparsity)
    assert coefficients.shape == (len(rows), num_atoms) and coefficients.dtype == torch.float32
    assert objective(rows, atoms, coefficients, sparsity) == pytest.approx(
        best, rel=1e-4 if num_atoms <= SIZE else 1e-2
    )
    if num_atoms <= SIZE:  # one minimum only
        torch.testing.assert_close(coefficients, torch.from_numpy(theirs).float(), rtol=1e-3, atol=0.02 * sparsity)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_atoms_are_as_good_as_scikit_learns(num_atoms, std):
    rows = weight_rows(std=std)
    sparsity = SPARSITY if std < 1 else 0.1
    theirs = rows.double().numpy()
    code, dictionary, _ = dict_learning(theirs, num_atoms, alpha=sparsity, method="cd", max_iter=20, random_state=0)
    atoms = sparse_atoms(rows, num_atoms, sparsity)
    assert atoms.shape == (num_atoms, SIZE) and atoms.dtype == torch.float32
    ours = objective(rows, atoms, sparse_coefficients(rows, atoms, sparsity), sparsity)
    assert ours < objective(rows, dictionary, code, sparsity)  # singular vectors alone are up to 18 % above


def test_learning_recovers_what_singular_vectors_cannot():
    generator = torch.Generator().manual_seed(2)
    truth = some_atoms(SIZE)
    used = torch.rand(2000, SIZE, generator=generator) < 0.2
    rows = (used * torch.randn(2000, SIZE, generator=generator)) @ truth
    atoms = sparse_atoms(rows, SIZE, 0.02)
    match = (atoms @ truth.T).abs().amax(dim=0)
    assert match.min() > 0.99 > (svd_atoms(rows, SIZE) @ truth.T).abs().amax(dim=0).min()


@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
def test_coefficients_meet_the_optimality_conditions(num_atoms, monkeypatch):
    if num_atoms > SIZE:
        monkeypatch.setattr(sparse, "_MAX_STEPS", 5000)
    rows = weight_rows()
    atoms = sparse_atoms(rows, num_atoms, SPARSITY)
    coefficients = sparse_coefficients(rows, atoms, SPARSITY)
    slope = (
        (rows.double() - coefficients.double() @ atoms.double()) @ atoms.double().T
    ) / SPARSITY  # sign(a), or within [-1, 1]
    used = coefficients != 0
    slack = 0.005 if num_atoms <= SIZE else 0.02
    assert used.any() and not used.all()
    assert (slope[used] - coefficients[used].sign()).abs().max() < slack
    assert slope[~used].abs().max() < 1 + slack


def test_float64_rows_get_float64_coefficients():
    rows, atoms = weight_rows(), some_atoms(SIZE)
    exact = sparse_coefficients(rows.double(), atoms, SPARSITY)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(sparse_coefficients(rows, atoms, SPARSITY).double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
def test_rows_in_half_precision_have_almost_the_same_coefficients(dtype, num_atoms):
    rows = weight_rows()
    atoms = sparse_atoms(rows, num_atoms, SPARSITY)
    coefficients, in_half = (
        sparse_coefficients(rows, atoms, SPARSITY),
        sparse_coefficients(rows.to(dtype), atoms, SPARSITY),
    )
    assert in_half.dtype == torch.float32
    assert 0 < (coefficients - in_half).norm() / coefficients.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
def test_atoms_survive_storage_in_half_precision(dtype, num_atoms):
    rows = weight_rows()
    atoms = sparse_atoms(rows, num_atoms, SPARSITY)
    assert torch.equal(atoms.to(dtype).float(), atoms)
    assert torch.equal(sparse_coefficients(rows, atoms.to(dtype), SPARSITY), sparse_coefficients(rows, atoms, SPARSITY))
    assert 0.995 < atoms.double().norm(dim=1).min() and atoms.double().norm(dim=1).max() <= 1


def test_small_entries_of_stored_atoms_are_zero():
    atoms = torch.tensor([[1.0, 2.0**-14, -0.9 * 2.0**-14, 1e-9]], dtype=torch.float64)
    assert sparse._storable(atoms).tolist() == [[0.99609375, 0.0, 0.0, 0.0]]  # the longest with 8 bits within norm 1
    assert sparse._storable(atoms / 2)[0, 0] == 0.5


@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
def test_same_arguments_same_result_and_no_other_randomness(num_atoms, monkeypatch):
    monkeypatch.setattr(sparse, "_MAX_ALTERNATIONS", 5)
    rows = weight_rows(10_000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    atoms = sparse_atoms(rows, num_atoms, SPARSITY)
    coefficients = sparse_coefficients(rows, atoms, SPARSITY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sparse_atoms(rows.clone(), num_atoms, SPARSITY), atoms)
    assert torch.equal(sparse_coefficients(rows.clone(), atoms, SPARSITY), coefficients)
    assert not torch.equal(sparse_atoms(rows, num_atoms, SPARSITY, seed=1), atoms)


def test_autocast_does_not_reach_the_coefficients():
    rows = weight_rows()
    atoms = sparse_atoms(rows, SIZE, SPARSITY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse_atoms(rows, SIZE, SPARSITY), atoms)
        coefficients = sparse_coefficients(rows, atoms, SPARSITY)
        quality = sparse_quality(rows, atoms, coefficients, SPARSITY)
    assert torch.equal(coefficients, sparse_coefficients(rows, atoms, SPARSITY))
    assert quality == sparse_quality(rows, atoms, coefficients, SPARSITY)


def test_weights_that_are_trained_elsewhere_have_plain_atoms_and_coefficients():
    rows = weight_rows().requires_grad_()
    atoms = sparse_atoms(rows, SIZE, SPARSITY)
    assert not atoms.requires_grad and not sparse_coefficients(rows, atoms, SPARSITY).requires_grad


def test_chunks_do_not_matter(monkeypatch):
    rows, atoms = weight_rows(), some_atoms(SIZE)
    coefficients = sparse_coefficients(rows, atoms, SPARSITY)
    quality = sparse_quality(rows, atoms, coefficients, SPARSITY)
    monkeypatch.setattr(sparse, "_CPU_CHUNK", 7 * SIZE)
    torch.testing.assert_close(
        sparse_coefficients(rows, atoms, SPARSITY), coefficients, rtol=1e-3, atol=0.01 * SPARSITY
    )
    assert sparse_quality(rows, atoms, coefficients, SPARSITY).objective == pytest.approx(quality.objective, rel=1e-6)


def test_a_sample_of_the_rows_is_enough():
    rows = weight_rows(40_000)
    sampled = sparse_atoms(rows, SIZE, SPARSITY)
    some = rows[:8192]
    own = sparse_atoms(some, SIZE, SPARSITY)
    ours, best = (
        objective(some, atoms, sparse_coefficients(some, atoms, SPARSITY), SPARSITY) for atoms in (sampled, own)
    )
    assert ours < 1.01 * best


def test_atoms_are_updated_one_after_the_other():
    rows, atoms = weight_rows().double(), some_atoms(SIZE).double()
    coefficients = sparse_coefficients(rows, atoms, 0.02)
    coefficients[:, 2] = 0  # an unused atom stays
    expected = atoms.clone()
    for index in range(SIZE):  # least squares for this atom, the others fixed, then into the unit ball
        rest = rows - coefficients @ expected + torch.outer(coefficients[:, index], expected[index])
        if coefficients[:, index].any():
            best = coefficients[:, index] @ rest / coefficients[:, index].square().sum()
            expected[index] = best / best.norm().clamp(min=1)
    updated = sparse._update_atoms(atoms, coefficients.T, (rows - coefficients @ atoms).T)
    torch.testing.assert_close(updated, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(updated[2], atoms[2]) and not torch.equal(updated[3], atoms[3])


def test_unused_atoms_are_put_to_use():
    rows = weight_rows(size=3) @ torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0))  # of rank 3
    coefficients = sparse_coefficients(rows, sparse_atoms(rows, SIZE, SPARSITY), SPARSITY)
    assert (coefficients != 0).any(dim=0).all()


@pytest.mark.parametrize("num_atoms", NUMBERS_OF_ATOMS)
def test_zero_rows_have_atoms_and_zero_coefficients(num_atoms):
    rows = torch.zeros(20, SIZE)
    atoms = sparse_atoms(rows, num_atoms)
    assert atoms.isfinite().all() and atoms.norm(dim=1).min() > 0.99
    coefficients = sparse_coefficients(rows, atoms)
    assert torch.equal(coefficients, torch.zeros(20, num_atoms))
    quality = sparse_quality(rows, atoms, coefficients, SPARSITY)
    assert (quality.objective, quality.relative_error, quality.zero_fraction) == (0, 0, 1)
    assert torch.equal(sparse_coefficients(weight_rows(), torch.zeros(2, SIZE)), torch.zeros(300, 2))


def test_rows_far_below_the_sparsity_have_zero_coefficients():
    rows = weight_rows(std=1e-6)
    assert not sparse_coefficients(rows, sparse_atoms(rows, 14)).any()


def test_quality_is_the_formula():
    rows, atoms = weight_rows(), some_atoms(5)
    coefficients = sparse_coefficients(rows, atoms, 0.01)
    quality = sparse_quality(rows, atoms, coefficients, 0.01)
    assert quality.objective == pytest.approx(objective(rows, atoms, coefficients, 0.01), rel=1e-5)
    assert quality.relative_error == pytest.approx(float((rows - coefficients @ atoms).norm() / rows.norm()), rel=1e-5)
    assert quality.zero_fraction == pytest.approx(float((coefficients == 0).float().mean()))


@pytest.mark.parametrize("sparsity", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity}.*finite number above 0"):
        sparse_atoms(weight_rows(), 3, sparsity)
    with pytest.raises(ValueError, match=f"sparsity={sparsity}.*finite number above 0"):
        sparse_coefficients(weight_rows(), some_atoms(3), sparsity)


def test_no_atoms_are_refused():
    with pytest.raises(ValueError, match="num_atoms=0.*at least 1"):
        sparse_atoms(weight_rows(), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value):
    rows = weight_rows(20_000)
    rows[-1, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        sparse_atoms(rows, 3)
    with pytest.raises(ValueError, match="not finite"):
        sparse_coefficients(rows, some_atoms(3))
