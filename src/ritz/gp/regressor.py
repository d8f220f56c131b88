"""A scikit-learn estimator for Gaussian-process regression; works without scikit-learn installed as well."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch

from ..errors import OperandError
from ..kernels import Kernel, Matern, Scale
from ..methods import Auto
from .exact import ExactGP
from .fit import fit


class GPRegressor:
    """Gaussian-process regression with scikit-learn's conventions: NumPy in, NumPy out.

    Names are those of scikit-learn's ``GaussianProcessRegressor`` where they mean the same. Different: the noise is
    learned and part of every predicted deviation, covariance and sample (as that of a ``WhiteKernel``) unless
    ``latent=True`` asks for the function without it, and an estimator that is not fitted predicts nothing.

    Args:
        kernel: a ritz kernel to start from, which is copied; None is ``Scale(Matern(2.5, ard_num_dims=d))``.
        noise: start value of the noise variance, in units of the (standardised) targets.
        solver, logdet: as in :class:`~ritz.gp.ExactGP`; None is ``Auto()``.
        standardize: shift and scale the columns of X and y to mean 0 and variance 1 inside.
        subset, subset_steps, steps, lr, max_seconds: as in :func:`ritz.gp.fit`; ``subset_steps=0, steps=0`` keeps the
            hyper-parameters.
        dtype: "float64" or "float32" (half the time and memory, at the price of accuracy for small noise).
        device: where to compute.
        random_state: of the random subset: an integer, a NumPy RandomState or Generator, or None for 0.
        callback: called with (step, loss, info) while fitting.

    Attributes:
        gp_: the fitted :class:`~ritz.gp.ExactGP`, in standardised units.
        posterior_: its posterior given the training data; ``posterior_.sample_paths(k)`` are functions to go on with.
        fit_: the :class:`~ritz.gp.Fit` report.
        log_marginal_likelihood_: what was maximised, a target, for the points and in the units of the last stage of the
            fit (log prior included, where the process has priors). Where no stage ran, evaluated when asked for.
        log_marginal_likelihood_value_: log p(y | X), the sum over all (standardised) training data; evaluated when
            asked for.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Example:
        >>> import numpy as np
        >>> X = np.linspace(0, 6, 40)[:, None]
        >>> model = GPRegressor().fit(X, np.sin(X[:, 0]))
        >>> mean, std = model.predict(np.array([[1.0]]), return_std=True)
        >>> bool(abs(mean[0] - np.sin(1.0)) < 0.01)
        True
    """

    _estimator_type = "regressor"
    n_features_in_: int
    x_mean_: np.ndarray
    x_scale_: np.ndarray
    y_mean_: np.ndarray
    y_scale_: np.ndarray

    def __init__(
        self,
        kernel: Kernel | None = None,
        *,
        noise: float = 0.1,
        solver: Any = None,
        logdet: Any = None,
        standardize: bool = True,
        subset: int | None = 1000,
        subset_steps: int = 50,
        steps: int = 10,
        lr: float | None = None,
        max_seconds: float | None = None,
        dtype: str = "float64",
        device: str = "cpu",
        random_state: Any = None,
        callback: Any = None,
    ) -> None:
        self.kernel = kernel
        self.noise = noise
        self.solver = solver
        self.logdet = logdet
        self.standardize = standardize
        self.subset = subset
        self.subset_steps = subset_steps
        self.steps = steps
        self.lr = lr
        self.max_seconds = max_seconds
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.callback = callback

    # -- scikit-learn's protocol, spelled out so that the class does not need scikit-learn ------------------------

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> GPRegressor:
        """Change constructor arguments; returns the estimator."""
        names = self._names()
        for name, value in params.items():
            if name not in names:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {names}.")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")

    def __repr__(self) -> str:
        defaults = {k: p.default for k, p in inspect.signature(type(self).__init__).parameters.items()}
        given = {k: v for k, v in self.get_params().items() if repr(v) != repr(defaults[k])}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    # -- fitting and predicting -----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> GPRegressor:
        """Learn the hyper-parameters and condition on X (n, d), y (n,).

        Targets (n, p) are p outputs that share kernel and noise, each standardised by itself.
        """
        X, y = self._validate(X, y, fitting=True)
        dtype = {"float64": torch.float64, "float32": torch.float32}.get(str(self.dtype))
        if dtype is None:
            raise OperandError(f"dtype={self.dtype!r}; expected 'float64' or 'float32'")
        d = X.shape[1]
        self.x_mean_, self.x_scale_ = _standard(X) if self.standardize else (np.zeros(d), np.ones(d))
        self.y_mean_, self.y_scale_ = (
            _standard(y) if self.standardize else (np.zeros(y.shape[1:]), np.ones(y.shape[1:]))
        )
        kernel = Scale(Matern(2.5, d)) if self.kernel is None else copy.deepcopy(self.kernel)
        seed = _seed(self.random_state)
        solver, logdet = (Auto() if value is None else value for value in (self.solver, self.logdet))
        gp = ExactGP(kernel, noise=self.noise, solver=solver, logdet=logdet)
        self.gp_ = gp.to(dtype).to(self.device)
        P = self._points(X)
        t = torch.as_tensor((y - self.y_mean_) / self.y_scale_).to(P)
        self.fit_ = fit(
            self.gp_,
            P,
            t,
            subset=self.subset,
            subset_steps=self.subset_steps,
            steps=self.steps,
            lr=self.lr,
            max_seconds=self.max_seconds,
            callback=self.callback,
            seed=seed,
        )
        self.posterior_ = self.gp_.condition(P, t)
        return self

    def predict(
        self, X: Any, return_std: bool = False, return_cov: bool = False, *, latent: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The posterior mean at X (n*, d), shape (n*,) or (n*, p), alone or with its uncertainty.

        Args:
            X: points (n*, d).
            return_std: return (mean, std) with the standard deviation of new observations, of the shape of the mean.
            return_cov: return (mean, cov) with their joint covariance, (n*, n*) or (n*, n*, p), for n* ≤ 4000.
            latent: deviation and covariance of the function without noise.

        Raises:
            OperandError: both at once; NotFittedError: before :meth:`fit`.
        """
        if return_std and return_cov:
            raise OperandError("return_std and return_cov were both asked for; expected at most one of them")
        P = self._new_points(X)
        with torch.no_grad():
            mean = _array(self.posterior_.mean(P)) * self.y_scale_ + self.y_mean_
            if return_cov:
                S = _array(self.posterior_.covariance(P, noise=not latent))
                return mean, np.multiply.outer(S, np.square(self.y_scale_))
            if return_std:
                std = np.sqrt(_array(self.posterior_.variance(P, noise=not latent)))
                return mean, np.multiply.outer(std, self.y_scale_)
        return mean

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0, *, latent: bool = False) -> np.ndarray:
        """Joint samples of new observations at X (n*, d), shape (n*, n_samples) or (n*, p, n_samples).

        Args:
            X: points (n*, d).
            n_samples: how many.
            random_state: an integer, a NumPy RandomState or Generator, or None for 0.
            latent: samples of the function without noise.

        See :meth:`ritz.gp.Posterior.sample` for how they are made.
        """
        P = self._new_points(X)
        samples = self.posterior_.sample(P, n_samples, noise=not latent, seed=_seed(random_state))
        return np.moveaxis(_array(samples) * self.y_scale_ + self.y_mean_, 0, -1)

    @property
    def log_marginal_likelihood_(self) -> float:
        """What was maximised, a target; where nothing was, the value at the hyper-parameters as they are."""
        if not hasattr(self, "posterior_"):
            raise AttributeError("log_marginal_likelihood_ is there after fit")
        if self.fit_.stopped:
            return -self.fit_.loss
        with torch.no_grad():
            prior = float(self.gp_.log_prior())
        return (self.log_marginal_likelihood_value_ + prior) / self.posterior_.y.numel()

    @property
    def log_marginal_likelihood_value_(self) -> float:
        """log p(y | X) of the standardised training data under the fitted hyper-parameters, without their priors."""
        if not hasattr(self, "posterior_"):
            raise AttributeError("log_marginal_likelihood_value_ is there after fit")
        with torch.no_grad():
            return float(self.gp_.log_marginal_likelihood(self.posterior_.X, self.posterior_.y))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², the share of the variance of y that the mean explains; for several outputs, the mean over them."""
        mean = np.asarray(self.predict(X))
        y = np.asarray(y, dtype=np.float64).reshape(mean.shape)
        w = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        residual, total = (w @ np.square(y - c).reshape(len(y), -1) for c in (mean, np.average(y, axis=0, weights=w)))
        shares = [1 - r / t if t > 0 else float(r == 0) for r, t in zip(residual, total, strict=True)]
        return float(np.mean(shares))

    def _new_points(self, X: Any) -> torch.Tensor:
        if not hasattr(self, "posterior_"):
            raise _not_fitted(self)
        return self._points(self._validate(X))

    def _points(self, X: np.ndarray) -> torch.Tensor:
        parameter = next(self.gp_.parameters())
        return torch.as_tensor((X - self.x_mean_) / self.x_scale_).to(parameter.dtype).to(parameter.device)

    def _validate(self, X: Any, y: Any = None, *, fitting: bool = False) -> Any:
        """Finite float64 arrays of matching shape, by scikit-learn's own rules and messages where it is there."""
        try:
            from sklearn.utils.validation import column_or_1d, validate_data
        except ImportError:
            return self._validate_plainly(X, y, fitting)
        options: dict[str, Any] = {"dtype": np.float64}
        if not fitting:
            return validate_data(self, X, reset=False, **options)
        X, y = validate_data(self, X, y, y_numeric=True, multi_output=True, **options)
        single = y.ndim == 1 or y.shape[1] == 1
        return X, (column_or_1d(y, warn=True) if single else y).astype(np.float64)

    def _validate_plainly(self, X: Any, y: Any, fitting: bool) -> Any:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[0] == 0 or not np.isfinite(X).all():
            raise OperandError(f"X has shape {X.shape}; expected a finite array (n, d) with n >= 1")
        if not fitting:
            if X.shape[1] != self.n_features_in_:
                raise OperandError(f"X has {X.shape[1]} features, but the model was fitted with {self.n_features_in_}")
            return X
        y = np.asarray(y, dtype=np.float64)
        y = y.reshape(-1) if y.shape == (X.shape[0], 1) else y
        if y.ndim not in (1, 2) or y.shape[0] != X.shape[0] or y.size == 0 or not np.isfinite(y).all():
            raise OperandError(f"y has shape {y.shape}; expected a finite array ({X.shape[0]},) or ({X.shape[0]}, p)")
        self.n_features_in_ = X.shape[1]
        return X, y


def _standard(x: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard deviation by column; 1 where a column is constant up to rounding."""
    mean, scale = x.mean(0), x.std(0)
    return mean, np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _seed(random_state: Any) -> int:
    if random_state is None:
        return 0
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    return int(random_state.randint(2**31 - 1))


def _not_fitted(estimator: GPRegressor) -> Exception:
    text = f"This {type(estimator).__name__} instance is not fitted yet; call fit(X, y) before predicting."
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return OperandError(text)
    return NotFittedError(text)
