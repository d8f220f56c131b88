"""The scikit-learn estimator: conventions, predictions against the process behind it, a real data set."""

import builtins
import gzip
import pickle
import warnings
from importlib import resources

import numpy as np
import pytest
import torch

from ritz import CG, Hutchinson, Lanczos
from ritz.gp import GPRegressor
from ritz.kernels import RBF, Scale


def table(n=80, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * [1.0, 100.0][:d] + 5
    y = 1000 + 30 * np.sin(X[:, 0]) + 0.2 * X[:, -1] + rng.normal(size=n)
    return X, y


def test_recovers_a_function_and_its_noise():
    X, y = table(150)
    model = GPRegressor().fit(X, y)
    new, truth = table(100, seed=1)
    mean, std = model.predict(new, return_std=True)
    assert mean.dtype == std.dtype == np.float64 and mean.shape == std.shape == (100,)
    z = (truth - mean) / std
    assert 0.7 < float(np.sqrt((z**2).mean())) < 1.4 and model.score(new, truth) > 0.97
    latent = model.predict(new, return_std=True, latent=True)[1]
    noise = np.sqrt(std**2 - latent**2)
    np.testing.assert_allclose(noise, noise[0])
    assert 0.7 < noise[0] < 1.4  # the noise of the data is 1
    assert model.n_features_in_ == 2 and np.isfinite(model.log_marginal_likelihood_)


def test_units_do_not_matter_and_standardisation_can_be_switched_off():
    X, y = table(40)
    a = GPRegressor().fit(X, y).predict(X)
    b = GPRegressor().fit(X * 1e-6, y * 1e6).predict(X * 1e-6)
    np.testing.assert_allclose(a, b / 1e6, rtol=1e-4)
    Z, t = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    np.testing.assert_allclose(GPRegressor(standardize=False).fit(Z, t).predict(Z) * y.std() + y.mean(), a, rtol=1e-6)
    raw = GPRegressor(standardize=False, subset_steps=0, steps=0).fit(X, y)
    assert raw.y_scale_ == 1.0 and np.all(raw.x_mean_ == 0)


def test_given_kernel_is_copied_not_changed():
    X, y = table(40)
    kernel = 2.0 * RBF(lengthscale=0.7)
    before = {k: v.clone() for k, v in kernel.state_dict().items()}
    model = GPRegressor(kernel, noise=0.3, subset_steps=0, steps=0).fit(X, y)
    assert model.gp_.noise.item() == pytest.approx(0.3) and model.gp_.kernel is not kernel
    assert GPRegressor(kernel).fit(X, y).gp_.kernel.outputscale.item() != pytest.approx(2.0)
    assert all(torch.equal(v, before[k]) for k, v in kernel.state_dict().items())


def test_fit_again_is_the_same_fit():
    X, y = table(60)
    first = GPRegressor(subset=30, steps=3, random_state=3).fit(X, y).predict(X)
    assert np.array_equal(first, GPRegressor(subset=30, steps=3, random_state=3).fit(X, y).predict(X))
    for state in (np.random.RandomState(0), np.random.default_rng(0), None):
        GPRegressor(random_state=state, subset_steps=1).fit(X, y)


def test_parameters_clone_and_pickle():
    sklearn = pytest.importorskip("sklearn.base")
    X, y = table(40)
    model = GPRegressor(Scale(RBF(2)), noise=0.2, subset_steps=7)
    assert model.get_params()["subset_steps"] == 7 and "subset_steps=7" in repr(model)
    twin = sklearn.clone(model).set_params(subset_steps=3)
    assert (twin.subset_steps, model.subset_steps) == (3, 7) and not hasattr(twin, "gp_")
    with pytest.raises(ValueError, match="bogus"):
        model.set_params(bogus=1)
    model.fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    for a, b in zip(model.predict(X, return_std=True), again.predict(X, return_std=True)):
        assert np.array_equal(a, b)


def test_float32():
    X, y = table(60)
    model = GPRegressor(dtype="float32").fit(X, y)
    assert model.gp_.raw_noise.dtype == torch.float32
    np.testing.assert_allclose(model.predict(X), GPRegressor().fit(X, y).predict(X), rtol=1e-3)
    with pytest.raises(ValueError, match="float16"):
        GPRegressor(dtype="float16").fit(X, y)


def test_pipelines_and_searches():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    X, y = table(45)
    assert cross_val_score(make_pipeline(MinMaxScaler(), GPRegressor(subset_steps=15)), X, y, cv=3).min() > 0.8
    search = GridSearchCV(GPRegressor(subset_steps=0, steps=0), {"noise": [1e-3, 10.0]}, cv=3).fit(X, y)
    assert search.best_params_ == {"noise": 1e-3}


def test_covariances_and_samples():
    X, y = table(60)
    model = GPRegressor(subset_steps=15).fit(X, y)
    new = table(7, seed=1)[0]
    mean, cov = model.predict(new, return_cov=True)
    std = model.predict(new, return_std=True)[1]
    assert cov.shape == (7, 7) and np.allclose(cov, cov.T)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), std)
    latent = model.predict(new, return_cov=True, latent=True)[1]
    np.testing.assert_allclose(cov - latent, np.eye(7) * (cov - latent)[0, 0], atol=1e-12 * cov.max())
    with pytest.raises(ValueError, match="at most one"):
        model.predict(new, return_std=True, return_cov=True)

    samples = model.sample_y(new, 4000, random_state=1)
    assert samples.shape == (7, 4000) and model.sample_y(new).shape == (7, 1)
    assert np.array_equal(samples[:, :5], model.sample_y(new, 4000, random_state=1)[:, :5])
    assert not np.allclose(samples, model.sample_y(new, 4000, random_state=np.random.default_rng(0)))
    z = np.linalg.solve(np.linalg.cholesky(cov), samples - mean[:, None])
    assert abs((z**2).sum() - 7 * 4000) < 4.5 * np.sqrt(2 * 7 * 4000)  # χ² with 28 000 degrees of freedom
    assert 4000 * (z.mean(1) ** 2).sum() < 7 + 4.5 * np.sqrt(2 * 7)
    smooth = model.sample_y(new, 4000, random_state=1, latent=True)
    assert np.all(smooth.std(1) < samples.std(1))


def test_several_outputs():
    X, y = table(50)
    Y = np.stack([y, 1e-3 * X[:, 1] - y], 1)
    model = GPRegressor(subset_steps=10).fit(X, Y)
    new = table(6, seed=1)[0]
    mean, std = model.predict(new, return_std=True)
    cov = model.predict(new, return_cov=True)[1]
    assert mean.shape == std.shape == (6, 2) and cov.shape == (6, 6, 2) and model.y_mean_.shape == (2,)
    np.testing.assert_allclose(np.sqrt(np.einsum("iij->ij", cov)), std)
    np.testing.assert_allclose(std[:, 1] / std[:, 0], Y[:, 1].std() / Y[:, 0].std())
    assert model.sample_y(new, 3).shape == (6, 2, 3)
    r2 = pytest.importorskip("sklearn.metrics").r2_score
    assert model.score(X, Y) == pytest.approx(r2(Y, model.predict(X)))
    weights = np.linspace(1, 2, 50)
    assert model.score(X, Y, weights) == pytest.approx(r2(Y, model.predict(X), sample_weight=weights))
    alone = GPRegressor(model.gp_.kernel, noise=float(model.gp_.noise.detach()), subset_steps=0, steps=0).fit(
        X, Y[:, 0]
    )
    alone.gp_.mean.constant.data.copy_(model.gp_.mean.constant.data)
    alone.posterior_ = alone.gp_.condition(alone.posterior_.X, alone.posterior_.y)
    np.testing.assert_allclose(alone.predict(new), mean[:, 0])


def test_log_marginal_likelihood_is_that_of_scikit_learn():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    kernels = pytest.importorskip("sklearn.gaussian_process.kernels")
    X, y = table(40)
    ours = GPRegressor(2.0 * RBF(lengthscale=0.7), noise=0.3, subset_steps=0, steps=0).fit(X, y)
    kernel = kernels.ConstantKernel(2.0) * kernels.RBF(0.7) + kernels.WhiteKernel(0.3)
    theirs = gaussian_process.GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True, alpha=0.0)
    Z = (X - X.mean(0)) / X.std(0)
    theirs.fit(Z, y)
    assert ours.log_marginal_likelihood_value_ == pytest.approx(theirs.log_marginal_likelihood_value_, rel=1e-6)
    new = table(5, seed=1)[0]
    for options in ({"return_std": True}, {"return_cov": True}):
        wants = theirs.predict((new - X.mean(0)) / X.std(0), **options)
        for got, want in zip(ours.predict(new, **options), wants):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * y.std())
    assert not hasattr(GPRegressor(), "log_marginal_likelihood_value_")


def test_what_was_maximised_is_known_where_nothing_was():
    X, y = table(40)
    kept = GPRegressor(2.0 * RBF(lengthscale=0.7), noise=0.3, subset_steps=0, steps=0).fit(X, y)
    assert kept.log_marginal_likelihood_ == pytest.approx(kept.log_marginal_likelihood_value_ / 40, rel=1e-12)
    fitted = GPRegressor(2.0 * RBF(lengthscale=0.7), noise=0.3, subset_steps=30).fit(X, y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(fitted.log_marginal_likelihood_value_ / 40, rel=1e-9)
    assert fitted.log_marginal_likelihood_ > kept.log_marginal_likelihood_
    by_adam = GPRegressor(2.0 * RBF(lengthscale=0.7), noise=0.3, lr=0.01, steps=2).fit(X, y)
    assert by_adam.fit_.optimizer.lr == 0.01 and set(by_adam.fit_.stopped) == {"all"}
    assert not hasattr(GPRegressor(), "log_marginal_likelihood_")


def test_pandas_tables_keep_their_names():
    pandas = pytest.importorskip("pandas")
    X, y = table(40)
    frame = pandas.DataFrame(X, columns=["a", "b"])
    model = GPRegressor(subset_steps=5).fit(frame, pandas.Series(y))
    assert model.feature_names_in_.tolist() == ["a", "b"]
    np.testing.assert_allclose(model.predict(frame), GPRegressor(subset_steps=5).fit(X, y).predict(X), rtol=1e-9)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a"]])


@pytest.mark.slow
def test_several_processes_give_the_same_answer():
    pytest.importorskip("joblib")
    from sklearn.model_selection import GridSearchCV

    X, y = table(40)
    grid = {"noise": [1e-3, 10.0]}
    one, two = (
        GridSearchCV(GPRegressor(subset_steps=3), grid, cv=2, n_jobs=jobs, error_score="raise").fit(X, y)
        for jobs in (1, 2)
    )
    np.testing.assert_allclose(one.cv_results_["mean_test_score"], two.cv_results_["mean_test_score"], rtol=1e-6)
    np.testing.assert_allclose(one.predict(X), two.predict(X), rtol=1e-6)


def test_pickle_of_an_iterative_posterior():
    X, y = table(60)
    model = GPRegressor(solver=CG(rtol=1e-8), logdet=(Hutchinson(4), Lanczos(10)), subset_steps=5, steps=1).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    for a, b in zip(model.predict(X, return_std=True), again.predict(X, return_std=True)):
        assert np.array_equal(a, b)
    assert np.array_equal(model.sample_y(X[:4], 2), again.sample_y(X[:4], 2))


@pytest.mark.slow
def test_scikit_learns_own_checks():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the class does not inherit from BaseEstimator, on purpose
        results = checks.check_estimator(GPRegressor(), on_fail=None)
    assert len(results) > 30 and not [r["check_name"] for r in results if r["status"] == "failed"]


def test_works_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    X, y = table(30)
    model = GPRegressor(subset_steps=5)
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(X)
    assert model.fit(X, y).predict(X).shape == (30,)
    for bad in ((X[:, 0], y), (X, y[:3]), (X, y * np.nan)):
        with pytest.raises(ValueError, match="expected"):
            model.fit(*bad)
    with pytest.raises(ValueError, match="1 features"):
        model.predict(X[:, :1])


def test_shipped_elevators():
    with resources.files("ritz.data").joinpath("elevators.csv.gz").open("rb") as raw, gzip.open(raw, "rt") as text:
        rows = np.array([[float(v) for v in line.split(",")] for _, line in zip(range(900), text)])
    X, y = rows[:, :-1], rows[:, -1]
    model = GPRegressor(subset_steps=20).fit(X[:600], y[:600])
    mean, std = model.predict(X[600:], return_std=True)
    z = (y[600:] - mean) / std
    linear = np.linalg.lstsq(np.c_[X[:600], np.ones(600)], y[:600], rcond=None)[0]
    residual = y[600:] - np.c_[X[600:], np.ones(300)] @ linear
    assert ((y[600:] - mean) ** 2).mean() < 0.95 * (residual**2).mean()
    assert 0.7 < float(np.sqrt((z**2).mean())) < 1.5
